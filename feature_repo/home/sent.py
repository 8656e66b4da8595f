"""Notes in the catalogue of what was sent to online stores last: what a store says of itself is lost with it."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy.orm import Session

from feature_repo.home.catalogue import Catalogue, SentRun


def note_sent(catalogue: Catalogue, dataset: str, store: str, job: str, run_id: str) -> None:
    """Note which run of a job an online store holds from now on.

    Args:
        store: its id, as it says itself.
    """
    with Session(catalogue.engine) as session, session.begin():
        row = SentRun(
            dataset=dataset,
            store=store,
            job=job,
            run_id=run_id,
            sent_at=datetime.now(UTC),
        )
        session.merge(row)


def sent_run(catalogue: Catalogue, dataset: str, store: str, job: str) -> SentRun | None:
    """Return the run that a job sent last to an online store; None where none is noted."""
    with Session(catalogue.engine) as session:
        return session.get(SentRun, (dataset, store, job))
