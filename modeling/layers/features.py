"""Features as tokens of one width: what the interaction models interact, split into what a request
knows and what a candidate adds, so that the request's half is computed once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modeling.batch import Candidates, FeatureSizes, UserInputs
from modeling.layers.embedding import CategorySlots, Standardise

FEATURES_PER_TOKEN = 5  # dense features that one token stands for


class Bags(NamedTuple):
    """Sums and numbers of a user's events by action: all that mean pooling needs of the past."""

    sum_BAD: Tensor
    count_BA: Tensor


class FeatureTokens(nn.Module):
    """Every feature as a token of width D.

    Of a request: a token for each user and context field, dense user features in tokens of five,
    and the mean item of each action's events (a behaviour sequence is the events of one action). Of
    a candidate: item, category groups, dense features in tokens of five.

    Args:
        bags: whether pooled sequences are among the request's tokens.
    """

    def __init__(self, sizes: FeatureSizes, width: int, *, bags: bool) -> None:
        super().__init__()
        self.sizes, self.width, self.bags = sizes, width, bags
        self.item = nn.Embedding(sizes.items, width)
        self.fields = nn.ModuleList(nn.Embedding(size, width) for size in sizes.user_fields)
        self.categories = CategorySlots(sizes, width)
        self.user_dense = DenseTokens(sizes.user_dense, width)
        self.candidate_dense = DenseTokens(sizes.dense, width)
        self.nothing = (
            nn.Parameter(torch.zeros(sizes.actions, width)) if bags else None
        )  # of an empty sequence
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)
        self.categories.zero_empty_slots()

    @property
    def request_groups(self) -> tuple[int, ...]:
        """Tokens of each semantic group of the request: fields, dense features, each sequence."""
        groups = (
            len(self.fields),
            self.user_dense.num_tokens,
            *((1,) * self.sizes.actions if self.bags else ()),
        )
        return tuple(size for size in groups if size)

    @property
    def candidate_groups(self) -> tuple[int, ...]:
        """Tokens of each semantic group of a candidate: item, categories, dense features."""
        return tuple(
            size
            for size in (1, len(self.sizes.categories), self.candidate_dense.num_tokens)
            if size
        )

    @property
    def num_request(self) -> int:
        """Tokens of a request, R."""
        return sum(self.request_groups)

    @property
    def num_candidate(self) -> int:
        """Tokens of a candidate, N."""
        return sum(self.candidate_groups)

    def fit_statistics(self, dense_NF: Tensor, dense_BG: Tensor) -> None:
        """Standardise dense features by the training set."""
        self.candidate_dense.standardise.fit(dense_NF)
        self.user_dense.standardise.fit(dense_BG)

    def bag(
        self, user: UserInputs, before: Bags | None = None, items_BLD: Tensor | None = None
    ) -> Bags:
        """Sums of the events by action, on top of those of earlier events.

        Args:
            items_BLD: the events' item rows, where they are at hand.
        """
        items_BLD = self.item(user.item_BL) if items_BLD is None else items_BLD
        which = torch.arange(self.sizes.actions, device=user.action_BL.device)
        member = ((user.action_BL[:, None] == which[:, None]) & user.mask_BL[:, None]).to(
            self.item.weight.dtype
        )
        sums, counts = member @ items_BLD, member.sum(-1)
        return (
            Bags(sums, counts)
            if before is None
            else Bags(before.sum_BAD + sums, before.count_BA + counts)
        )

    def request(
        self, user: UserInputs, bags: Bags | None = None, items_BLD: Tensor | None = None
    ) -> Tensor:
        """Tokens of each request, B × R × D.

        Args:
            bags: of all events where `user` holds only the newest; default: of the user's events.
            items_BLD: the events' item rows, where they are at hand.
        """
        found = [table(user.field_BU[:, i])[:, None] for i, table in enumerate(self.fields)]
        if self.user_dense.num_tokens:
            found.append(self.user_dense(user.dense_BG))
        if self.nothing is not None:
            sums, counts = self.bag(user, items_BLD=items_BLD) if bags is None else bags
            mean = sums / counts.clamp(min=1)[..., None]
            found.append(torch.where(counts[..., None] > 0, mean, self.nothing))
        if not found:
            return self.item.weight.new_zeros(len(user.item_BL), 0, self.width)
        return torch.cat(found, dim=1)

    def candidates(self, candidates: Candidates) -> Tensor:
        """Tokens of each candidate, B × C × N × D."""
        found = [self.item(candidates.item_BC)[:, :, None]]
        found += [token[:, :, None] for token in self.categories(candidates.category_BCK)]
        if self.candidate_dense.num_tokens:
            found.append(self.candidate_dense(candidates.dense_BCF))
        return torch.cat(found, dim=2)


class DenseTokens(nn.Module):
    """Dense features → standardised → one two-layer network → tokens (Hiformer, arXiv 2311.05884,
    input layer).

    Differs: beside each number the network sees whether it is there. Missing numbers (NaN) are
    neither small nor the mean.
    """

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.num_tokens, self.width = math.ceil(num_features / FEATURES_PER_TOKEN), width
        self.standardise = Standardise(num_features)
        self.network = (
            nn.Sequential(
                nn.Linear(2 * num_features, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, self.num_tokens * width),
            )
            if num_features
            else nn.Identity()
        )

    def forward(self, values: Tensor) -> Tensor:
        """… × F → … × tokens × D."""
        missing = values.isnan().to(self.standardise.mean.dtype)
        inputs = torch.cat([self.standardise(values), missing], dim=-1)
        tokens: Tensor = self.network(inputs).unflatten(-1, (self.num_tokens, self.width))
        return tokens
