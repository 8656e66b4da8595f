"""Long histories in two stages: search for the events that matter to a candidate, then attend to
those.

`search="category"` is SIM's hard search (Pi et al., arXiv 2006.05639): the newest events of the
candidate's category. `search="score"` is as in TWIN (Chang et al., arXiv 2302.02352): the events
with the largest scores of the very attention that then reads them.

Differs: one head; no second, short window beside it (the pooled sequences of all baselines stand
there); TWIN's cross features of event and candidate, which this data has none of, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from modeling.baselines import base, dcnv2
from modeling.inputs.batch import Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.layers.interaction import Interaction
from modeling.layers.matching import Matching
from modeling.layers.reader import History


@dataclass(frozen=True)
class Config(dcnv2.Config):
    """A hundred events are attended to, as TWIN has it."""

    history: History = "bags"
    search: Literal["category", "score"] = "category"
    # The slot of an item's categories that the search goes by
    slot: int = 0
    retrieved: int = 100


@dataclass(frozen=True)
class UserState:
    """The request's tokens; keys, values and categories of all events."""

    request_BRD: Tensor
    keys_BLD: Tensor
    values_BLD: Tensor
    category_BL: Tensor
    mask_BL: Tensor


class TwoStage(base.Baseline):
    """See the module docstring."""

    config: Config
    item_IK: Tensor

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__(config, sizes)
        if config.search == "category" and config.slot >= sizes.item.num_slots:
            raise ValueError(
                f"slot {config.slot} is none of the items' {sizes.item.num_slots} category slots"
            )
        width = config.width
        self.register_buffer(
            "item_IK", torch.zeros(sizes.items, sizes.item.num_slots, dtype=torch.long)
        )
        self.action = nn.Embedding(sizes.actions, width)
        self.numbers = nn.Linear(self.features.events.size + 1, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.matching = Matching(1, width, plain=not config.matching)
        self.matching.begin(self.query, self.key)

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        return dcnv2.CrossAndDeep(request, candidate + 1, self.config)

    def fit_statistics(self, sample: TrainingSample) -> None:
        """Scales, and the categories of items."""
        super().fit_statistics(sample)
        if sample.item_IK is not None:
            self.item_IK.copy_(sample.item_IK)

    def encode_user(self, user: UserInputs) -> UserState:  # type: ignore[override]
        """Keys and values of every event."""
        items = self.features.item(user.item_BL)
        numbers = torch.cat([self.features.events(user), user.age_BL[..., None]], dim=-1)
        rows = items + self.action(user.action_BL) + self.numbers(numbers)
        category = user.item_BL
        if self.config.search == "category":
            category = self.item_IK[user.item_BL][..., self.config.slot]
        request = self.features.request(user, items_BLD=items)
        keys = self.matching.keys(self.key(rows)[:, None])[:, 0]
        return UserState(request, keys, self.value(rows), category, user.mask_BL)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:  # type: ignore[override]
        """Each candidate searches, and attends to what it found. logits_BCT."""
        tokens = self.features.candidates(candidates)
        query = self.matching.queries(self.query(tokens[:, :, 0])[:, None])[:, 0]
        scores = query @ user_state.keys_BLD.transpose(1, 2)
        found = self._search(scores, user_state, candidates)
        read = self.out(self._read(scores.masked_fill(~found, -torch.inf), user_state.values_BLD))
        tokens = torch.cat([tokens, read[:, :, None]], dim=2)
        logits: Tensor = self.heads(*self.interaction(user_state.request_BRD, tokens))
        return logits

    def _read(self, scores_BCL: Tensor, values_BLD: Tensor) -> Tensor:
        """Attend to what was found and, where rows match, to nothing."""
        if self.matching.plain:
            return scores_BCL.softmax(-1).nan_to_num(0.0) @ values_BLD
        nothing = self.matching.nothing_H.expand(*scores_BCL.shape[:-1], 1)
        weights = torch.cat([scores_BCL, nothing], dim=-1).softmax(-1)
        return weights[..., :-1] @ values_BLD + weights[..., -1:] * self.matching.nothing_HK

    def _search(self, scores: Tensor, user_state: UserState, candidates: Candidates) -> Tensor:
        """Which events each candidate attends to, bool B × C × L."""
        real = user_state.mask_BL[:, None]
        most = self.config.retrieved
        if self.config.search == "category":
            own = candidates.category_BCK[..., self.config.slot, None]
            like = (own == user_state.category_BL[:, None]) & real & (own > 0)
            # Events of the same category from here on, this one included
            newer = like.flip(-1).cumsum(-1).flip(-1)
            return like & (newer <= most)
        if scores.shape[-1] <= most:
            return real.expand_as(scores)
        hidden = scores.detach().masked_fill(~real, -torch.inf)
        least = hidden.topk(most, dim=-1).values[..., -1:]
        return (hidden >= least) & real


def plain_search(
    model: TwoStage, scores_L: Tensor, categories_L: Tensor, category: int
) -> list[int]:
    """The events that one candidate attends to, by plain search: the twin of `_search`."""
    if model.config.search == "category":
        like = [at for at, own in enumerate(categories_L.tolist()) if own == category and category]
        return like[-model.config.retrieved :]
    order = sorted(range(len(scores_L)), key=lambda at: -float(scores_L[at]))
    return sorted(order[: model.config.retrieved])
