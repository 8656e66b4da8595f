"""Beam's runner on Dask: what it lacks by itself. Beam (2.77) does not know it by a short name, registers none of its options,
and puts 128 elements of a source into one task.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from beam_jobs.errors import OptionsError, OtherPlaceError

NAME = "daskrunner"
FULL_NAME = "apache_beam.runners.dask.dask_runner.DaskRunner"
# A unit of work is a task
PARTITIONS = ("--dask_npartitions", "--dask_partition_size")


def is_dask(runner: str) -> bool:
    """Return whether a name of a runner means this one."""
    return runner.lower() in ("dask", NAME, FULL_NAME.lower())


def with_dask(beam_args: Sequence[str]) -> list[str]:
    """Arguments as Beam takes them; others than Dask's stay as they are.

    Raises:
        OptionsError: Dask's scheduler is not installed.
    """
    named = [a for a in beam_args if a.startswith("--runner=") and is_dask(a.partition("=")[2])]
    if not named:
        return list(beam_args)
    try:
        import distributed  # noqa: F401
        from apache_beam.runners.dask import dask_runner  # noqa: F401  # registers its options
    except ImportError as error:
        raise OptionsError(
            f"--runner=dask needs the extra `dask`, pip install 'memoir-rec[dask]': {error}"
        ) from error
    found = [a for a in beam_args if a not in named]
    if not any(a.startswith(PARTITIONS) for a in found):
        found.append("--dask_partition_size=1")
    return [f"--runner={FULL_NAME}", *found]


def refuse_own_hashes() -> None:
    """Refuse to work in a process of Dask's whose hashes of texts are its own: Dask gathers what belongs together by
    them, and would part it without a word.

    Raises:
        OtherPlaceError: this is one.
    """
    if "distributed.worker" not in sys.modules:
        return
    from distributed.worker import get_worker

    try:
        get_worker()
    except ValueError:
        return
    if os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise OtherPlaceError(
            "a Dask worker hashes texts by a seed of its own, so that rows which belong together would be parted: start workers by "
            "`dask worker`, whose nanny sets PYTHONHASHSEED alike for all, or set it yourself"
        )
