"""A reader of the history for models that encode no sequence: an encoded state once per request,
one token a candidate.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from modeling.inputs.batch import UserInputs
from modeling.layers.attention import HistoryAttentionLayer
from modeling.layers.embedding import sinusoids
from modeling.layers.target_attention import TargetAttention

History = Literal["bags", "din", "transformer"]


class HistoryReader(nn.Module):
    """Reads events for candidates.

    Args:
        actions: how many there are.
        event_size: numbers that an event carries beside item, action and time.
        kind: "din": target attention; "transformer": encoded by bidirectional layers, then read by
            attention.
        matching: see `matching.py`.
    """

    def __init__(
        self,
        width: int,
        actions: int,
        event_size: int,
        kind: Literal["din", "transformer"],
        hidden: int,
        *,
        matching: bool = True,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.action = nn.Embedding(actions, width)
        self.numbers = nn.Linear(event_size + 1, width)
        nn.init.normal_(self.action.weight, std=0.05)
        if kind == "din":
            self.attention = TargetAttention(width, hidden, matching=matching)
        else:
            self.layers = nn.ModuleList(
                HistoryAttentionLayer(width, 4, 0.0, matching=matching) for _ in range(2)
            )

    def prepare(self, user: UserInputs, items_BLD: Tensor, events_BLN: Tensor) -> Any:
        """The history's half, once per request.

        Args:
            items_BLD: its items as candidates are embedded.
            events_BLN: what events carry (`layers/features.py`).
        """
        action = one_hot(user.action_BL, self.action.num_embeddings).to(items_BLD.dtype)
        inputs = torch.cat([events_BLN, user.age_BL[..., None], action], dim=-1)
        weight = torch.cat([self.numbers.weight.T, self.action.weight + self.numbers.bias])
        # A sum of embeddings, in one pass
        with torch.autocast(items_BLD.device.type, enabled=False):
            rows = torch.addmm(items_BLD.flatten(0, 1), inputs.flatten(0, 1), weight).view_as(
                items_BLD
            )
        if self.kind == "din":
            return rows, items_BLD, user.mask_BL
        index = user.mask_BL.sum(1, keepdim=True) - torch.arange(rows.shape[1], device=rows.device)
        rows = rows + sinusoids(index.clamp(min=0), rows.shape[-1])
        mask = user.mask_BL[:, None]
        encode, read = self.layers
        rows = encode(rows, *encode.keys_values(rows), mask)  # type: ignore[operator]
        return (*read.keys_values(rows), user.mask_BL)  # type: ignore[operator]

    def forward(self, prepared: Any, candidate_BCD: Tensor) -> Tensor:
        """Read the history for each candidate, B × C × D."""
        if self.kind == "din":
            read: Tensor = self.attention(*prepared, candidate_BCD)
            return read
        rows: Tensor = self.layers[1].read(candidate_BCD, *prepared)  # type: ignore[operator]
        return rows


def with_read(tokens_BCND: Tensor, reader: HistoryReader | None, prepared: Any) -> Tensor:
    """Candidate tokens, the item's first, and behind them what the candidate reads where there is a
    reader.
    """
    if reader is None:
        return tokens_BCND
    return torch.cat([tokens_BCND, reader(prepared, tokens_BCND[:, :, 0])[:, :, None]], dim=2)
