"""A long history in learned tokens, a few for each segment of it, trained end to end with the ranker.

Source: "Efficient sequential recommendation for long term user interest via personalization"
(PerSRec, arXiv 2601.03479).

| paper | here |
|---|---|
| segments of the long history | `segment` events each, counted from the oldest, so that a full one never changes |
| learnable tokens behind each segment, the same for all | `tokens`, K a segment; causal attention, so they read the whole segment |
| their outputs stand for the segment | what later rows read of it: `num_tokens` rows in place of `segment` |
| recent events, read as they are | the newest `recent` events |
| segment decoder and user decoder share parameters | `layers`, the same for both |

Differs: the paper predicts the next item, and here candidates are ranked: each reads the tokens and the
recent events layer by layer, as the amortised DLRM's candidates do, and what it read goes to the
baselines' cross layers. Its layers are HSTU's or an LLM's; these are pre-norm softmax layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeling.baselines import base, dcnv2
from modeling.inputs.batch import Candidates, FeatureSizes, UserInputs
from modeling.layers.attention import HistoryAttentionLayer, causal_mask
from modeling.layers.host import at_most
from modeling.layers.interaction import Interaction
from modeling.layers.reader import History


@dataclass(frozen=True)
class Config(dcnv2.Config):
    """Eight tokens for 128 events."""

    history: History = "bags"
    num_layers: int = 2
    num_heads: int = 2
    segment: int = 128
    num_tokens: int = 8  # K, of a segment
    recent: int = 100


@dataclass(frozen=True)
class UserState:
    """The request's tokens; of each layer, keys and values of the segments' tokens and recent events."""

    request_BRD: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask_BL: Tensor


class PerSRec(base.Baseline):
    """See the module docstring."""

    config: Config

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__(config, sizes)
        width = config.width
        self.action = nn.Embedding(sizes.actions, width)
        # A segment knows the gaps between its events, which no later request changes; recent events
        # know how long ago they were.
        self.segment_numbers = nn.Linear(self.features.events.size + 1, width)
        self.recent_numbers = nn.Linear(self.features.events.size + 1, width)
        self.tokens = nn.Parameter(torch.randn(config.num_tokens, width) * 0.5)
        self.layers = nn.ModuleList(
            HistoryAttentionLayer(width, config.num_heads, config.dropout, matching=config.matching)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        return dcnv2.CrossAndDeep(request, candidate + 1, self.config)

    def encode_user(self, user: UserInputs) -> UserState:  # type: ignore[override]
        """Each segment's tokens, then keys and values of them and of the recent events."""
        items = self.features.item(user.item_BL)
        number = user.mask_BL.sum(1, keepdim=True)
        older = (number - self.config.recent).clamp(min=0)
        most = user.mask_BL.shape[1]
        at = torch.arange(min(self.config.recent, most), device=number.device)
        index = (older + at).clamp(max=most - 1)
        is_recent = at < number - older
        of_segments = self._events(user, items, user.gap_BL, self.segment_numbers)
        tokens, some = self._segments(of_segments, older)
        of_recent = self._events(user, items, user.age_BL, self.recent_numbers)
        of_recent = of_recent.gather(1, index[..., None].expand(-1, -1, of_recent.shape[-1]))
        rows = torch.cat([tokens, of_recent], dim=1)
        mask = torch.cat([some, is_recent], dim=1)
        keys, values, _ = self._through(rows, mask)
        request = self.features.request(user, items_BLD=items)
        return UserState(request, keys, values, mask)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:  # type: ignore[override]
        """Each candidate reads tokens and recent events. logits_BCT."""
        tokens = self.features.candidates(candidates)
        rows = tokens[:, :, 0]
        for layer, keys, values in zip(
            self.layers, user_state.keys, user_state.values, strict=True
        ):
            rows = layer.read(rows, keys, values, user_state.mask_BL)  # type: ignore[operator]
        tokens = torch.cat([tokens, self.norm(rows)[:, :, None]], dim=2)
        logits: Tensor = self.heads(*self.interaction(user_state.request_BRD, tokens))
        return logits

    def _events(
        self, user: UserInputs, items_BLD: Tensor, time_BL: Tensor, numbers: nn.Linear
    ) -> Tensor:
        carried = torch.cat([self.features.events(user), time_BL[..., None]], dim=-1)
        found: Tensor = items_BLD + self.action(user.action_BL) + numbers(carried)
        return found

    def _segments(self, rows_BLD: Tensor, older_B1: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of every segment of the older events, side by side, and which of them there are.

        Args:
            older_B1: how many events of each user are older than the recent ones.
        """
        segment = self.config.segment
        kept = self.config.num_tokens
        number = -(-at_most(older_B1, rows_BLD.shape[1]) // segment)
        batch = len(rows_BLD)
        width = rows_BLD.shape[-1]
        if not number:
            return rows_BLD[:, :0], torch.zeros(batch, 0, dtype=torch.bool, device=rows_BLD.device)
        at = torch.arange(number * segment, device=rows_BLD.device)
        index = at.clamp(max=rows_BLD.shape[1] - 1)
        events = rows_BLD[:, index].unflatten(1, (number, segment)).flatten(0, 1)
        real = (at < older_B1).unflatten(1, (number, segment))
        rows = torch.cat([events, self.tokens.expand(len(events), -1, -1)], dim=1)
        is_token = torch.ones(len(events), kept, dtype=torch.bool, device=rows.device)
        mask = torch.cat([real.flatten(0, 1), is_token], dim=1)
        _, _, read = self._through(rows, mask, last=True)
        some = real.any(-1).repeat_interleave(kept, dim=1)
        return read[:, segment:].reshape(batch, number * kept, width), some

    def _through(
        self, rows: Tensor, mask: Tensor, *, last: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Keys and values of every layer, and the rows behind the layers.

        Args:
            last: whether the last layer's rows are wanted too; nothing but its keys and values is
                read of it otherwise.
        """
        visible = causal_mask(mask, rows.shape[1])
        all_keys = []
        all_values = []
        for number, layer in enumerate(self.layers):
            keys, values = layer.keys_values(rows)  # type: ignore[operator]
            all_keys.append(keys)
            all_values.append(values)
            if last or number + 1 < len(self.layers):
                rows = layer(rows, keys, values, visible)
        return tuple(all_keys), tuple(all_values), rows
