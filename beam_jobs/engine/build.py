"""Units → pieces by partition → parts: the shape of every job that writes tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import pyarrow as pa

from beam_jobs.engine.partition import Key, Piece, join_pieces
from beam_jobs.engine.parts import Built, write_part
from beam_jobs.engine.plan import RunPlan, Unit
from beam_jobs.engine.threads import ThreadMap

Reader = Callable[[RunPlan, Unit], Iterator[tuple[Key, Piece]]]
Builder = Callable[[RunPlan, Key, pa.Table], Iterable[Built]]
Resolver = Callable[[RunPlan, Key, pa.Table], Iterator[tuple[Key, Piece]]]


@dataclass
class BuildTables(beam.PTransform):
    """Units → pieces by partition → parts.

    Args:
        read: turns one unit into keyed pieces; a plain function.
        build: turns one whole partition into parts; a plain function.
        resolve: turns one whole partition of `between` into pieces that are partitioned otherwise; a plain function.
        between: the table whose partitions are resolved before any is built; "": none is.
    """

    plan: RunPlan
    read: Reader
    build: Builder
    resolve: Resolver | None = None
    between: str = ""

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        pieces = (
            units
            | "Spread units" >> beam.Reshuffle()
            | "Read and partition"
            >> beam.ParDo(ReadUnit(self.plan, self.read)).with_output_types(tuple[Key, Piece])
        )
        # Some rows must meet others before it is known to which partition they belong.
        if self.resolve is not None:
            resolved = (
                pieces
                | "To resolve"
                >> beam.Filter(lambda piece, table: piece[0][0] == table, self.between)
                | "Gather what belongs together" >> beam.GroupByKey()
                | "Resolve"
                >> beam.ParDo(ResolvePart(self.plan, self.resolve)).with_output_types(
                    tuple[Key, Piece]
                )
            )
            others = pieces | "Others" >> beam.Filter(
                lambda piece, table: piece[0][0] != table, self.between
            )
            pieces = (resolved, others) | "All pieces" >> beam.Flatten()
        return (
            pieces
            | "Gather partitions" >> beam.GroupByKey()
            | "Write parts" >> beam.ParDo(BuildPart(self.plan, self.build)).with_output_types(str)
        )


class PlanThreads(ThreadMap):
    """A step of a planned run whose elements go side by side; a worker whose code is not the
    launcher's ends the run.
    """

    def __init__(self, plan: RunPlan) -> None:
        super().__init__(plan.num_threads)
        self.plan = plan

    def setup(self) -> None:
        """Refuse to work beside other code."""
        self.plan.begin()


class ReadUnit(PlanThreads):
    """One unit as keyed pieces."""

    def __init__(self, plan: RunPlan, read: Reader) -> None:
        super().__init__(plan)
        self.read = read

    def work(self, element: Unit) -> Iterator[tuple[Key, Piece]]:
        return self.read(self.plan, element)

    def process(self, element: Unit) -> Iterator[tuple[Key, Piece]]:
        """A unit of unknown size is a stream, and goes through piece by piece."""
        beam.metrics.Metrics.counter(self.plan.job, "units_read").inc()
        if element.rows < 0:
            yield from self.work(element)
        else:
            yield from super().process(element)


class EachPartition(PlanThreads):
    """A step that takes the pieces of a whole partition."""

    def process(self, element: tuple[Key, Iterable[Piece]]) -> Iterator[Any]:
        """The pieces are read here, for Beam hands them out on the bundle's own thread alone."""
        key, pieces = element
        yield from super().process((key, list(pieces)))


class ResolvePart(EachPartition):
    """Join the pieces of one partition, and hand its rows on in other partitions."""

    def __init__(self, plan: RunPlan, resolver: Resolver) -> None:
        super().__init__(plan)
        self.resolver = resolver

    def work(self, element: tuple[Key, Iterable[Piece]]) -> Iterator[tuple[Key, Piece]]:
        key, pieces = element
        return self.resolver(self.plan, key, join_pieces(pieces))


class BuildPart(EachPartition):
    """Join the pieces of one partition, build its parts and write them with their counts."""

    def __init__(self, plan: RunPlan, builder: Builder) -> None:
        super().__init__(plan)
        self.builder = builder

    def work(self, element: tuple[Key, Iterable[Piece]]) -> Iterator[tuple[str, str, int]]:
        """Write every part that the partition gives; yields path, table and rows of each."""
        key, pieces = element
        for built in self.builder(self.plan, key, join_pieces(pieces)):
            yield write_part(self.plan, built), built.table, built.rows

    def emit(self, made: tuple[str, str, int]) -> str:
        """The path, once its rows are counted."""
        path, table, rows = made
        beam.metrics.Metrics.counter(self.plan.job, f"{table}_rows").inc(rows)
        return path
