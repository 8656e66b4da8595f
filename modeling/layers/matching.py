"""Attention that finds events like a candidate: queries and keys of unit length, a learned
sharpness, and a row of nothing.

    w_i  = exp(τ q̂ · k̂_i) / (exp(ν) + Σ_j exp(τ q̂ · k̂_j))
    read = Σ_i w_i v_i + w_nothing · v_nothing

Keys and queries begin as one orthogonal map, so that a candidate matches its own events from the
first step on, rather than once training has found that equal items are equal. What weighs nothing
of the history reads `v_nothing`: a softmax over events alone says what they are like on average
and not whether, nor how often, the candidate is among them.

Unit length is QK normalisation (Henry et al., arXiv 2010.04245). Differs: the sharpness is a
head's own; the row of nothing; both maps begin alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

# Equal rows weigh e^10 against unrelated ones, about 20,000
SHARPNESS = 10.0


class Matching(nn.Module):
    """What a head's attention is beside its maps.

    Args:
        sharpness: τ at the start.
        plain: products divided by √K and no row of nothing, as in Vaswani et al. (arXiv
            1706.03762) and the papers: what matching is measured against.

    Attributes, none of them where `plain`:
        sharpness_H: τ.
        nothing_H: ν; begins as sharp as one equal event.
        nothing_HK: what is read of nothing.
    """

    def __init__(
        self,
        num_heads: int,
        head_width: int,
        *,
        sharpness: float = SHARPNESS,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.plain = plain
        if plain:
            return
        self.sharpness_H = nn.Parameter(torch.full((num_heads,), sharpness))
        self.nothing_H = nn.Parameter(torch.full((num_heads,), sharpness))
        self.nothing_HK = nn.Parameter(torch.randn(num_heads, head_width) * 0.5)

    def queries(self, heads: Tensor) -> Tensor:
        """Queries of B × H × … × K, as long as they are sharp: products with keys are scores."""
        if self.plain:
            return heads * heads.shape[-1] ** -0.5
        return normalize(heads, dim=-1) * _of_heads(self.sharpness_H, heads)

    def keys(self, heads: Tensor) -> Tensor:
        """Keys of B × H × … × K, of unit length."""
        return heads if self.plain else normalize(heads, dim=-1)

    def begin(self, query: nn.Linear, key_value: nn.Linear) -> None:
        """Let the map of queries and that of keys, the first rows of `key_value`, begin as one
        orthogonal map.
        """
        if self.plain:
            return
        width = query.out_features
        begin_alike(query.weight, key_value.weight[:width])
        for linear in (query, key_value):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def read(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask_BL: Tensor | None,
        own_keys: Tensor | None = None,
        own_values: Tensor | None = None,
    ) -> Tensor:
        """Groups of rows that all read the same keys and nothing, and each its own group's up to
        itself; softmax runs over all three.

        Candidates read one cached history and themselves, and nothing of one another; no key is
        copied for a candidate.

        Args:
            query: of `queries`, B × H × C × N × K, N rows in each of C groups.
            keys: of `keys`, B × H × L × K, read by every row; `values` alike.
            mask_BL: bool, True where a shared key may be read; None where all may.
            own_keys: B × H × C × N × K; row n reads its group's rows 0 … n. `own_values` alike.
                Default: no row reads any of its group.

        Returns:
            B × H × C × N × K.
        """
        number = query.shape[3]
        length = keys.shape[2]
        asking = query.flatten(2, 3)
        # The mask is one more dimension of the product: cheaper than a pass over the scores.
        if mask_BL is not None:
            hidden = torch.zeros_like(mask_BL, dtype=keys.dtype).masked_fill(
                ~mask_BL, torch.finfo(keys.dtype).min / 2
            )
            keys = torch.cat(
                [keys, hidden[:, None, :, None].expand(-1, keys.shape[1], -1, -1)], dim=-1
            )
            asking = torch.cat([asking, torch.ones_like(asking[..., :1])], dim=-1)
        shared = (asking @ keys.transpose(-1, -2)).unflatten(2, query.shape[2:4])
        scores = [shared]
        if own_keys is not None:
            scores.append(_own_scores(query, own_keys))
        if not self.plain:
            nothing = _of_heads(self.nothing_H, shared).expand(*shared.shape[:-1], 1)
            scores.append(nothing.to(shared.dtype))
        # One softmax over all: a row's weights add up to 1.
        weights = torch.cat(scores, dim=-1).softmax(-1)
        read = (weights[..., :length].flatten(2, 3) @ values).unflatten(2, query.shape[2:4])
        if own_values is not None:
            to_own = weights[..., length : length + number]
            read = (
                torch.addcmul(read, to_own, own_values)
                if number == 1
                else read + to_own @ own_values
            )
        if self.plain:
            # Who may read nothing reads zeros, however many rows of padding stand there.
            if mask_BL is not None and own_keys is None:
                read = read * _of_requests(mask_BL.any(-1), read)
            return read
        return torch.addcmul(read, weights[..., -1:], self.nothing_HK[:, None, None].to(read.dtype))


def _own_scores(query: Tensor, own_keys: Tensor) -> Tensor:
    """Scores of a group's rows with one another, B × H × C × N × N; none with a later one."""
    number = query.shape[3]
    if number == 1:
        return (query * own_keys).sum(-1, keepdim=True)
    later = torch.ones(number, number, dtype=torch.bool, device=query.device).triu(1)
    return (query @ own_keys.transpose(-1, -2)).masked_fill(later, -torch.inf)


def _of_heads(values_H: Tensor, like: Tensor) -> Tensor:
    """A number for each head, to be multiplied with B × H × …."""
    return values_H.view(-1, *(1,) * (like.dim() - 2))


def _of_requests(values_B: Tensor, like: Tensor) -> Tensor:
    """A number for each request, to be multiplied with B × …."""
    return values_B.view(-1, *(1,) * (like.dim() - 1))


def begin_alike(query: Tensor, key: Tensor) -> None:
    """Let two maps, each out × in, begin as one orthogonal map."""
    with torch.no_grad():
        nn.init.orthogonal_(key)
        query.copy_(key)
