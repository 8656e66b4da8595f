"""A sample of requests, encoded as if only so many of each user's events were known: joined once, encoded for one
length after another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from feature_repo.settings import Settings
from modeling.inputs.columns import Index
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.relations import Relations
from modeling.training_set.dataset import SPLITS, Fitting, JoinedRequests, Warehouse
from modeling.training_set.sample import Sample
from modeling.training_set.training_set import (
    TrainingSetOptions,
    assembled,
    join_periods,
    read_joined,
    relations_of,
)

if TYPE_CHECKING:
    from feast import FeatureStore

# More rows than a sample has: each period is one piece
ALL = 1 << 40


@dataclass(frozen=True)
class Lengths:
    """Periods of a sample of requests, in memory (`lengths_of`).

    Example:
        >>> with lengths_of(settings, store, service, Sample(every=(10, 5))) as lengths:
        ...     few = lengths.encoded("test", 50)

    Args:
        options: of the sample, but for what is visible.
        paths: of each period's joined rows.
    """

    warehouse: Warehouse
    options: TrainingSetOptions
    paths: Mapping[str, Path]
    vocabularies: dict[str, Index]
    relations: Relations

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of rankers that read no event, only numbers."""
        return self.encoder_of(1)

    def encoder_of(self, history_length: int) -> Encoder:
        """The encoder of a ranker that reads so many events beside the numbers."""
        contract = self.warehouse.contract
        return Encoder(contract, self.vocabularies, history_length, relations=self.relations)

    def requests(self, period: str, visible: int | None = None) -> JoinedRequests:
        """A period's requests with their features, of which so many events are known; None: all."""
        sample = replace(self.options.sample, visible=visible)
        options = replace(self.options, sample=sample)
        return assembled(self.warehouse, read_joined(self.paths[period]), options)

    def encoded(self, period: str, visible: int | None = None) -> Encoded:
        """The same as numbers."""
        return self.encoder.featurise(self.requests(period, visible).requests)

    def all_encoded(self, visible: int | None) -> dict[str, Encoded]:
        """All periods at one length."""
        return {period: self.encoded(period, visible) for period in SPLITS}


@contextmanager
def lengths_of(
    settings: Settings, store: FeatureStore, service: str, sample: Sample
) -> Iterator[Lengths]:
    """Join a sample's periods, and keep the joined rows on disk meanwhile.

    Args:
        store: through which features are joined.
        sample: which requests; what is visible of them is asked for each time.

    Raises:
        JoinError, GateError, DataError: as `open_training_set`.
    """
    warehouse = Warehouse(settings)
    options = TrainingSetOptions(service, 1, sample=sample)
    fitting = Fitting(warehouse.contract, options.min_item_count)
    with tempfile.TemporaryDirectory(dir=settings.home) as folder:
        joined = Path(folder, "joined")
        pieces = join_periods(warehouse, store, options, joined, fitting, ALL)
        # Of all rows at once: a piece a period
        paths = {period: path for period, [path] in pieces.items()}
        yield Lengths(warehouse, options, paths, fitting.found(), relations_of(warehouse))
