"""Stored summary tokens of a different model as rows that a ranker reads beside its own (VISTA, arXiv
2510.22049: downstream models).

They are features: no gradient reaches the model that made them. A user without tokens has learned rows in
their place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modeling.inputs.batch import FeatureSizes, UserInputs


class StoredTokens(nn.Module):
    """S stored tokens → S rows of width D."""

    def __init__(self, sizes: FeatureSizes, width: int) -> None:
        super().__init__()
        self.shape = sizes.tokens
        self.project = nn.Linear(sizes.tokens[1], width)
        self.nobody = nn.Parameter(torch.randn(sizes.tokens[0], width) * 0.05)

    def forward(self, user: UserInputs) -> Tensor:
        """B × S × D.

        Raises:
            ValueError: the batch has no tokens, or tokens of the wrong shape.
        """
        tokens = user.tokens_BSX
        if tokens is None or tokens.shape[1:] != self.shape:
            found = None if tokens is None else tuple(tokens.shape[1:])
            raise ValueError(
                f"this model reads stored summary tokens of shape {self.shape}, the batch has {found}"
            )
        rows: Tensor = self.project(tokens)
        has = user.has_tokens_B
        return rows if has is None else torch.where(has[:, None, None], rows, self.nobody)
