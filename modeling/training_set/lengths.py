"""A sample of requests, encoded as if only so many of each user's events were known: joined once, encoded for one
length after another.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from feature_repo.settings import Settings
from modeling.inputs.encoder import Encoded, Encoder
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


class Lengths:
    """Periods of a sample of requests, in memory; a context.

    Example:
        >>> with Lengths(settings, store, service, Sample(every=(10, 5))) as lengths:
        ...     few = lengths.encoded("test", 50)

    Args:
        store: through which features are joined.
        sample: which requests; what is visible of them is asked for each time.
    """

    def __init__(
        self, settings: Settings, store: FeatureStore, service: str, sample: Sample
    ) -> None:
        self._warehouse = Warehouse(settings)
        self._store = store
        self._options = TrainingSetOptions(service, 1, sample=sample)
        self._folder = tempfile.TemporaryDirectory(dir=settings.home)

    def __enter__(self) -> Lengths:
        """Join all periods.

        Raises:
            JoinError, GateError, DataError: as `open_training_set`.
        """
        contract = self._warehouse.contract
        fitting = Fitting(contract, self._options.min_item_count)
        folder = Path(self._folder.name, "joined")
        self._paths = join_periods(
            self._warehouse, self._store, self._options, folder, fitting, ALL
        )
        relations = relations_of(self._warehouse)
        self._vocabularies = fitting.found()
        self._relations = relations
        self.encoder = self.encoder_of(1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    def encoder_of(self, history_length: int) -> Encoder:
        """The encoder of a ranker that reads so many events beside the numbers."""
        contract = self._warehouse.contract
        return Encoder(contract, self._vocabularies, history_length, relations=self._relations)

    def requests(self, period: str, visible: int | None = None) -> JoinedRequests:
        """A period's requests with their features, of which so many events are known; None: all."""
        [path] = self._paths[period]
        options = TrainingSetOptions(
            self._options.service, self._options.min_item_count, sample=Sample(visible)
        )
        return assembled(self._warehouse, read_joined(path), options)

    def encoded(self, period: str, visible: int | None = None) -> Encoded:
        """The same as numbers."""
        return self.encoder.featurise(self.requests(period, visible).requests)

    def all_encoded(self, visible: int | None) -> dict[str, Encoded]:
        """All periods at one length."""
        return {period: self.encoded(period, visible) for period in SPLITS}
