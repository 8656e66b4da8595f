"""The jobs by name. Imports none of them until one is asked for, so that `--help` answers at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beam_jobs.engine.job import Job

MODULES = {
    "events": "beam_jobs.jobs.events",
    "user_history": "beam_jobs.jobs.user_history",
    "item_stats": "beam_jobs.jobs.item_stats",
    "training_examples": "beam_jobs.jobs.training_examples",
    "materialize": "beam_jobs.jobs.materialize",
    "summary_tokens": "beam_jobs.summary_tokens.summary_tokens",
}


def load_job(name: str) -> Job:
    """Return the job of that name.

    Example:
        >>> load_job("item_stats").doc
        'events → windowed counts and mean values by item'
    """
    job: Job = importlib.import_module(MODULES[name]).JOB
    return job
