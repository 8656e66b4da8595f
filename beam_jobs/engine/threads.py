"""Elements of a bundle side by side in threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue


class ThreadMap(beam.DoFn, ABC):
    """Work on elements of a bundle in threads, for Arrow's work leaves Python free; outputs keep the order of
    their elements.

    At most one element more than there are threads is in memory at a time. Not for a runner that has threads
    or processes of its own for each core (Dataflow, Flink, several local workers): there `num_threads` is 1,
    and an element is worked on where Beam hands it over.

    Args:
        num_threads: of one bundle.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self.num_threads = num_threads

    @abstractmethod
    def work(self, element: Any) -> Iterable[Any]:
        """Work on one element; in a thread of the pool."""

    def emit(self, made: Any) -> Any:
        """Yield the outputs of a result; in the bundle's thread, where Beam counts."""
        return made

    def start_bundle(self) -> None:
        self._waiting = deque[Future[list[Any]]]()
        self._pool = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None

    def process(self, element: Any) -> Iterator[Any]:
        """Hand an element over; yields what is finished by then."""
        if self._pool is None:
            yield from map(self.emit, self.work(element))
            return
        self._waiting.append(self._pool.submit(lambda: list(self.work(element))))
        while len(self._waiting) > self.num_threads:
            yield from map(self.emit, self._next(self._pool))

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._pool is None:
            return
        while self._waiting:
            for made in map(self.emit, self._next(self._pool)):
                yield WindowedValue(made, MIN_TIMESTAMP, [GlobalWindow()])
        self._pool.shutdown()

    def _next(self, pool: ThreadPoolExecutor) -> list[Any]:
        """Return the oldest element's results; where it failed, no other goes on writing behind the error."""
        try:
            return self._waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
