"""Features as tokens of one width: what the interaction models interact, split into what a request
knows and what a candidate adds, so that the request's half is computed once.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from modeling.inputs.batch import Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.inputs.columns import GroupSizes
from modeling.layers.codes import ItemRows
from modeling.layers.embedding import CategorySlots, GaussianRank, Standardise

# Numbers that one token stands for
FEATURES_PER_TOKEN = 5
# Width of the embedding of an event's category
EVENT_CATEGORY_WIDTH = 8
# Buckets that a number is cut into
NUM_BUCKETS = 32
Numbers = Literal["network", "buckets"]


class Bags(NamedTuple):
    """Sums and numbers of a user's events by action: all that mean pooling needs of the past."""

    sum_BAD: Tensor
    count_BA: Tensor


class FeatureTokens(nn.Module):
    """Every feature as a token of width D: the one place where rankers read columns, of any kind.

    Of a request: a token for each category or bag of user and context, numbers in tokens of five, a
    token for each vector, and the mean item of each action's events (a behaviour sequence is the
    events of one action). Of a candidate: item, categories, numbers, vectors. What is missing has
    a learned row, or a flag beside the number. What an event carries beside its item is `events`.

    Args:
        bags: whether pooled sequences are among the request's tokens.
        numbers: through a network together, or cut into buckets that have embeddings.
    """

    def __init__(
        self, sizes: FeatureSizes, width: int, *, bags: bool, numbers: Numbers = "network"
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.width = width
        self.bags = bags
        self.item = ItemRows(sizes, width)
        self.fields = CategorySlots(sizes.request, width)
        self.categories = CategorySlots(sizes.candidate, width)
        self.user_dense = DenseTokens(sizes.request, width, numbers)
        self.candidate_dense = DenseTokens(sizes.candidate, width, numbers)
        self.events = EventInputs(sizes.event)
        # The row of an empty sequence
        self.nothing = nn.Parameter(torch.zeros(sizes.actions, width)) if bags else None

    def hand_over(self, *names: Literal["item", "events"]) -> None:
        """Let another module register the weights of item embeddings or event inputs; this one goes on using them.

        Were they registered twice, they would be stored twice, and belong to the identity of both.
        """
        for name in names:
            module = getattr(self, name)
            delattr(self, name)
            # Past nn.Module: an attribute that is read as before, and is neither stored nor counted here.
            object.__setattr__(self, name, module)

    @property
    def request_groups(self) -> tuple[int, ...]:
        """Tokens of each semantic group of the request: categories, numbers, vectors, each
        sequence.
        """
        request = self.sizes.request
        groups = (
            len(request.categories),
            self.user_dense.num_number_tokens,
            len(request.vectors),
            *((1,) * self.sizes.actions if self.bags else ()),
        )
        return tuple(size for size in groups if size)

    @property
    def candidate_groups(self) -> tuple[int, ...]:
        """Tokens of each semantic group of a candidate: item, categories, numbers, vectors."""
        candidate = self.sizes.candidate
        numbers = self.candidate_dense.num_number_tokens
        groups = (1, len(candidate.categories), numbers, len(candidate.vectors))
        return tuple(size for size in groups if size)

    @property
    def num_request(self) -> int:
        return sum(self.request_groups)

    @property
    def num_candidate(self) -> int:
        return sum(self.candidate_groups)

    def fit_statistics(self, sample: TrainingSample) -> None:
        """Take the scales of dense features from the training period."""
        if sample.item_IK is not None:
            self.item.codes.item_IK.copy_(sample.item_IK)
        self.candidate_dense.fit(sample.candidate_NF)
        self.user_dense.fit(sample.request_BG)
        self.events.fit(sample.event_ME)

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
        sums = member @ items_BLD
        counts = member.sum(-1)
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
        found = [token[:, None] for token in self.fields(user.field_BU)]
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
        found = [self.item(candidates.item_BC, candidates.category_BCK)[:, :, None]]
        found += [token[:, :, None] for token in self.categories(candidates.category_BCK)]
        if self.candidate_dense.num_tokens:
            found.append(self.candidate_dense(candidates.dense_BCF))
        return torch.cat(found, dim=2)


class DenseTokens(nn.Module):
    """Dense features → tokens: numbers, by their ranks, together through one two-layer network (Hiformer, arXiv
    2311.05884, input layer), each vector, standardised, through its own matrix.

    Differs: beside each number the network sees whether it is there, and a missing vector has a
    learned row. What is missing (NaN) is neither small nor the mean.

    Args:
        numbers: "buckets" gives each number an embedding by its quantile instead (`BucketTokens`).
    """

    def __init__(self, sizes: GroupSizes, width: int, numbers: Numbers = "network") -> None:
        super().__init__()
        self.sizes = sizes
        self.width = width
        self.num_number_tokens = math.ceil(sizes.numbers / FEATURES_PER_TOKEN)
        self.ranks = GaussianRank(sizes.numbers)
        self.standardise = Standardise(sum(sizes.vectors))
        self.buckets = None
        self.network: nn.Module = nn.Identity()
        if sizes.numbers and numbers == "buckets":
            self.buckets = BucketTokens(sizes.numbers, width)
        elif sizes.numbers:
            self.network = nn.Sequential(
                nn.Linear(2 * sizes.numbers, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, self.num_number_tokens * width),
            )
        self.vectors = nn.ModuleList(nn.Linear(length, width) for length in sizes.vectors)
        self.nothing = nn.Parameter(torch.zeros(len(sizes.vectors), width))

    @property
    def num_tokens(self) -> int:
        """Tokens of the numbers, and one for each vector."""
        return self.num_number_tokens + len(self.vectors)

    def fit(self, values_NF: Tensor) -> None:
        """Take scales, and bounds of buckets, from the training period."""
        numbers = self.sizes.numbers
        self.ranks.fit(values_NF[:, :numbers])
        self.standardise.fit(values_NF[:, numbers:])
        if self.buckets is not None:
            self.buckets.fit(values_NF[:, : self.sizes.numbers])

    def forward(self, values: Tensor) -> Tensor:
        """… × F → … × tokens × D."""
        numbers = self.sizes.numbers
        missing = values.isnan()
        number_missing, *vectors_missing = missing.split((numbers, *self.sizes.vectors), dim=-1)
        vectors = self.standardise(values[..., numbers:]).split(self.sizes.vectors, dim=-1)
        found = []
        if self.buckets is not None:
            found.append(self.buckets(values[..., : self.sizes.numbers]))
        elif self.num_number_tokens:
            number = self.ranks(values[..., :numbers])
            inputs = torch.cat([number, number_missing.to(number.dtype)], dim=-1)
            found.append(self.network(inputs).unflatten(-1, (self.num_number_tokens, self.width)))
        for index, project in enumerate(self.vectors):
            gone = vectors_missing[index].any(-1, keepdim=True)
            token = torch.where(gone, self.nothing[index], project(vectors[index]))
            found.append(token[..., None, :])
        return torch.cat(found, dim=-2)


class BucketTokens(nn.Module):
    """Numbers → quantile buckets of the training period → an embedding each (OneTrans, arXiv
    2510.26104, section 3.2: numeric features are bucketised).

    Differs: the paper does not say how buckets are cut; five numbers' embeddings are summed into a
    token, as many as the network makes of them; a missing number (NaN) has a separate bucket.
    """

    bounds_FQ: Tensor
    first_F: Tensor

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.register_buffer("bounds_FQ", torch.zeros(numbers, NUM_BUCKETS - 1))
        each = NUM_BUCKETS + 1
        self.register_buffer("first_F", each * torch.arange(numbers), persistent=False)
        self.rows = nn.Embedding(each * numbers, width)
        nn.init.normal_(self.rows.weight, std=0.05)

    def fit(self, values_NF: Tensor) -> None:
        """Set bounds between equally many known values; a number that is never known keeps 0."""
        shares = np.linspace(0, 1, NUM_BUCKETS + 1)[1:-1]
        for number, values in enumerate(values_NF.T):
            known = values[~values.isnan()].double().numpy()
            if len(known):
                self.bounds_FQ[number] = torch.from_numpy(np.quantile(known, shares))

    def forward(self, values: Tensor) -> Tensor:
        """… × F → … × tokens × D."""
        flat = values.reshape(-1, values.shape[-1]).T.contiguous()
        bucket = 1 + torch.searchsorted(self.bounds_FQ, flat.nan_to_num(0.0), right=True)
        bucket = bucket.masked_fill(flat.isnan(), 0).T.reshape(values.shape)
        rows = self.rows(bucket + self.first_F)
        missing = -rows.shape[-2] % FEATURES_PER_TOKEN
        return pad(rows, (0, 0, 0, missing)).unflatten(-2, (-1, FEATURES_PER_TOKEN)).sum(-2)


class EventInputs(nn.Module):
    """Features that an event carries beside item, action and time, as one row of numbers: numbers by their ranks,
    vectors standardised, whether each is there, and a small embedding for each category or bag.

    Every model puts this row through its own first layer; `size` is its width, 0 where events
    carry nothing.
    """

    def __init__(self, sizes: GroupSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.ranks = GaussianRank(sizes.numbers)
        self.standardise = Standardise(sum(sizes.vectors))
        self.categories = CategorySlots(sizes, EVENT_CATEGORY_WIDTH)
        flags = sizes.numbers + len(sizes.vectors)
        self.size = sizes.dense + flags + EVENT_CATEGORY_WIDTH * len(sizes.categories)

    def fit(self, values_ME: Tensor) -> None:
        """Take scales from the training period's events."""
        numbers = self.sizes.numbers
        self.ranks.fit(values_ME[:, :numbers])
        self.standardise.fit(values_ME[:, numbers:])

    def forward(self, user: UserInputs) -> Tensor:
        """B × L × size."""
        numbers = self.sizes.numbers
        missing = user.event_BLE.isnan()
        found = [
            self.ranks(user.event_BLE[..., :numbers]),
            self.standardise(user.event_BLE[..., numbers:]),
            missing[..., :numbers].to(user.event_BLE.dtype),
        ]
        for vector in missing[..., numbers:].split(self.sizes.vectors, dim=-1):
            if self.sizes.vectors:
                found.append(vector.any(-1, keepdim=True).to(user.event_BLE.dtype))
        if self.sizes.categories:
            assert user.event_category_BLJ is not None
            found += self.categories(user.event_category_BLJ)
        return torch.cat(found, dim=-1)
