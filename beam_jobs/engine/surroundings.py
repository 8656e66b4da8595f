"""The part of the launcher's environment that a run's workers need, wherever they are: variables that are no secret, and
the declaration of a dataset that lies in a person's own file.

A secret (`MEMOIR_REDIS`, `MEMOIR_REGISTRY_URL`) never travels. Where the launcher's variable says where it is kept,
`file:///run/secrets/redis` or `gs://…`, workers look there; else they have a variable of that name of their own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from beam_jobs.errors import OtherPlaceError
from feature_repo.errors import SettingsError
from feature_repo.settings import SECRETS, declared_dataset, is_reference

_TAKING = Lock()
PLAIN = ("MEMOIR_DATASET", "MEMOIR_REDIS_TYPE", "MEMOIR_REDIS_MASTER")


@dataclass(frozen=True)
class Surroundings:
    """See the module docstring.

    Args:
        dataset: its name.
        variables: that workers take unless they have their own.
        module: text of the dataset's module, where that lies outside of this package.

    Example:
        >>> Surroundings.here("online_retail").variables
        {'MEMOIR_REDIS': 'file:///run/secrets/redis'}
    """

    dataset: str
    variables: Mapping[str, str] = field(default_factory=dict)
    module: str = field(default="", repr=False)

    @staticmethod
    def here(dataset: str) -> Surroundings:
        """Return the surroundings of this process."""
        given = {name: value for name in (*PLAIN, *SECRETS) if (value := os.environ.get(name))}
        variables = {n: text for n, text in given.items() if n in PLAIN or is_reference(text)}
        declared = declared_dataset()
        module = ""
        if declared.folder and declared.name == dataset:
            module = Path(declared.folder, f"{dataset}.py").read_text()
        return Surroundings(dataset, variables, module)

    def take_place(self) -> None:
        """Make them this process's own; where it has them already nothing changes."""
        # Threads of a worker set up their steps side by side.
        with _TAKING:
            if "MEMOIR_DATASET" not in os.environ and self.module and not self._is_here():
                file = Path(tempfile.mkdtemp(prefix="memoir-dataset-"), f"{self.dataset}.py")
                file.write_text(self.module)
                os.environ["MEMOIR_DATASET"] = str(file)
            for name, value in self.variables.items():
                os.environ.setdefault(name, value)

    def _is_here(self) -> bool:
        """Return whether the variable alone leads to the module, as where its package is installed."""
        try:
            declared = declared_dataset(self.variables["MEMOIR_DATASET"])
        except SettingsError:
            return False
        return bool(declared.folder) and Path(declared.folder, f"{self.dataset}.py").is_file()


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
