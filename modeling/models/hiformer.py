"""Hiformer: heterogeneous attention over feature tokens, with composite projections, low rank and a
pruned last layer.

Source: Gui et al., "Hiformer: Heterogeneous feature interactions learning with Transformers for
recommender systems", arXiv 2311.05884.

| paper | here |
|---|---|
| categorical, dense and task tokens, L in all | task tokens, then the request's, then the candidate's (`FeatureTokens`) |
| vanilla Transformer, HeteroAtt, Hiformer, low-rank Hiformer | `kind` "vanilla", "hetero", "composite", "low_rank" |
| composite projections K̂, V̂; factors joint over heads | `Composite` |
| pruned last layer | `prune`: the last layer's queries are the task tokens alone |

Differs. The paper caches nothing: composite keys and values mix all tokens. But their product
splits, x K̂ = x_request K̂_top + x_candidate K̂_bottom, and its first half is here a `UserState`,
computed once per request; likewise projections by token of the first layer. What the paper leaves
open: pre-norm with each token's own gain; Xavier for maps by token, composite ones scaled by all
their inputs; queries of inner layers are composite too; numbers share the paper's one dense network, which also sees whether each is there, in place of a row
for what is missing, and vectors have a matrix each; the paper has no sequences, so a pooled
token for each behaviour sequence is among the request's, and `history` adds a token that the
candidate reads from the events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeling.inputs.batch import Candidates, FeatureSizes, UserInputs
from modeling.layers.features import FeatureTokens
from modeling.layers.heterogeneous import HeterogeneousLayer, Kind, Known, LayerShape
from modeling.layers.interaction import TaskHeads
from modeling.layers.reader import History, HistoryReader, with_read
from modeling.models.base import Ranker


@dataclass(frozen=True)
class Config:
    """One low-rank layer, pruned, by default, as the paper serves."""

    width: int = 32
    num_layers: int = 1
    num_heads: int = 4
    key_width: int = 8  # of one head
    value_width: int = 16
    hidden: int = 128
    kind: Kind = "low_rank"
    rank_key: int = 64
    rank_value: int = 128
    prune: bool = True
    composite_query: bool = True
    shared_output: bool = False
    history: History = "din"
    history_hidden: int = 16
    dropout: float = 0.0


@dataclass(frozen=True)
class UserState:
    """The request's half of the first layer, and what the history reader prepared."""

    known: Known
    history: Any


class Hiformer(Ranker):
    """See the module docstring."""

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        # 1. Tokens: features, tasks, and what the candidate reads of the history.
        self.features = FeatureTokens(sizes, config.width, bags=True)
        self.tasks = nn.Parameter(torch.randn(sizes.tasks, config.width) * 0.05)
        self.reader = None
        if config.history != "bags":
            self.reader = HistoryReader(
                config.width,
                sizes.actions,
                self.features.events.size,
                config.history,
                config.history_hidden,
            )
        # Task tokens first: the heads read these alone, so the last layer may prune all others.
        tokens = (
            sizes.tasks
            + self.features.num_request
            + self.features.num_candidate
            + (self.reader is not None)
        )
        # 2. Layers over the list of tokens.
        shape = LayerShape(
            tokens,
            config.width,
            config.num_heads,
            config.key_width,
            config.value_width,
            config.hidden,
            config.rank_key,
            config.rank_value,
        )
        self.layers = nn.ModuleList(
            HeterogeneousLayer(
                shape,
                config.kind,
                sizes.tasks if config.prune and number + 1 == config.num_layers else None,
                composite_query=config.composite_query,
                shared_output=config.shared_output,
                dropout=config.dropout,
            )
            for number in range(config.num_layers)
        )
        # 3. Heads over the final task tokens, B × C × TD; the request adds no input beside them.
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.heads = TaskHeads(
            0, sizes.tasks * config.width, 2 * config.width, sizes.tasks, config.dropout
        )

    def encode_user(self, user: UserInputs) -> UserState:
        """The task tokens' and the request's half of the first layer."""
        items = self.features.item(user.item_BL)
        request = self.features.request(user, items_BLD=items)
        known = torch.cat([self.tasks.expand(len(request), -1, -1), request], dim=1)
        history = (
            None
            if self.reader is None
            else self.reader.prepare(user, items, self.features.events(user))
        )
        return UserState(self.layers[0].prepare(known), history)  # type: ignore[operator]

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """The candidates' half, and all that follows. logits_BCT."""
        return self._score(user_state.known, self._tokens(user_state, candidates))

    def score_unsplit(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """The plain twin: the first layer over all tokens of each candidate, nothing of it known
        beforehand.
        """
        rest = self._tokens(user_state, candidates)
        return self._score(
            None, torch.cat([user_state.known.rows.expand(-1, rest.shape[1], -1, -1), rest], dim=2)
        )

    def _score(self, known: Known | None, rows: Tensor) -> Tensor:
        """Tokens of each candidate through all layers to the heads; `known` is the first layer's
        other half.
        """
        for number, layer in enumerate(self.layers):
            rows = layer(known if number == 0 else None, rows)
        logits: Tensor = self.heads(None, self.norm(rows[:, :, : self.sizes.tasks]).flatten(2))
        return logits

    def _tokens(self, user_state: UserState, candidates: Candidates) -> Tensor:
        return with_read(self.features.candidates(candidates), self.reader, user_state.history)
