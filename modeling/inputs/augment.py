"""What training alone makes of requests: a sample that scales come from, batches in which something is
missing, so that a model learns what to make of that when it is served, and encoders that withhold inputs,
for comparisons.

Serving uses nothing of this: it encodes what there is (`encoder.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from feature_repo.contract.contract import Contract
from feature_repo.history.transforms import (
    EMPTY_SKETCH,
    OF_ITEM_STATS,
    USER_FEATURES,
    WITHOUT_EVENTS,
)
from modeling.inputs.batch import Batch, TrainingSample
from modeling.inputs.columns import ColumnGroup, Index
from modeling.inputs.encoder import Encoded, Encoder, events_of
from modeling.inputs.relations import Relations
from modeling.inputs.shards import Rows

# How often a positive is made unknown in training, for each negative
UNKNOWN_PRIOR = 0.5
# Share of a training step's requests that forget what is known of impressions alone
SHOWN_FORGOTTEN = 0.25
# The same of the context, which a caller may leave out
CONTEXT_FORGOTTEN = 0.05
# The same of the sketch, which a store may have lost
SKETCH_FORGOTTEN = 0.05
# Candidates whose numbers decide how all are scaled
SAMPLED_ROWS = 1 << 18
# Inputs that a comparison may withhold
ABLATED = ("matches", "all but own counts", "user")


def training_sample(encoder: Encoder, train: Encoded) -> TrainingSample:
    """Return the sample that a model takes its scales from."""
    events = events_of(train.gather, len(train), encoder.contract.spec.num_history_online)
    return TrainingSample(
        torch.from_numpy(spread_rows(train.candidate_dense, SAMPLED_ROWS)),
        torch.from_numpy(spread_rows(train.dense_BG, SAMPLED_ROWS)),
        torch.from_numpy(encoder.event.event_dense(events.columns, events.times)),
        torch.from_numpy(_item_categories(encoder, train)),
    )


def _item_categories(encoder: Encoder, train: Encoded) -> np.ndarray:
    """Category slots of each item, as the last training example with it has them."""
    width = encoder.own_item.sizes.num_slots
    found = np.zeros((encoder.items.size, width), np.int64)
    for start in range(0, len(train.candidate_item), SAMPLED_ROWS):
        rows = slice(start, start + SAMPLED_ROWS)
        found[train.candidate_item[rows]] = train.candidate_category[rows][:, :width]
    # An unknown item has no categories either
    found[0] = 0
    return found


def spread_rows(rows: Rows, most: int) -> np.ndarray:
    """At most so many rows, spread evenly: all of a few."""
    return rows[:: -(-len(rows) // most) or 1]


def unknown_dense(encoder: Encoder) -> np.ndarray:
    """Return dense features of an unknown item: no statistics, and no event of the user's with it."""
    of_item = 1 + len(encoder.contract.spec.memory.half_lives_days)
    known = WITHOUT_EVENTS | dict.fromkeys(encoder.between.sketch_names[:of_item], EMPTY_SKETCH)
    return np.array([known.get(name, np.nan) for name in encoder.dense_names], np.float32)


def unknown_candidates(encoder: Encoder, encoded: Encoded) -> Encoded:
    """Return the same requests, each with one unknown candidate."""
    number = len(encoded)
    return replace(
        encoded,
        candidate_offsets=np.arange(number + 1),
        candidate_item=np.zeros(number, np.int64),
        candidate_category=np.zeros((number, encoded.candidate_category.shape[1]), np.int32),
        candidate_dense=np.tile(unknown_dense(encoder), (number, 1)),
        labels=np.zeros((number, encoded.labels.shape[1]), np.float32),
    )


def hide(encoder: Encoder, batch: Batch, share: float, rng: np.random.Generator) -> Batch:
    """Return a batch in which a share of the candidates is unknown, and as large a share has lost its
    statistics alone.

    What is missing at request time, such as an item that is new or a store that was emptied, is
    thereby seen in training, and is scored by a prior: positives become unknown half as often
    as negatives (`UNKNOWN_PRIOR`), so that an unknown item ranks below the average candidate.
    """
    candidates = batch.candidates
    device = candidates.item_BC.device
    shape = tuple(candidates.item_BC.shape)
    draw = torch.from_numpy(rng.random(shape, np.float32)).to(device)
    positive = (batch.labels_BCT > 0).any(-1)
    chance = torch.where(positive, share * UNKNOWN_PRIOR, share)
    unknown = draw < chance
    bare = draw > 1 - share
    of_item = [*encoder.stat_columns, *OF_ITEM_STATS]
    column = torch.tensor([name in of_item for name in encoder.dense_names], device=device)
    nothing = torch.from_numpy(unknown_dense(encoder)).to(device)
    dense = candidates.dense_BCF.masked_fill(bare[..., None] & column, torch.nan)
    hidden = replace(
        candidates,
        item_BC=candidates.item_BC.masked_fill(unknown, 0),
        category_BCK=candidates.category_BCK.masked_fill(unknown[..., None], 0),
        dense_BCF=torch.where(unknown[..., None], nothing, dense),
    )
    return replace(batch, candidates=hidden)


def forget(encoder: Encoder, batch: Batch, rng: np.random.Generator) -> Batch:
    """Return a batch in which a share of the requests has lost what a served one may lack: all that is
    known of impressions, such as positions, which no served request has; the context; the sketch.
    """
    spec = encoder.contract.spec
    number = len(batch.labels_BCT)
    user = batch.user
    candidates = batch.candidates
    device = candidates.item_BC.device

    def drawn(share: float) -> Tensor:
        return torch.from_numpy(rng.random(number) < share).to(device)[:, None]

    # 1. The sketch: numbers of candidates.
    of_sketch = torch.tensor([name in encoder.between.sketch_names for name in encoder.dense_names])
    unread = drawn(SKETCH_FORGOTTEN)[..., None] & of_sketch.to(device)
    candidates = replace(candidates, dense_BCF=candidates.dense_BCF.masked_fill(unread, torch.nan))
    # 2. Features of impressions: columns of candidates.
    if spec.shown_features:
        forgotten = drawn(SHOWN_FORGOTTEN)[..., None]
        names = {c.name for c in spec.shown_features}
        before = len(encoder.dense_names) - len(encoder.candidate.dense_names)
        slots, dense = _columns_named(encoder.candidate, names, before)
        candidates = replace(
            candidates,
            category_BCK=candidates.category_BCK.masked_fill(forgotten & slots.to(device), 0),
            dense_BCF=candidates.dense_BCF.masked_fill(forgotten & dense.to(device), torch.nan),
        )
    # 3. The context: columns of requests. The categories of the request's time stand behind those of
    # columns, and are kept.
    if spec.context_features:
        forgotten = drawn(CONTEXT_FORGOTTEN)
        names = {c.name for c in spec.context_features}
        slots, dense = _columns_named(encoder.request, names, len(USER_FEATURES))
        slots = torch.nn.functional.pad(slots, (0, user.field_BU.shape[1] - len(slots)))
        user = replace(
            user,
            field_BU=user.field_BU.masked_fill(forgotten & slots.to(device), 0),
            dense_BG=user.dense_BG.masked_fill(forgotten & dense.to(device), torch.nan),
        )
    return replace(batch, user=user, candidates=candidates)


def _columns_named(group: ColumnGroup, names: set[str], before: int) -> tuple[Tensor, Tensor]:
    """Which category slots and which dense numbers of a group belong to these columns, bool.

    Args:
        before: dense numbers that stand before the group's own.
    """
    slots = [c.name in names for c in group.categorical for _ in range(c.slots)]
    dense = [name.split("[")[0] in names for name in group.dense_names]
    return torch.tensor(slots, dtype=torch.bool), torch.tensor([False] * before + dense)


@dataclass(frozen=True)
class Ablation:
    """Inputs that are withheld.

    Args:
        candidate_dense: which dense numbers of candidates, bool.
        user: whether all columns and statistics of users, and the context.
    """

    candidate_dense: np.ndarray
    user: bool


class AblatedEncoder(Encoder):
    """An encoder whose batches withhold inputs, to see what a model makes of the others.

    Args:
        ablated: "matches" between candidate and history, counts and relations included; "all but own counts": the same
            without the candidate's own counts; "user", all of users but their history.

    Example:
        >>> encoder = AblatedEncoder(contract, vocabularies, 128, ablated=("matches",))
        >>> bool(encoder.collate(encoded, chosen).candidates.dense_BCF[..., 10].isnan().all())
        True
    """

    def __init__(
        self,
        contract: Contract,
        vocabularies: dict[str, Index],
        history_length: int,
        tokens: tuple[int, int] = (0, 0),
        relations: Relations | None = None,
        ablated: tuple[str, ...] = (),
        history_block: int = 1,
    ) -> None:
        if unknown := set(ablated) - set(ABLATED):
            raise ValueError(f"no inputs {sorted(unknown)} to withhold; there are {ABLATED}")
        super().__init__(contract, vocabularies, history_length, tokens, relations, history_block)
        self.ablated = ablated

    @cached_property
    def ablation(self) -> Ablation:
        """The inputs that no batch shows."""
        between: set[str] = set()
        if {"matches", "all but own counts"} & set(self.ablated):
            between = set(self.between.names)
        if "all but own counts" in self.ablated:
            # Counts of the item, the fading ones, and the days since: what a plain counter knows.
            between -= set(
                self.between.sketch_names[: 2 + len(self.contract.spec.memory.half_lives_days)]
            )
        dense = np.array([name in between for name in self.dense_names])
        return Ablation(dense, "user" in self.ablated)

    def collate(self, encoded: Encoded, chosen: np.ndarray) -> Batch:
        """Pad the chosen requests into a batch, what is withheld missing."""
        batch = super().collate(encoded, chosen)
        user = batch.user
        candidates = batch.candidates
        column = torch.from_numpy(self.ablation.candidate_dense)
        dense = candidates.dense_BCF.masked_fill(column, torch.nan)
        if self.ablation.user:
            fields = user.field_BU.clone()
            # Behind them stand hour and weekday
            fields[:, : self.request.sizes.num_slots] = 0
            unknown = torch.full_like(user.dense_BG, torch.nan)
            user = replace(user, field_BU=fields, dense_BG=unknown)
        return replace(batch, user=user, candidates=replace(candidates, dense_BCF=dense))


def encoder_of(
    contract: Contract,
    vocabularies: dict[str, Index],
    history_length: int,
    tokens: tuple[int, int] = (0, 0),
    relations: Relations | None = None,
    ablated: tuple[str, ...] = (),
    history_block: int = 1,
) -> Encoder:
    """Return the encoder of a recipe, which withholds what the recipe says."""
    if not ablated:
        return Encoder(contract, vocabularies, history_length, tokens, relations, history_block)
    return AblatedEncoder(
        contract, vocabularies, history_length, tokens, relations, ablated, history_block
    )


def ablation_of(encoder: Encoder) -> Ablation:
    """Return the inputs that an encoder withholds."""
    if isinstance(encoder, AblatedEncoder):
        return encoder.ablation
    return Ablation(np.zeros(len(encoder.dense_names), bool), user=False)
