"""The catalogue: what ran, which bundles exist, which one is live. SQLAlchemy; SQLite by default,
PostgreSQL works.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    Float,
    Select,
    String,
    create_engine,
    delete,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from feature_repo.errors import ExpectedError
from feature_repo.home import engines  # noqa: F401  # settings of every engine
from feature_repo.home.secrets import revealed

# Share of users with a history who must have tokens before a bundle that reads them goes live.
COVERAGE_TO_GO_LIVE = 0.99


class Base(DeclarativeBase):
    """Tables of the catalogue."""


class StageRun(Base):
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
    """One exported bundle, how it compared when it was exported, and what holds it back."""

    __tablename__ = "exported_bundles"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    dataset: Mapped[str] = mapped_column(String(64), index=True)
    recipe: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(16))
    path: Mapped[str] = mapped_column(String(1024))
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    tokens: Mapped[str | None] = mapped_column(
        String(32), index=True, doc="the one token version that it accepts"
    )
    test: Mapped[str | None] = mapped_column(
        String(64), doc="key of the test requests on which it was measured"
    )
    held_back: Mapped[str | None] = mapped_column(
        String(2048), doc="why it may not go live; empty where it may"
    )


class LiveSince(Base):
    """Which bundle became live when; the last row of a dataset is the live one's."""

    __tablename__ = "live_since"
    id: Mapped[int] = mapped_column(primary_key=True)
    dataset: Mapped[str] = mapped_column(String(64), index=True)
    digest: Mapped[str] = mapped_column(String(64))
    since: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class CompiledRow(Base):
    """A step of a bundle's model compiled for a kind of machine: code, which is run if its hash is this one."""

    __tablename__ = "compiled_steps"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True, doc="of the bundle")
    machine: Mapped[str] = mapped_column(String(128), primary_key=True)
    step: Mapped[str] = mapped_column(String(32), primary_key=True)
    path: Mapped[str] = mapped_column(String(1024))
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    made_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class SentRun(Base):
    """The run that a job sent last to an online store."""

    __tablename__ = "sent_to_stores"
    dataset: Mapped[str] = mapped_column(String(64), primary_key=True)
    store: Mapped[str] = mapped_column(
        String(64), primary_key=True, doc="the store's id, as it says itself"
    )
    job: Mapped[str] = mapped_column(String(64), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64))
    sent_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class TokenVersion(Base):
    """Summary tokens of one stage 1: whose they are, and how many users have them online."""

    __tablename__ = "token_versions"
    fingerprint: Mapped[str] = mapped_column(String(32), primary_key=True)
    dataset: Mapped[str] = mapped_column(String(64), primary_key=True)
    recipe: Mapped[str] = mapped_column(String(64))
    users: Mapped[int] = mapped_column(doc="users with a history, when the tokens were built last")
    covered: Mapped[int] = mapped_column(doc="of those, users with tokens")
    num_tokens: Mapped[int]
    width: Mapped[int]
    built_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))

    @property
    def coverage(self) -> float:
        """Share of users with a history who have tokens."""
        return self.covered / self.users if self.users else 0.0


@dataclass(frozen=True)
class TokenSpec:
    """Which stored summary tokens a model reads: their version, and how many of which width a user has.

    Example:
        >>> TokenSpec("0" * 32, 4, 16).shape
        (4, 16)
    """

    version: str
    number: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """S, D."""
        return self.number, self.width


class NotRecordedError(ExpectedError, LookupError):
    """The catalogue has no bundle, or no summary tokens, of that name."""


class NoLiveBundleError(ExpectedError, LookupError):
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
        url = revealed(url, "MEMOIR_CATALOGUE")
        parsed = make_url(url)
        if (
            parsed.get_backend_name() == "sqlite"
            and parsed.database
            and parsed.database != ":memory:"
        ):
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        self.engine = create_engine(url)
        Base.metadata.create_all(self.engine)

    @contextmanager
    def stage(self, dataset: str, stage: str, inputs: str) -> Iterator[Stage]:
        """Time a stage and record it when it finishes without an error."""
        started = datetime.now(UTC)
        clock = time.perf_counter()
        current = Stage()
        yield current
        if not current.recorded:
            return
        with Session(self.engine) as session, session.begin():
            session.execute(
                delete(StageRun).where(
                    StageRun.dataset == dataset, StageRun.stage == stage, StageRun.inputs == inputs
                )
            )
            duration = time.perf_counter() - clock
            session.add(
                StageRun(
                    dataset=dataset,
                    stage=stage,
                    inputs=inputs,
                    started_at=started,
                    duration_s=duration,
                    details=current.details,
                )
            )

    def last_run(self, dataset: str, stage: str) -> StageRun | None:
        """The newest finished run of a stage."""
        with Session(self.engine) as session:
            query = (
                select(StageRun)
                .where(StageRun.dataset == dataset, StageRun.stage == stage)
                .order_by(StageRun.id.desc())
                .limit(1)
            )
            return session.scalars(query).first()

    def is_current(self, dataset: str, stage: str, inputs: str) -> bool:
        """Return whether the newest run of a stage read exactly these inputs."""
        run = self.last_run(dataset, stage)
        return run is not None and run.inputs == inputs

    def add_bundle(
        self,
        *,
        digest: str,
        dataset: str,
        recipe: str,
        fingerprint: str,
        path: str,
        metrics: dict[str, Any],
        tokens: str | None = None,
    ) -> None:
        """Record a bundle; recording the same digest again updates its path and metrics.

        Args:
            tokens: the token version that it accepts, where it reads tokens.
        """
        with Session(self.engine) as session, session.begin():
            row = BundleRow(
                digest=digest,
                dataset=dataset,
                recipe=recipe,
                fingerprint=fingerprint,
                path=path,
                metrics=metrics,
                created_at=datetime.now(UTC),
                tokens=tokens,
            )
            session.merge(row)

    def set_live(self, dataset: str, digest: str) -> None:
        """Make a recorded bundle the live one of its dataset.

        Raises:
            NotRecordedError: no such bundle is recorded for this dataset.
        """
        with Session(self.engine) as session, session.begin():
            row = session.get(BundleRow, digest)
            if row is None or row.dataset != dataset:
                raise NotRecordedError(
                    f"no bundle {digest[:12]} of dataset {dataset!r} in the catalogue: export it first"
                )
            newest = session.scalars(_live_log(dataset).limit(1)).first()
            if newest is None or newest.digest != digest:
                session.add(LiveSince(dataset=dataset, digest=digest, since=datetime.now(UTC)))

    def live_bundle(self, dataset: str) -> BundleRow:
        """The live bundle of a dataset.

        Raises:
            NoLiveBundleError: none is live.
        """
        with Session(self.engine) as session:
            newest = session.scalars(_live_log(dataset).limit(1)).first()
            row = None if newest is None else session.get(BundleRow, newest.digest)
        if row is None:
            raise NoLiveBundleError(
                f"no bundle of {dataset!r} is live: run `python -m modeling train`, `evaluate` and `export` first"
            )
        return row

    def live_or_none(self, dataset: str) -> BundleRow | None:
        """The live bundle of a dataset, if there is one."""
        try:
            return self.live_bundle(dataset)
        except NoLiveBundleError:
            return None

    def live_before(self, dataset: str) -> BundleRow:
        """The bundle that was live before the present one.

        Raises:
            NotRecordedError: none was.
        """
        with Session(self.engine) as session:
            log = [row.digest for row in session.scalars(_live_log(dataset))]
            for digest in log[1:]:
                row = session.get(BundleRow, digest)
                if digest != log[0] and row is not None:
                    return row
        raise NotRecordedError(f"no bundle of {dataset!r} was live before the present one")

    def note_comparison(self, digest: str, test: str, held_back: str) -> None:
        """Note on which test requests a bundle was measured, and what holds it back; "": nothing."""
        self._note(digest, test=test, held_back=held_back[:2048])

    def hold_back(self, digest: str, why: str) -> None:
        """Note what holds a bundle back from now on; on which requests it was measured stays."""
        self._note(digest, held_back=why[:2048])

    def test_of(self, digest: str) -> str | None:
        """On which test requests a bundle was measured."""
        with Session(self.engine) as session:
            row = session.get(BundleRow, digest)
            return None if row is None else row.test

    def held_back(self, dataset: str, digest: str) -> str:
        """Return the reason why a bundle may not go live; "" if there is no reason, or it is live."""
        live = self.live_or_none(dataset)
        with Session(self.engine) as session:
            row = session.get(BundleRow, digest)
        is_live = live is not None and live.digest == digest
        return "" if row is None or is_live else row.held_back or ""

    def _note(self, digest: str, **columns: str) -> None:
        with Session(self.engine) as session, session.begin():
            session.execute(update(BundleRow).where(BundleRow.digest == digest).values(**columns))

    def bundles(self, dataset: str) -> list[BundleRow]:
        """All recorded bundles of a dataset, newest first."""
        with Session(self.engine) as session:
            return list(
                session.scalars(
                    select(BundleRow)
                    .where(BundleRow.dataset == dataset)
                    .order_by(BundleRow.created_at.desc())
                )
            )

    def bundle(self, dataset: str, name: str) -> BundleRow:
        """The newest bundle of a recipe, or the one whose digest begins so.

        Raises:
            NotRecordedError: no such bundle is recorded.
        """
        for row in self.bundles(dataset):
            if (
                row.recipe == name
                or row.digest.startswith(name)
                or f"{row.recipe}@{row.digest[:12]}" == name
            ):
                return row
        raise NotRecordedError(
            f"no bundle {name!r} of dataset {dataset!r} in the catalogue: run `python -m modeling train`, `evaluate` and `export`"
        )

    def accepted_tokens(self, digest: str) -> str | None:
        """The token version that a bundle accepts, if it reads tokens."""
        with Session(self.engine) as session:
            row = session.get(BundleRow, digest)
            return None if row is None else row.tokens

    def record_tokens(
        self,
        *,
        fingerprint: str,
        dataset: str,
        recipe: str,
        users: int,
        covered: int,
        shape: tuple[int, int],
    ) -> None:
        """Note that tokens of a version were built, and for how many users."""
        with Session(self.engine) as session, session.begin():
            row = TokenVersion(
                fingerprint=fingerprint,
                dataset=dataset,
                recipe=recipe,
                users=users,
                covered=covered,
                num_tokens=shape[0],
                width=shape[1],
                built_at=datetime.now(UTC),
            )
            session.merge(row)

    def token_versions(self, dataset: str) -> list[TokenVersion]:
        """Token versions that were built, newest first."""
        with Session(self.engine) as session:
            query = select(TokenVersion).where(TokenVersion.dataset == dataset)
            return list(session.scalars(query.order_by(TokenVersion.built_at.desc())))

    def maker_of(self, dataset: str, tokens: str) -> BundleRow | None:
        """The newest bundle of the recipe by which tokens of a version were built; None where none were, or it is not
        recorded any more.
        """
        built_by = {row.fingerprint: row.recipe for row in self.token_versions(dataset)}
        for row in self.bundles(dataset):
            if row.tokens == tokens and row.recipe == built_by.get(tokens):
                return row
        return None

    def tokens_of_recipe(self, dataset: str, recipe: str) -> TokenSpec:
        """Return the newest token version that a recipe's bundles made.

        Raises:
            NotRecordedError: none was built.
        """
        for row in self.token_versions(dataset):
            if row.recipe == recipe:
                return TokenSpec(row.fingerprint, row.num_tokens, row.width)
        raise NotRecordedError(
            f"no summary tokens of recipe {recipe!r} are built for {dataset!r}: train, evaluate and export it, then run "
            f"`python -m beam_jobs summary_tokens --bundle {recipe} --every_days 7`"
        )

    def forget_tokens(self, dataset: str, fingerprint: str) -> None:
        """Drop a token version from the catalogue."""
        with Session(self.engine) as session, session.begin():
            session.execute(
                delete(TokenVersion).where(
                    TokenVersion.dataset == dataset, TokenVersion.fingerprint == fingerprint
                )
            )

    def retirable_tokens(
        self, dataset: str, longest_life: timedelta, now: datetime | None = None
    ) -> list[str]:
        """Token versions that no server can still need.

        A version is needed where it was built less than `longest_life` ago, and by a bundle that
        accepts it and is live, was live less than that ago, or was exported less than that ago and
        may yet go live.
        """
        limit = (now or datetime.now(UTC)) - longest_life
        with Session(self.engine) as session:
            log = session.scalars(
                select(LiveSince).where(LiveSince.dataset == dataset).order_by(LiveSince.id)
            ).all()
            ended = {row.digest: _utc(after.since) for row, after in itertools.pairwise(log)}
            if log:
                ended[log[-1].digest] = datetime.max.replace(tzinfo=UTC)
            reading = select(BundleRow).where(
                BundleRow.dataset == dataset, BundleRow.tokens.is_not(None)
            )
            needed = {
                bundle.tokens
                for bundle in session.scalars(reading)
                if max(ended.get(bundle.digest, _utc(bundle.created_at)), _utc(bundle.created_at))
                > limit
            }
        return [
            row.fingerprint
            for row in self.token_versions(dataset)
            if row.fingerprint not in needed and _utc(row.built_at) <= limit
        ]


def _live_log(dataset: str) -> Select[LiveSince]:
    """Bundles of a dataset in the order in which they became live, the newest first."""
    return select(LiveSince).where(LiveSince.dataset == dataset).order_by(LiveSince.id.desc())


def _utc(time: datetime) -> datetime:
    """SQLite forgets the zone."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)
