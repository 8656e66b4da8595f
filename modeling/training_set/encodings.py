"""The training sets of a comparison, opened as its recipes ask for them."""

from __future__ import annotations

from feature_repo.home.catalogue import TokenSpec
from feature_repo.settings import Settings
from feature_repo.store.store import open_store
from modeling.inputs.encoder import Encoder
from modeling.recipes import Recipe
from modeling.training_set.sample import WHOLE, Sample
from modeling.training_set.training_set import (
    Period,
    TrainingSet,
    TrainingSetOptions,
    open_training_set,
)


class Encodings:
    """Training sets of a comparison: made or opened once for all recipes that read them alike.

    Args:
        service: feature service that they join.
        tokens: version and shape of stored summary tokens, where some recipe reads them.
        sample: which requests, and how much of their past.
    """

    def __init__(
        self,
        settings: Settings,
        service: str,
        tokens: TokenSpec | None = None,
        sample: Sample = WHOLE,
    ) -> None:
        self._settings = settings
        self._service = service
        self._tokens = tokens
        self.sample = sample
        # A dict and no cached method, which would refer to this object: each set holds its folder, and nobody may
        # delete that, until the last reference is gone.
        self._opened: dict[int, TrainingSet] = {}

    def set_of(self, recipe: Recipe) -> TrainingSet:
        """The training set that a recipe reads."""
        count = recipe.min_item_count
        if count not in self._opened:
            self._opened[count] = self._open(count)
        return self._opened[count]

    def encoder_of(self, recipe: Recipe) -> Encoder:
        tokens = recipe.tokens is not None
        return self.set_of(recipe).encoder(
            recipe.history_length,
            tokens=tokens,
            ablated=recipe.ablated,
            history_block=recipe.history_block,
        )

    def period(self, recipe: Recipe, name: str) -> Period:
        return self.set_of(recipe).period(name, tokens=recipe.tokens is not None)

    def _open(self, min_item_count: int) -> TrainingSet:
        options = TrainingSetOptions(self._service, min_item_count, self._tokens, self.sample)
        return open_training_set(self._settings, open_store, options)
