"""Quasi-linear attention: a history in one K × K matrix a head, which any rows read (VISTA, arXiv
2510.22049, section 3.2).

    Z = φ(K)^T V, a sum over source rows;  W = φ(Z / N), N source rows
    a source row reads   φ(q) W
    a target row reads   φ(q) W + ⟨φ(q), φ(k)⟩ v, which is itself, and no other target

φ is SiLU. Rows read all source rows, or, in the streaming form (ours), those of the blocks before
their own, and themselves: then W stands still within a block, a row never changes once it is
computed, and Z, N and W are all that new rows need, however many came before.

Differs: 1/N stands inside the outer φ, where the main text has none and Appendix B has it outside;
without it SiLU(Z) saturates as histories grow. `divide=False` is the literal formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from modeling.layers.host import maybe_any


class Stream(NamedTuple):
    """All that a layer keeps of the rows so far; its size does not depend on their number."""

    # Z of all rows, B × H × K × K
    total: Tensor
    # N of all rows, int64 B
    number: Tensor
    # Z and N of the rows before the current block
    block_total: Tensor
    block_number: Tensor
    # Rows of the current block, int64 B
    filled: Tensor


class SGLU(nn.Module):
    """((x W_v) ⊙ (x W_u)) W_o, no activation (TransNormerLLM, arXiv 2307.14995)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * expansion * width, bias=False)
        self.down = nn.Linear(expansion * width, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        value, gate = self.up(rows).chunk(2, dim=-1)
        mixed: Tensor = self.down(value * gate)
        return mixed


class QuasiLinearLayer(nn.Module):
    """Pre-norm layer: quasi-linear attention, then SGLU.

    Args:
        num_heads: H; the width must be a multiple of it.
        divide: by N inside the outer φ.
        outer: the outer φ; without it the attention is linear.
        block: rows of a block in the streaming form.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        expansion: int = 2,
        dropout: float = 0.0,
        divide: bool = True,
        outer: bool = True,
        block: int = 32,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is no multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.divide = divide
        self.outer = outer
        self.block = block
        self.norm, self.norm_read, self.norm_mix = (nn.RMSNorm(width, eps=1e-6) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mix = SGLU(width, expansion)
        self.dropout = nn.Dropout(dropout)

    def sums(self, rows_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Z and N of source rows. Sums of parts of a history add up to the history's."""
        keys, values = self._keys_values(self.norm(rows_BLD))
        return _sum(keys, values, mask_BL), mask_BL.sum(1)

    def matrix(self, total: Tensor, count: Tensor) -> Tensor:
        """W, B × H × K × K, as wide as Z."""
        scaled = total / count.clamp(min=1)[:, None, None, None] if self.divide else total
        return silu(scaled) if self.outer else scaled

    def forward(self, rows_BRD: Tensor, matrix: Tensor, *, target: bool) -> Tensor:
        """Rows that read W: source rows, or target rows, which read themselves as well."""
        normed = self.norm(rows_BRD)
        query = self._heads(silu(self.query(normed)))
        read = query @ matrix.to(query.dtype)
        if target:
            keys, values = self._keys_values(normed)
            read = read + (query * keys).sum(-1, keepdim=True) * values
        return self._finish(rows_BRD, read)

    def start(self, batch: int, like: Tensor) -> Stream:
        width = self.query.in_features // self.num_heads
        total = like.new_zeros(batch, self.num_heads, width, width, dtype=_of_sums(like))
        count = torch.zeros(batch, dtype=torch.long, device=like.device)
        return Stream(total, count, total, count, count)

    def advance(self, rows_BPD: Tensor, mask_BP: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """The next rows of a stream, at most a block of them, real ones first: each reads the
        blocks before its own.

        Returns:
            The rows after this layer, and the stream behind them.
        """
        if rows_BPD.shape[1] > self.block:
            raise ValueError(
                f"advance takes at most {self.block} rows at a time, got {rows_BPD.shape[1]}"
            )
        # 1. Queries, keys and values, B × H × P × K.
        normed = self.norm(rows_BPD)
        query = self._heads(silu(self.query(normed)))
        keys, values = self._keys_values(normed)
        index = torch.arange(rows_BPD.shape[1], device=rows_BPD.device)
        # Events that still fit into the block that is being filled
        within = (index < (self.block - stream.filled)[:, None]) & mask_BP
        # 2. Sums of rows that go into the current block, and of those in the next.
        old = self.matrix(stream.block_total, stream.block_number)
        first = _sum(keys, values, within)
        rest = _sum(keys, values, mask_BP & ~within)
        number = within.sum(1)
        later = (mask_BP & ~within).sum(1)
        full = stream.filled + number == self.block
        total = stream.total + first
        count = stream.number + number
        block_total = torch.where(full[:, None, None, None], total, stream.block_total)
        block_count = torch.where(full, count, stream.block_number)
        # 3. Each row reads the blocks before its own, and itself.
        read = query @ old.to(query.dtype)
        if maybe_any(later):
            new = self.matrix(block_total, block_count).to(query.dtype)
            read = torch.where(within[:, None, :, None], read, query @ new)
        read = read + (query * keys).sum(-1, keepdim=True) * values
        # 4. The stream behind these rows.
        filled = torch.where(full, later, stream.filled + number)
        behind = Stream(total + rest, count + later, block_total, block_count, filled)
        return self._finish(rows_BPD, read), behind

    def advance_blocks(
        self, rows_BLD: Tensor, mask_BL: Tensor, stream: Stream
    ) -> tuple[Tensor, Stream]:
        """Any number of next rows at once, of streams that stand at the beginning of a block:
        `advance`'s fast twin.

        Within a layer no block waits for another: the sums before each block are a running sum over
        blocks.
        """
        normed = self.norm(rows_BLD)
        length = rows_BLD.shape[1]
        size = self.block
        missing = -length % size
        query, keys, values = (
            # B × H × blocks × P × K
            pad(rows, (0, 0, 0, missing)).unflatten(2, (-1, size))
            for rows in (self._heads(silu(self.query(normed))), *self._keys_values(normed))
        )
        real = pad(mask_BL, (0, missing)).unflatten(1, (-1, size))
        sums = _product(keys * real[:, None, :, :, None], values)
        counts = real.sum(-1)
        # Sums before each block, and after the last
        totals = torch.cat([stream.total[:, :, None], sums], dim=2).cumsum(2)
        numbers = torch.cat([stream.number[:, None], counts], dim=1).cumsum(1)
        scaled = totals / numbers.clamp(min=1)[:, None, :, None, None] if self.divide else totals
        matrices = silu(scaled[:, :, :-1]) if self.outer else scaled[:, :, :-1]
        read = query @ matrices.to(query.dtype) + (query * keys).sum(-1, keepdim=True) * values
        # Real rows stand first, so full blocks do
        full = (counts == size).sum(1)
        at = full[:, None, None, None, None].expand(-1, totals.shape[1], 1, *totals.shape[3:])
        block_total = totals.gather(2, at)[:, :, 0]
        block_number = numbers.gather(1, full[:, None])[:, 0]
        behind = Stream(
            totals[:, :, -1],
            numbers[:, -1],
            block_total,
            block_number,
            numbers[:, -1] - block_number,
        )
        return self._finish(rows_BLD, read.flatten(2, 3)[:, :, :length]), behind

    def advance_and_read(
        self, rows_BPD: Tensor, mask_BP: Tensor, targets_BSD: Tensor, stream: Stream
    ) -> tuple[Tensor, Tensor, Stream]:
        """`advance` by rows that do not go beyond the current block, and target rows that read them
        too, in one pass.

        Returns:
            New rows after this layer, target rows after it, and the stream behind the new rows.
        """
        # 1. New rows and target rows go through the projections together.
        number = rows_BPD.shape[1]
        rows = torch.cat([rows_BPD, targets_BSD], dim=1)
        normed = self.norm(rows)
        query = self._heads(silu(self.query(normed)))
        keys, values = self._keys_values(normed)
        # 2. Sums behind the new rows; target rows add nothing to them.
        total = stream.total + _sum(keys[:, :, :number], values[:, :, :number], mask_BP)
        added = mask_BP.sum(1)
        count = stream.number + added
        filled = stream.filled + added
        # 3. New rows read the blocks before their own, target rows all rows so far.
        old = self.matrix(stream.block_total, stream.block_number)
        new = self.matrix(total, count)
        old = old.to(query.dtype)
        new = new.to(query.dtype)
        read = torch.cat([query[:, :, :number] @ old, query[:, :, number:] @ new], dim=2)
        rows = self._finish(rows, read + (query * keys).sum(-1, keepdim=True) * values)
        # 4. Where the block is full now, later rows read its sums too.
        block_total = stream.block_total
        block_number = stream.block_number
        full = filled == self.block
        if maybe_any(full):
            block_total = torch.where(full[:, None, None, None], total, block_total)
            block_number = torch.where(full, count, block_number)
            filled = torch.where(full, 0, filled)
        return (
            rows[:, :number],
            rows[:, number:],
            Stream(total, count, block_total, block_number, filled),
        )

    def _finish(self, rows: Tensor, read: Tensor) -> Tensor:
        rows = rows + self.dropout(self.out(self.norm_read(read.transpose(1, 2).flatten(2))))
        mixed: Tensor = rows + self.dropout(self.mix(self.norm_mix(rows)))
        return mixed

    def _keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key_value(normed).chunk(2, dim=-1)
        return self._heads(silu(keys)), self._heads(values)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _sum(keys: Tensor, values: Tensor, mask_BL: Tensor) -> Tensor:
    """φ(K)^T V over real rows: padding is taken away after φ."""
    return _product(keys * mask_BL[:, None, :, None], values)


def _product(keys: Tensor, values: Tensor) -> Tensor:
    """φ(K)^T V in float32 at least: sums of a million rows overflow in float16 and stand still in
    bfloat16. Rows read W in their own precision, so in float16 W has to be divided by N.
    """
    with torch.autocast(keys.device.type, enabled=False):
        wide = _of_sums(keys)
        return keys.to(wide).transpose(-1, -2) @ values.to(wide)


def _of_sums(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def quasi_linear_plain(query: Tensor, key: Tensor, value: Tensor, num_targets: int) -> Tensor:
    """((φ(Q) φ(K)^T) ⊙ M) V with its matrix of pairs: the plain twin without the outer φ and
    without 1/N.

    Args:
        query: B × H × (n + m) × K, source rows first, then `num_targets` target rows; `key` and
            `value` alike.
    """
    length = query.shape[2]
    visible = torch.eye(length, dtype=torch.bool, device=query.device)
    visible[:, : length - num_targets] = True
    visible[: length - num_targets, length - num_targets :] = False
    return ((silu(query) @ silu(key).transpose(-1, -2)) * visible) @ value
