"""Notes of the catalogue on what jobs sent and built, asked for behind the requests: a database that is slow, or
away, holds up nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from feature_repo.home.catalogue import Catalogue
from feature_repo.home.sent import sent_run
from feature_repo.settings import Settings

# Seconds between two questions
ASKED_EVERY_S = 5.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """The run that a job sent to a store last.

    Args:
        run: None where nothing is noted.
        at: when, seconds since 1970; 0 where nothing is noted.
        heard_at: when the catalogue was asked, as `time.monotonic` has it.
    """

    run: str | None = None
    at: float = 0.0
    heard_at: float = 0.0


@dataclass(frozen=True)
class _Heard:
    """Answers of the catalogue at one time."""

    store_id: str | None = None
    sent: Sent = field(default_factory=Sent)
    tokens: dict[str, float] = field(default_factory=dict)


class Notes:
    """The catalogue's notes, as they were heard last; no caller waits for an answer.

    Args:
        job: whose runs fill the store.

    Example:
        >>> Notes(settings, "materialize").sent("5f3c…", held="9a1b…").run
    """

    def __init__(self, settings: Settings, job: str) -> None:
        self._settings = settings
        self._job = job
        self._catalogue: Catalogue | None = None
        self._heard = _Heard()
        self._ask_at = 0.0
        self._asking = threading.Lock()
        self._said_nothing_noted = False

    def sent(self, store_id: str | None, held: str | None) -> Sent:
        """What was sent last to a store.

        Args:
            store_id: the store's, as it says itself; None where it says none.
            held: the run that it holds; where another was sent, the catalogue is asked again at once.
        """
        heard = self._heard
        known = heard.sent if heard.store_id == store_id else Sent()
        if time.monotonic() >= self._ask_at or known.run not in (None, held):
            self._ask(store_id)
        if (
            known.heard_at
            and held is not None
            and known.run is None
            and not self._said_nothing_noted
        ):
            self._said_nothing_noted = True
            logger.warning(
                "the catalogue has no note of what was sent to this online store: a store that comes back older is not "
                "noticed until `python -m beam_jobs %s` has run with this catalogue",
                self._job,
            )
        return known

    @property
    def sent_at(self) -> float:
        """When tables were sent to the store last, seconds since 1970; 0 where no job noted it."""
        return self._heard.sent.at

    def tokens_built_at(self, version: str | None) -> float:
        """When the job built summary tokens of a version last, seconds since 1970; 0 where no job noted it."""
        return self._heard.tokens.get(version or "", 0.0)

    def _ask(self, store_id: str | None) -> None:
        """Ask in a separate thread, unless one is asking."""
        if self._asking.acquire(blocking=False):
            self._ask_at = time.monotonic() + ASKED_EVERY_S
            threading.Thread(target=self._asked, args=(store_id,), daemon=True).start()

    def _asked(self, store_id: str | None) -> None:
        asked_at = time.monotonic()
        try:
            if self._catalogue is None:
                self._catalogue = Catalogue(self._settings.catalogue_url)
            dataset = self._settings.dataset
            row = None
            if store_id is not None:
                row = sent_run(self._catalogue, dataset, store_id, self._job)
            sent = Sent(heard_at=asked_at)
            if row is not None:
                sent = Sent(row.run_id, _seconds(row.sent_at), asked_at)
            versions = self._catalogue.token_versions(dataset)
            tokens = {one.fingerprint: _seconds(one.built_at) for one in versions}
            self._heard = _Heard(store_id, sent, tokens)
        except (SQLAlchemyError, OSError) as error:
            logger.info("the catalogue could not be asked what was sent last: %s", error)
        finally:
            self._asking.release()


def _seconds(at: datetime) -> float:
    # SQLite gives times without their zone, which is UTC.
    return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
