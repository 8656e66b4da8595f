"""The resolved options of a run of `summary_tokens`: which bundle, which tokens, which names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from beam_jobs.engine.options import TokenOptions
from beam_jobs.engine.plan import RunPlan


@dataclass(frozen=True)
class ResolvedOptions(TokenOptions):
    """Options, and the bundle and tokens that they mean."""

    recipe: str = ""
    version: str = ""
    shape: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PreparedOptions(ResolvedOptions):
    """All that a worker must know; made once the run holds its folder.

    Args:
        path: of the bundle, on the machine that planned the run.
        kept: where it is below a home that is an object store.
        versions: how each version in the manifest was begun: kind, snapshots, code, and the runs'
            `as_of` so far.
        run_number: of the run, in the names of its parts.
        log_parts: parts of the history log.
        earlier_as_of: instants at which earlier runs of this version ended, microseconds.
    """

    path: str = ""
    kept: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    run_number: int = 0
    computed_at_micros: int = 0
    log_parts: int = 0
    first_event_micros: int = 0
    earlier_as_of: tuple[int, ...] = ()


def prepared(plan: RunPlan) -> PreparedOptions:
    """The options of a run that is under way."""
    assert isinstance(plan.options, PreparedOptions)
    return plan.options
