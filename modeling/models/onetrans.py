"""OneTrans: one causal Transformer over behaviour tokens and feature tokens, with KV caches within
and across requests.

Source: Zhang et al., "OneTrans: Unified feature interaction and sequence modeling with one
Transformer in industrial recommender", arXiv 2510.26104 (v3): tokenisers (section 3.2), mixed
parameterisation and pyramid (3.3, 3.4), caches (3.5).

| paper | here |
|---|---|
| S tokens, L_S of them, merged from n sequences | events of `UserInputs`; a sequence is the events of one action |
| NS tokens, L_NS of them, Auto-Split or group-wise | `request_tokens` of the request, then `candidate_tokens` of each candidate |
| MixedMHA, MixedFFN: shared for S, own for each NS token | `MixedLayer` |
| pyramid: the tail of S emits queries | `tail_lengths`, each layer's input |
| stage I, once per request; stage II, per candidate | `encode_user`; `score` |
| cross-request cache | `extend_user`, `must_refresh` |

Differs, where the paper is silent or our choice (dated in modeling/README.md): request-level NS
tokens stand before candidate-level ones, so that their keys and values are computed once per
request too; W_O is shared unless asked for; behaviour tokens know their place from the oldest event
and the gap to the event before, never their distance from now, so that cached keys stay true; heads
read every final NS state, each normalised by itself. The depth of Auto-Split's network is not
stated: two layers and a GELU by default, one projection with `split_layers=1`. Numbers go through a
network together, where the paper cuts them into buckets (`numbers="buckets"`). Attention finds
events like the candidate (`layers/matching.py`; `matching=False` is the paper's): the item's row
goes past the tokenisers, beside an event's network and into a candidate's first NS token; what
stands beside it, places and the tokenisers' own rows, begins small; NS tokens may read nothing. An S token holds its
item's code, categories among it, and what the dataset declares of events; statistics and vectors of items are the
candidate's alone. There are as many sequences as declared actions, and none that is searched for a candidate.

**Tails that move by blocks.** A tail that slides with each new event drops keys that cached rows have read, and a
cache is then not what a new forward would give. Here a tail starts at a multiple of `tail_block` rows: it holds its
nominal number and up to a block more, and its start follows from the number of rows alone. So an extended cache is
what encoding anew gives, whichever process encodes; once in a block of events a start moves, which `must_refresh`
says. In training histories end anywhere, so that every length of a tail is known to the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.layers.embedding import sinusoids
from modeling.layers.features import Bags, FeatureTokens, Numbers
from modeling.layers.host import at_most, surely_all
from modeling.layers.interaction import TaskHeads
from modeling.layers.matching import Matching, begin_alike
from modeling.layers.per_token import MixedLinear, MixedRMSNorm, PerTokenLinear
from modeling.layers.stored_tokens import StoredTokens
from modeling.models.base import CannotExtendError, Ranker

# Rows; nominal tails are multiples of it
ROUND_TO = 32
# Twice that of other models: a head here is narrow, and a few of many rows are like a candidate by chance
SHARPNESS = 20.0
# What stands beside an item's row begins so much smaller than it could
BESIDE_ITEM = 0.1


@dataclass(frozen=True)
class Config:
    """Auto-Split, timestamp-aware and with a pyramid by default, as the paper's best.

    `request_tokens = 0` makes one Auto-Split of all features; every NS token is then a candidate's.
    """

    width: int = 64
    num_layers: int = 3
    num_heads: int = 4
    expansion: int = 4
    dropout: float = 0.0
    tokeniser: Literal["auto_split", "group_wise"] = "auto_split"
    # Tokens of auto_split; group_wise has one for each semantic group
    request_tokens: int = 4
    candidate_tokens: int = 4
    # Layers of auto_split's network
    split_layers: Literal[1, 2] = 2
    numbers: Numbers = "network"
    # Ours: the mean item of each sequence among the features
    pooled_sequences: bool = False
    merge: Literal["timestamp_aware", "timestamp_agnostic"] = "timestamp_aware"
    # Learned rows between the sequences of a timestamp-agnostic merge
    separators: bool = True
    pyramid: bool = True
    # Rows by which the start of a tail moves: more of them keep a state for more events, and cost more
    tail_block: int = 32
    # Each NS token has its own; False shares those of S
    own_weights: bool = True
    own_output: bool = False  # W_O too
    # Keys and queries of unit length (`layers/matching.py`); False: the paper's products
    matching: bool = True


@dataclass(frozen=True)
class UserState:
    """Keys and values of S and of the request's NS tokens in every layer, and what extension
    needs.
    """

    # num_layers × (B × H × (S_l + R) × K); the request's R rows stand last
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    # num_layers × (B × (S_l + R)), True where a row is real
    masks: tuple[Tensor, ...]
    # Final states of the request's NS tokens; with request_tokens 0 its features, as they are
    request_BRD: Tensor
    # Surely no padding in any row
    full: bool
    # Kept with pooled_sequences
    bags: Bags | None
    length_B: Tensor  # events so far
    # Events since the last full encoding
    added_B: Tensor


def tail_lengths(length: int, top: int, num_layers: int, pyramid: bool = True) -> tuple[int, ...]:
    """S rows in each layer's input: `length` falling linearly to `top`, rounded to 32 (arXiv
    2510.26104, section 3.4).
    """
    if not pyramid:
        return (length,) * num_layers

    def rounded(layer: int) -> int:
        exact = length + (top - length) * layer / num_layers
        return min(length, max(top, ROUND_TO * round(exact / ROUND_TO)))

    return (length, *(rounded(layer) for layer in range(1, num_layers)))


class MixedLayer(nn.Module):
    """Pre-norm block; S rows share weights, each NS token has its own (arXiv 2510.26104, section
    3.3).
    """

    def __init__(self, config: Config, num_ns: int) -> None:
        super().__init__()
        width = config.width
        own = num_ns if config.own_weights else 0
        self.num_heads = config.num_heads
        self.norm = MixedRMSNorm(width, own)
        self.norm_out = MixedRMSNorm(width, own)
        self.query = MixedLinear(width, width, own)
        self.key_value = MixedLinear(width, 2 * width, own)
        self.out = MixedLinear(width, width, own if config.own_output else 0)
        self.matching = Matching(
            config.num_heads,
            width // config.num_heads,
            sharpness=SHARPNESS,
            plain=not config.matching,
        )
        if config.matching:
            self._begin_alike(width)
        self.up = MixedLinear(width, config.expansion * width, own)
        self.down = MixedLinear(config.expansion * width, width, own)
        self.dropout = nn.Dropout(config.dropout)

    def _begin_alike(self, width: int) -> None:
        """Let every map of queries and of keys, shared or a token's own, begin as one."""
        begin_alike(self.query.shared.weight, self.key_value.shared.weight[:width])
        if self.query.own is not None and self.key_value.own is not None:
            with torch.no_grad():
                self.query.own.weight.copy_(self.query.shared.weight.T)
                self.key_value.own.weight[..., :width].copy_(self.query.shared.weight.T)

    def project(
        self, rows: Tensor, first: int | None = None, keep: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of B × … × D, each B × H × … × K.

        Args:
            first: see MixedLinear.
            keep: queries of so many last S rows only.
        """
        normed = self.norm(rows, first)
        asking = normed if keep is None else normed[:, normed.shape[1] - keep :]
        keys, values = self.key_value(normed, first).chunk(2, dim=-1)
        query = self.matching.queries(self._heads(self.query(asking, first)))
        return query, self.matching.keys(self._heads(keys)), self._heads(values)

    def finish(self, rows: Tensor, read: Tensor, first: int | None = None) -> Tensor:
        """Output projection, residuals and feed-forward; `read` is B × H × … × K."""
        rows = rows + self.dropout(self.out(read.movedim(1, -2).flatten(-2), first))
        hidden = gelu(self.up(self.norm_out(rows, first), first))
        return rows + self.dropout(self.down(hidden, first))

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).movedim(-2, 1)


class OneTrans(Ranker):
    """See the module docstring."""

    tails_n: Tensor

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        width = config.width
        if width % config.num_heads:
            raise ValueError(f"width {width} is no multiple of num_heads {config.num_heads}")
        self.features = FeatureTokens(
            sizes, width, bags=config.pooled_sequences, numbers=config.numbers
        )
        features = self.features
        self.request_nodes: nn.Module | None
        self.candidate_nodes: nn.Module
        if config.tokeniser == "auto_split":
            # A request without features has nothing to be split.
            self.num_request = config.request_tokens if features.num_request else 0
            self.num_candidate = config.candidate_tokens
            # Without request tokens, the candidate's network takes the request's features as well.
            alone = self.num_request == 0
            inputs = features.num_candidate + (features.num_request if alone else 0)
            self.request_nodes = (
                None
                if alone
                else AutoSplit(features.num_request, width, self.num_request, config.split_layers)
            )
            self.candidate_nodes = AutoSplit(inputs, width, self.num_candidate, config.split_layers)
        else:
            self.num_request = len(features.request_groups)
            self.num_candidate = len(features.candidate_groups)
            self.request_nodes = (
                GroupWise(features.request_groups, width) if self.num_request else None
            )
            self.candidate_nodes = GroupWise(features.candidate_groups, width)
        self.num_ns = self.num_request + self.num_candidate
        # One network for each behaviour sequence, shared by its events.
        self.event_up = PerTokenLinear(
            sizes.actions, width + features.events.size + 1, width, bias=True
        )
        self.event_down = PerTokenLinear(sizes.actions, width, width, bias=True)
        self.sequence_type = nn.Embedding(sizes.actions, width)
        self.place_size = nn.Parameter(torch.tensor(BESIDE_ITEM))
        self.separator = (
            nn.Embedding(max(sizes.actions - 1, 1), width) if self._has_separators else None
        )
        self.stored = StoredTokens(sizes, width) if sizes.tokens[0] else None
        self.register_buffer("tails_n", torch.tensor(self.tails), persistent=False)
        self.layers = nn.ModuleList(
            MixedLayer(config, self.num_ns) for _ in range(config.num_layers)
        )
        self.final_norm = MixedRMSNorm(width, self.num_ns)
        self.heads = TaskHeads(
            self.num_request * width,
            self.num_candidate * width,
            2 * width,
            sizes.tasks,
            config.dropout,
        )
        for table in (self.sequence_type, self.separator):
            if table is not None:
                nn.init.normal_(table.weight, std=0.05)
        if config.matching:
            self.event_down.shrink(BESIDE_ITEM)
            self.candidate_nodes.shrink_first(BESIDE_ITEM)

    @property
    def can_extend(self) -> bool:
        """New events stand last in a timestamp-aware merge only."""
        return self.config.merge == "timestamp_aware"

    @property
    def tails(self) -> tuple[int, ...]:
        """S rows of each layer's input, at least, where there are as many."""
        length = self.sizes.history_length + (self.sizes.actions - 1 if self._has_separators else 0)
        length += self.sizes.tokens[0]
        return tail_lengths(
            length, min(self.num_ns, length), self.config.num_layers, self.config.pyramid
        )

    def starts(self, rows_B: Tensor) -> Tensor:
        """The first S row of each layer's input, B × n: a multiple of `tail_block`.

        Args:
            rows_B: S rows of each user.
        """
        beyond = (rows_B[:, None] - self.tails_n).clamp(min=0)
        block = self.config.tail_block
        return beyond.div(block, rounding_mode="floor") * block

    def encode_user(self, user: UserInputs) -> UserState:
        """Stage I: every S row and the request's NS tokens through all layers."""
        rows, mask = self._sequence(user)
        # Rows stand on the right; a place counts from the user's oldest.
        number_B = mask.sum(1)
        starts_Bn = self.starts(number_B)
        place_BL = torch.arange(mask.shape[1], device=mask.device) - (
            mask.shape[1] - number_B[:, None]
        )
        cache = []
        for number, layer in enumerate(self.layers):
            last = number + 1 == len(self.layers)
            # Queries only of rows that the next layer keeps; of the last layer only keys are read.
            keep = 0
            if not last:
                beyond = self.tails[number + 1] + self.config.tail_block - 1
                kept_B = number_B - starts_Bn[:, number + 1]
                keep = max(at_most(kept_B, min(rows.shape[1], beyond)), 1)
            query, keys, values = layer.project(rows, None, keep)  # type: ignore[operator]
            cache.append((keys, values, mask))
            if not last:
                read = scaled_dot_product_attention(
                    query, keys, values, attn_mask=_causal(mask, keep), scale=1.0
                )
                rows = layer.finish(rows[:, -keep:], read)  # type: ignore[operator]
                mask = mask[:, -keep:] & (place_BL[:, -keep:] >= starts_Bn[:, number + 1, None])
        length = user.mask_BL.sum(1)
        full = surely_all(user.mask_BL)
        bags = self.features.bag(user) if self.config.pooled_sequences else None
        return self._with_request(cache, user, bags, length, torch.zeros_like(length), full)

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """Only the new events' rows, against cached keys and values; exact while no tail's start has moved.

        The request's features are those of `new_events`.
        """
        if not self.can_extend:
            raise CannotExtendError(
                "a timestamp-agnostic merge puts new events between old ones, which changes every row after them. Encode the user again"
            )
        new = new_events.mask_BL
        request = self.num_request
        # 1. Rows of the new events, whose places go on from the user's oldest event.
        rows = self._embed(new_events, user_state.length_B)
        # 2. Every layer: the cached keys and values, then those of the new rows.
        cache = []
        for number, layer in enumerate(self.layers):
            # The cache ends in rows of the previous request's NS tokens, which are dropped.
            old = slice(0, user_state.keys[number].shape[2] - request)
            query, keys, values = layer.project(rows)  # type: ignore[operator]
            keys = torch.cat([user_state.keys[number][:, :, old], keys], dim=2)
            values = torch.cat([user_state.values[number][:, :, old], values], dim=2)
            mask = torch.cat([user_state.masks[number][:, old], new], dim=1)
            cache.append((keys, values, mask))
            if number + 1 < len(self.layers) and rows.shape[1]:
                read = scaled_dot_product_attention(
                    query, keys, values, attn_mask=_causal(mask, rows.shape[1]), scale=1.0
                )
                rows = layer.finish(rows, read)  # type: ignore[operator]
        # 3. The NS tokens of the new request, behind the extended cache.
        added = new.sum(1)
        bags = user_state.bags
        bags = None if bags is None else self.features.bag(new_events, bags)
        full = user_state.full and surely_all(new)
        return self._with_request(
            cache, new_events, bags, user_state.length_B + added, user_state.added_B + added, full
        )

    def must_refresh(self, user_state: UserState) -> Tensor:
        """Users, bool B, with a tail whose start has moved since they were encoded."""
        now = user_state.length_B + self.sizes.tokens[0]
        return (self.starts(now) != self.starts(now - user_state.added_B)).any(1)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Stage II: each candidate's NS tokens against the cache; candidates never see one another.
        logits_BCT.
        """
        request = user_state.request_BRD if self.num_request == 0 else None
        rows = self._candidate_tokens(candidates, request)
        rows = self._through(rows, user_state, self.num_request)
        final = self.final_norm(rows, self.num_request).flatten(2)
        request = (
            self.final_norm(user_state.request_BRD, 0).flatten(1) if self.num_request else None
        )
        logits: Tensor = self.heads(request, final)
        return logits

    def _candidate_tokens(self, candidates: Candidates, request_BRD: Tensor | None) -> Tensor:
        """NS tokens of each candidate, B × C × N × D. The item's row goes past the network, into the first one.

        Args:
            request_BRD: features of the request, where it has no token of its own.
        """
        features = self.features.candidates(candidates)
        item = features[:, :, 0]
        if request_BRD is not None:
            before = request_BRD[:, None].expand(-1, features.shape[1], -1, -1)
            features = torch.cat([before, features], dim=2)
        first, *others = self.candidate_nodes(features).unbind(2)
        return torch.stack([first + item, *others], dim=2)

    def forward_plain(self, batch: Batch, starts_Bn: Tensor | None = None) -> Tensor:
        """The plain twin: for every candidate one forward over [S; NS], tails as masks on full
        attention. Slow.

        Args:
            starts_Bn: first S row of each layer's input by user, as an absolute place in the
                history; default: where a full encoding puts them.
        """
        user = batch.user
        found = []
        # 1. S rows, and the place of each counted from the oldest real row; padding is negative.
        rows_S, mask_S = self._sequence(user)
        length = rows_S.shape[1]
        place = torch.arange(length, device=rows_S.device) - (length - mask_S.sum(1, keepdim=True))
        if starts_Bn is None:
            starts_Bn = self.starts(mask_S.sum(1))
        # One candidate at a time, so that no candidate can read another.
        for index in range(batch.candidates.item_BC.shape[1]):
            one = batch.candidates.select(slice(index, index + 1))
            # 2. NS tokens: those of the request stand before those of the candidate.
            request = self.features.request(user)
            if self.request_nodes is None:
                nodes = self._candidate_tokens(one, request)[:, 0]
            else:
                own = self._candidate_tokens(one, None)[:, 0]
                nodes = torch.cat([self.request_nodes(request), own], dim=1)
            # 3. All layers over every row; what a tail leaves out is masked, not cut.
            rows = torch.cat([rows_S, nodes], dim=1)
            for number, layer in enumerate(self.layers):
                inside = mask_S & (place >= starts_Bn[:, number : number + 1])
                real = torch.cat([inside, torch.ones_like(nodes[..., 0], dtype=torch.bool)], dim=1)
                parts = [
                    layer.project(rows[:, :length], None),  # type: ignore[operator]
                    layer.project(rows[:, length:], 0),  # type: ignore[operator]
                ]
                query, keys, values = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
                read = _read_plain(layer.matching, query, keys, values, real, length)  # type: ignore[arg-type]
                rows = torch.cat(
                    [
                        layer.finish(rows[:, :length], read[:, :, :length]),  # type: ignore[operator]
                        layer.finish(rows[:, length:], read[:, :, length:], 0),  # type: ignore[operator]
                    ],
                    dim=1,
                )
            # 4. The heads read the final NS states alone.
            final = self.final_norm(rows[:, length:], 0)
            request_final = final[:, : self.num_request].flatten(1) if self.num_request else None
            found.append(self.heads(request_final, final[:, None, self.num_request :].flatten(2)))
        return torch.cat(found, dim=1)

    @property
    def _has_separators(self) -> bool:
        return (
            self.config.merge == "timestamp_agnostic"
            and self.config.separators
            and self.sizes.actions > 1
        )

    def _with_request(
        self,
        cache: list[tuple[Tensor, Tensor, Tensor]],
        user: UserInputs,
        bags: Bags | None,
        length_B: Tensor,
        added_B: Tensor,
        full: bool,
    ) -> UserState:
        """The state: the S cache with the request's NS tokens behind it."""
        keys, values, masks = (tuple(kind) for kind in zip(*cache, strict=True))
        tokens = self.features.request(user, bags)
        # The NS tokens read the S cache, so the state first holds that cache alone.
        state = UserState(keys, values, masks, tokens, full, bags, length_B, added_B)
        if self.request_nodes is None:
            # `score` joins them with each candidate's
            return state
        own: list[tuple[Tensor, Tensor]] = []
        rows = self._through(self.request_nodes(tokens)[:, None], state, 0, own)[:, 0]
        real = torch.ones_like(rows[..., 0], dtype=torch.bool)
        return replace(
            state,
            keys=tuple(
                torch.cat([old, new[:, :, 0]], dim=2)
                for old, (new, _) in zip(keys, own, strict=True)
            ),
            values=tuple(
                torch.cat([old, new[:, :, 0]], dim=2)
                for old, (_, new) in zip(values, own, strict=True)
            ),
            masks=tuple(torch.cat([mask, real], dim=1) for mask in masks),
            request_BRD=rows,
        )

    def _through(
        self,
        rows: Tensor,
        state: UserState,
        first: int,
        own: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """NS rows, B × C × N × D, through all layers against what is cached; `own` collects their
        keys and values.
        """
        for number, layer in enumerate(self.layers):
            query, own_keys, own_values = layer.project(rows, first)  # type: ignore[operator]
            mask = None if state.full else state.masks[number]
            read = layer.matching.read(  # type: ignore[union-attr, operator]
                query, state.keys[number], state.values[number], mask, own_keys, own_values
            )
            rows = layer.finish(rows, read, first)  # type: ignore[operator]
            if own is not None:
                own.append((own_keys, own_values))
        return rows

    def _sequence(self, user: UserInputs) -> tuple[Tensor, Tensor]:
        """S tokens, merged and padded on the left, so that tails are slices; and where they are
        real.
        """
        rows = self._embed(user, user.mask_BL.new_zeros(len(user.mask_BL), dtype=torch.long))
        mask = user.mask_BL
        if self.config.merge == "timestamp_agnostic":
            # Sort keys: events of sequence a get 2a, the separator behind them 2a + 1.
            kind = torch.where(mask, user.action_BL * 2, 2 * self.sizes.actions)
            if self.separator is not None:
                between = self.separator.weight[None].expand(len(rows), -1, -1)
                rows = torch.cat([rows, between], dim=1)
                mask = torch.cat([mask, torch.ones_like(between[..., 0], dtype=torch.bool)], dim=1)
                after = 2 * torch.arange(between.shape[1], device=mask.device) + 1
                kind = torch.cat([kind, after.expand(len(rows), -1)], dim=1)
        else:
            kind = (~mask).long()
        # First: more history, already summarised
        if self.stored is not None:
            tokens = self.stored(user)
            real = torch.ones_like(tokens[..., 0], dtype=torch.bool)
            rows = torch.cat([tokens, rows], dim=1)
            mask = torch.cat([real, mask], dim=1)
            kind = torch.cat([torch.zeros_like(real, dtype=torch.long), kind + 1], dim=1)
        # Padding first, the rest in its order
        order = torch.where(mask, kind, -1).argsort(dim=1, stable=True)
        return rows.gather(1, order[..., None].expand_as(rows)), mask.gather(1, order)

    def _embed(self, user: UserInputs, before_B: Tensor) -> Tensor:
        """Event tokens in the order of time, B × L × D. `before_B` events of each user came before
        these.
        """
        items = self.features.item(user.item_BL)
        numbers = torch.cat([items, self.features.events(user), user.gap_BL[..., None]], dim=-1)
        # Each event goes through its own sequence's network alone, however many there are.
        which = user.action_BL
        event = self.event_down.chosen(gelu(self.event_up.chosen(numbers, which)), which)
        index = before_B[:, None] + torch.arange(event.shape[1], device=event.device)
        place = self.place_size * sinusoids(index, self.config.width)
        return event + items + self.sequence_type(user.action_BL) + place


class AutoSplit(nn.Module):
    """All features through one network, split into tokens (arXiv 2510.26104, section 3.2).

    Args:
        layers: 1: a matrix product; 2: another one before it, as wide as the tokens together, and a
            GELU between them.
    """

    def __init__(self, num_features: int, width: int, num_tokens: int, layers: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        out = num_tokens * width
        network = nn.Sequential()
        if layers == 2:
            network.extend([nn.Linear(num_features * width, out), nn.GELU(), nn.Linear(out, out)])
        else:
            network.append(nn.Linear(num_features * width, out))
        self.network = network

    def forward(self, features: Tensor) -> Tensor:
        """… × features × D → … × tokens × D."""
        tokens: Tensor = self.network(features.flatten(-2)).unflatten(-1, (self.num_tokens, -1))
        return tokens

    def shrink_first(self, size: float) -> None:
        """Multiply the first token by a number."""
        last = self.network[-1]
        with torch.no_grad():
            for parameter in last.parameters():
                parameter[: len(parameter) // self.num_tokens].mul_(size)


class GroupWise(nn.Module):
    """A network and a token for each semantic group of features (arXiv 2510.26104, section 3.2)."""

    def __init__(self, groups: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.groups = groups
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(size * width, width), nn.GELU(), nn.Linear(width, width))
            for size in groups
        )

    def forward(self, features: Tensor) -> Tensor:
        """… × features × D → … × groups × D."""
        parts = features.split(self.groups, dim=-2)
        return torch.stack(
            [network(part.flatten(-2)) for network, part in zip(self.networks, parts, strict=True)],
            dim=-2,
        )

    def shrink_first(self, size: float) -> None:
        """Multiply the first token by a number."""
        last = self.networks[0][-1]  # type: ignore[index]
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(size)


def _read_plain(
    matching: Matching, query: Tensor, keys: Tensor, values: Tensor, real: Tensor, length: int
) -> Tensor:
    """Attention of all rows over all rows up to themselves; those from `length` on, NS tokens, over nothing too."""
    seen = _causal(real, query.shape[2])
    hidden = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)
    hidden = hidden.expand(-1, query.shape[1], -1, -1)
    if matching.plain:
        return scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=1.0)
    nothing = torch.full_like(hidden[..., :1], -torch.inf)
    nothing[:, :, length:] = matching.nothing_H[:, None, None]
    keys = torch.cat([keys, torch.zeros_like(keys[:, :, :1])], dim=2)
    none = matching.nothing_HK[None, :, None].expand(len(values), -1, -1, -1)
    return scaled_dot_product_attention(
        query,
        keys,
        torch.cat([values, none], dim=2),
        attn_mask=torch.cat([hidden, nothing], dim=-1),
        scale=1.0,
    )


def _causal(mask: Tensor, number: int) -> Tensor:
    """Return a mask of what the last `number` rows may read, B × 1 × number × L: real rows up to themselves; padding
    reads itself.
    """
    length = mask.shape[1]
    row = torch.arange(length - number, length, device=mask.device)[:, None]
    key = torch.arange(length, device=mask.device)
    return (((key <= row) & mask[:, None]) | (key == row))[:, None]
