"""Which compiled steps of bundles there are, by the catalogue: code that is run if its hash is the recorded one."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from feature_repo.home.catalogue import Catalogue, CompiledRow


def record_step(
    catalogue: Catalogue, *, digest: str, machine: str, step: str, path: str, sha256: str
) -> None:
    """Record a compiled step of a bundle."""
    with Session(catalogue.engine) as session, session.begin():
        row = CompiledRow(
            digest=digest,
            machine=machine,
            step=step,
            path=path,
            sha256=sha256,
            made_at=datetime.now(UTC),
        )
        session.merge(row)


def recorded_steps(catalogue: Catalogue, digest: str, machine: str) -> list[CompiledRow]:
    """The compiled steps of a bundle for a kind of machine, the newest first."""
    with Session(catalogue.engine) as session:
        query = select(CompiledRow).where(
            CompiledRow.digest == digest, CompiledRow.machine == machine
        )
        return list(session.scalars(query.order_by(CompiledRow.made_at.desc())))
