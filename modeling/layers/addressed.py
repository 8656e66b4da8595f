"""A memory of slots that items address: each event is added to the slots that its item names, and a
candidate reads the slots that it names itself.

Ours. Linear attention (quasi_linear.py) adds every event to one matrix, and softmax over events
needs them all. Here the softmax is over slots (as in slot attention, Locatello et al., arXiv
2006.15055, where slots compete for inputs), so that an event goes where its like went, and what is
stored stays a sum:

    x_i = Σ_k m_k · part_k / |part_k|            code of an item: its own row, and its categories'
    a_i = softmax(τ · x_i · keys)                 address, over A slots
    total_{a,h} = Σ_i a_i · w_i · 2^(-age_i / h) · x_i      for each half-life h
    mass_{a,h}  = Σ_i a_i · |w_i| · 2^(-age_i / h)

Few items share a slot, so the product of a slot with a candidate's code comes near to how often, and
how lately, that very candidate was there: a count sketch whose hashing is learned. Ages are counted
back from the newest event, so nothing depends on "now", and new events are added exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from modeling.layers.codes import Items


class SlotStream(NamedTuple):
    """All that is kept of the events so far, as of the newest of them; float32."""

    total_BAHW: Tensor
    mass_BAH: Tensor


class SlotMemory(nn.Module):
    """Sums of codes by address and half-life.

    Args:
        num_slots: A; one slot is a mean pool that fades.
        half_lives_days: H of them; infinity keeps everything alike.
        sharpness: τ.
    """

    half_lives: Tensor

    def __init__(
        self,
        width: int,
        num_slots: int,
        half_lives_days: tuple[float, ...],
        actions: int,
        event_size: int,
        sharpness: float,
    ) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.keys = nn.Parameter(torch.randn(num_slots, width) * 0.3)
        # Weight of an event, by its action
        self.action = nn.Parameter(torch.ones(actions))
        self.gate = nn.Linear(event_size, 1, bias=False) if event_size else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
        self.half_lives_days = half_lives_days
        self.register_buffer("half_lives", torch.tensor(half_lives_days), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """A, H."""
        return len(self.keys), len(self.half_lives)

    def address(self, codes: Tensor) -> Tensor:
        """Softmax over slots, … × A."""
        return (self.sharpness * codes @ self.keys.T).softmax(-1)

    def start(self, batch: int) -> SlotStream:
        total = self.keys.new_zeros(batch, *self.shape, self.keys.shape[1], dtype=torch.float32)
        return SlotStream(total, total[..., 0])

    def advance(
        self,
        stream: SlotStream,
        items: Items,
        action_BL: Tensor,
        events_BLN: Tensor,
        gap_days_BL: Tensor,
        mask_BL: Tensor,
    ) -> SlotStream:
        """Add the next events of each user.

        Args:
            items: of the events.
            gap_days_BL: days since the event before; of the first one since the newest in `stream`.
        """
        device = items.codes_UW.device.type
        # Sums of a million events want float32
        with torch.autocast(device, enabled=False):
            codes = items.codes_UW.float()
            gaps = gap_days_BL.float() * mask_BL
            weight = self.action.float()[action_BL] * mask_BL
            if self.gate is not None:
                weight = weight * 2 * self.gate(events_BLN.float())[..., 0].sigmoid()
            whole = gaps.sum(1, keepdim=True)
            age = whole - gaps.cumsum(1)
            # An item's address and code are the same in all of its events.
            address = self.address(codes)
            code = codes
            of_event = embedding(items.which_BL, torch.cat([address, code], dim=1))
            address_BLA, code_BLW = of_event.split([address.shape[1], code.shape[1]], dim=-1)
            totals = []
            masses = []
            for half_life in self.half_lives_days:
                faded = weight * torch.exp2(-age / half_life)
                totals.append((address_BLA * faded[..., None]).transpose(1, 2) @ code_BLW)
                masses.append((faded.abs()[:, None] @ address_BLA)[:, 0])
            before = torch.exp2(-whole / self.half_lives)[:, None]  # B × 1 × H
            return SlotStream(
                stream.total_BAHW * before[..., None] + torch.stack(totals, dim=2),
                stream.mass_BAH * before + torch.stack(masses, dim=2),
            )


class PairStream(NamedTuple):
    """The pairs of consecutive events so far, and the newest event, which the next one follows."""

    total_BFW: Tensor
    mass_BF: Tensor
    last_BW: Tensor  # its code
    # 1 where there is one
    some_B: Tensor


class PairMemory(nn.Module):
    """Sums of codes by the address of the event before: what followed the items of a slot, within a
    session.

    The same sums as `SlotMemory`, written where the event before points; a candidate reads where it
    learns to look, which need not be at its own code.

    Args:
        num_slots: F.
        session_days: after so long, an event follows the one before by half.
    """

    def __init__(self, width: int, num_slots: int, session_days: float, sharpness: float) -> None:
        super().__init__()
        self.session_days = session_days
        self.sharpness = sharpness
        self.keys = nn.Parameter(torch.randn(num_slots, width) * 0.3)

    def address(self, codes: Tensor) -> Tensor:
        """Softmax over slots, … × F."""
        return (self.sharpness * codes @ self.keys.T).softmax(-1)

    def start(self, batch: int) -> PairStream:
        total = self.keys.new_zeros(batch, *self.keys.shape, dtype=torch.float32)
        return PairStream(total, total[..., 0], total[:, 0], total[:, 0, 0])

    def advance(
        self, stream: PairStream, items: Items, gap_days_BL: Tensor, mask_BL: Tensor
    ) -> PairStream:
        """Add the next events of each user.

        Args:
            gap_days_BL: days since the event before; of the first one since the newest in `stream`.
        """
        with torch.autocast(items.codes_UW.device.type, enabled=False):
            codes = items.codes_UW.float()
            code_BLW = embedding(items.which_BL, codes)
            addressed = embedding(items.which_BL, self.address(codes))
            before = self.address(stream.last_BW) * stream.some_B[:, None]
            address_BLF = torch.cat([before[:, None], addressed[:, :-1]], dim=1)
            weight = torch.exp2(-gap_days_BL.float() / self.session_days) * mask_BL
            written = address_BLF * weight[..., None]
            number = mask_BL.sum(1)
            newest = (number - 1).clamp(min=0)[:, None, None].expand(-1, 1, codes.shape[1])
            last = torch.where(
                (number > 0)[:, None], code_BLW.gather(1, newest)[:, 0], stream.last_BW
            )
            return PairStream(
                stream.total_BFW + written.transpose(1, 2) @ code_BLW,
                stream.mass_BF + written.sum(1),
                last,
                torch.maximum(stream.some_B, (number > 0).float()),
            )


def slot_memory_plain(
    memory: SlotMemory, codes_LW: Tensor, action_L: Tensor, age_days_L: Tensor
) -> SlotStream:
    """One history, event by event and slot by slot: the plain twin, of events without numbers.

    Args:
        age_days_L: days from each event to the newest.
    """
    slots, half_lives = memory.shape
    total = torch.zeros(1, slots, half_lives, codes_LW.shape[1])
    mass = torch.zeros(1, slots, half_lives)
    for code, action, age in zip(codes_LW, action_L, age_days_L, strict=True):
        for slot, share in enumerate(memory.address(code)):
            for number, half_life in enumerate(memory.half_lives):
                weight = share * memory.action[action] * 2 ** (-age / half_life)
                total[0, slot, number] += weight * code
                mass[0, slot, number] += weight.abs()
    return SlotStream(total, mass)
