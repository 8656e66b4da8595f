"""The training sets of a comparison, opened as its recipes ask for them."""

from __future__ import annotations

from functools import cache

from feature_repo.settings import Settings
from modeling.dataset import Tokens
from modeling.encoder import Encoder
from modeling.recipes import Recipe
from modeling.training_set import Options, Period, TrainingSet, open_training_set


class Encodings:
    """Training sets of a comparison: made or opened once for all recipes that read them alike.

    Args:
        service: feature service that they join.
        tokens: version and shape of stored summary tokens, where some recipe reads them.
        visible: events before a request that anything may be known of; default: all.
        every: n and m: each n-th training request, each m-th of those that evaluate.
    """

    def __init__(
        self,
        settings: Settings,
        service: str,
        tokens: Tokens | None = None,
        visible: int | None = None,
        every: tuple[int, int] = (1, 1),
    ) -> None:
        from feature_repo.store import open_store

        self._settings, self._store = settings, open_store(settings)
        self._service, self._tokens, self._visible = service, tokens, visible
        self._every = every
        self._opened = cache(self._open)

    def set_of(self, recipe: Recipe) -> TrainingSet:
        """The training set that a recipe reads."""
        return self._opened(recipe.min_item_count)

    def encoder_of(self, recipe: Recipe) -> Encoder:
        """Its encoder."""
        tokens = recipe.tokens is not None
        return self.set_of(recipe).encoder(
            recipe.history_length, tokens=tokens, without=recipe.without
        )

    def period(self, recipe: Recipe, name: str) -> Period:
        """One of its periods."""
        return self.set_of(recipe).period(name, tokens=recipe.tokens is not None)

    def _open(self, min_item_count: int) -> TrainingSet:
        options = Options(self._service, min_item_count, self._tokens, self._visible, self._every)
        return open_training_set(self._settings, self._store, options)
