"""The catalogue: what ran, which bundles exist, which one is live. SQLAlchemy; SQLite by default, PostgreSQL works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, DateTime, Float, ForeignKey, String, create_engine, delete, select
from sqlalchemy.engine import make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    """Tables of the catalogue."""


class Run(Base):
    """One finished run of a stage: a Beam job, apply, training, evaluation, export."""

    __tablename__ = "runs"
    id: Mapped[int] = mapped_column(primary_key=True)
    dataset: Mapped[str] = mapped_column(String(64), index=True)
    stage: Mapped[str] = mapped_column(String(64), index=True)
    inputs: Mapped[str] = mapped_column(String(64), doc="digest of all that the stage read")
    started_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    duration_s: Mapped[float] = mapped_column(Float)
    details: Mapped[dict[str, Any]] = mapped_column(JSON)


class BundleRow(Base):
    """One exported bundle."""

    __tablename__ = "bundles"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    dataset: Mapped[str] = mapped_column(String(64), index=True)
    recipe: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(16))
    path: Mapped[str] = mapped_column(String(1024))
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class Live(Base):
    """The one bundle of a dataset that servers rank with."""

    __tablename__ = "live"
    dataset: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("bundles.digest"))
    since: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class NoLiveBundleError(LookupError):
    """No bundle of the dataset is live."""


@dataclass
class Stage:
    """A stage that is under way; `details` is what the catalogue will remember of it."""

    details: dict[str, Any] = field(default_factory=dict)
    recorded: bool = True

    def discard(self) -> None:
        """Do not record the stage: it turned out that there was nothing to do."""
        self.recorded = False


class Catalogue:
    """Open (and, the first time, create) the catalogue at a SQLAlchemy URL."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        self.engine = create_engine(url)
        Base.metadata.create_all(self.engine)

    @contextmanager
    def stage(self, dataset: str, stage: str, inputs: str) -> Iterator[Stage]:
        """Time a stage and record it when it finishes without an error."""
        started, clock, current = datetime.now(UTC), time.perf_counter(), Stage()
        yield current
        if not current.recorded:
            return
        with Session(self.engine) as session, session.begin():
            session.execute(delete(Run).where(Run.dataset == dataset, Run.stage == stage, Run.inputs == inputs))
            duration = time.perf_counter() - clock
            session.add(
                Run(
                    dataset=dataset,
                    stage=stage,
                    inputs=inputs,
                    started_at=started,
                    duration_s=duration,
                    details=current.details,
                )
            )

    def last_run(self, dataset: str, stage: str) -> Run | None:
        """The newest finished run of a stage."""
        with Session(self.engine) as session:
            query = select(Run).where(Run.dataset == dataset, Run.stage == stage).order_by(Run.id.desc()).limit(1)
            return session.scalars(query).first()

    def is_current(self, dataset: str, stage: str, inputs: str) -> bool:
        """Whether the newest run of a stage read exactly these inputs."""
        run = self.last_run(dataset, stage)
        return run is not None and run.inputs == inputs

    def add_bundle(
        self, *, digest: str, dataset: str, recipe: str, fingerprint: str, path: str, metrics: dict[str, Any]
    ) -> None:
        """Record a bundle; recording the same digest again updates its path and metrics."""
        with Session(self.engine) as session, session.begin():
            row = BundleRow(
                digest=digest,
                dataset=dataset,
                recipe=recipe,
                fingerprint=fingerprint,
                path=path,
                metrics=metrics,
                created_at=datetime.now(UTC),
            )
            session.merge(row)

    def set_live(self, dataset: str, digest: str) -> None:
        """Make a recorded bundle the live one of its dataset.

        Raises:
            LookupError: no such bundle is recorded for this dataset.
        """
        with Session(self.engine) as session, session.begin():
            row = session.get(BundleRow, digest)
            if row is None or row.dataset != dataset:
                raise LookupError(f"no bundle {digest[:12]} of dataset {dataset!r} in the catalogue: export it first")
            session.merge(Live(dataset=dataset, digest=digest, since=datetime.now(UTC)))

    def live_bundle(self, dataset: str) -> BundleRow:
        """The live bundle of a dataset.

        Raises:
            NoLiveBundleError: none is live.
        """
        with Session(self.engine) as session:
            row = session.scalars(
                select(BundleRow).join(Live, Live.digest == BundleRow.digest).where(Live.dataset == dataset)
            ).first()
        if row is None:
            raise NoLiveBundleError(
                f"no bundle of {dataset!r} is live: run `python -m modeling train`, `evaluate` and `export` first"
            )
        return row

    def bundles(self, dataset: str) -> list[BundleRow]:
        """All recorded bundles of a dataset, newest first."""
        with Session(self.engine) as session:
            return list(
                session.scalars(
                    select(BundleRow).where(BundleRow.dataset == dataset).order_by(BundleRow.created_at.desc())
                )
            )
