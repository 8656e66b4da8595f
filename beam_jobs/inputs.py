"""What makes a run stale: raw files that changed, output that is gone. Imports no Beam, so that a skip costs nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from feature_repo import datasets
from feature_repo.datasets import Dataset
from feature_repo.settings import Settings
from feature_repo.store import local_store_files, store_digest
from feature_repo.tables import JobFolder, digest_of

# Raised when the same input would give other bytes: then everything that the job built is stale.
VERSIONS = {
    "events": 1,
    "user_history": 1,
    "item_stats": 1,
    "training_examples": 1,
    "materialize": 1,
    "summary_tokens": 1,
}

WRITES_ONLINE = ("materialize", "summary_tokens")


def current_inputs(job: str, names: Iterable[str], settings: Settings) -> dict[str, str]:
    """Digest of each input as it is now.

    Args:
        names: "code", "store", "raw" or the name of a job; a job that has not run has no digest.
    """
    found = {}
    for name in names:
        if name == "code":
            found[name] = str(VERSIONS[job])
        elif name == "store":
            found[name] = store_digest(settings)
        elif name == "raw":
            found[name] = raw_digest(datasets.load(settings.dataset), settings.data)
        elif manifest := JobFolder(settings.home, name).manifest():
            found[name] = manifest.digest
    return found


def raw_digest(dataset: Dataset, data: str | None) -> str:
    """Digest of the names and contents of all raw files."""
    files = sorted({unit.file for unit in dataset.raw_units(data)})
    return digest_of([[Path(file).name, _sha256(file)] for file in files])


def output_is_there(job: str, settings: Settings) -> bool:
    """Whether what a finished job wrote outside its folder is still there: a deleted online store is not up to date.

    An online store elsewhere cannot be known without asking it, so `materialize` always runs in the production profile;
    `summary_tokens` is asked for with `--refill`.
    """
    files = local_store_files(settings)
    if job not in WRITES_ONLINE:
        return True
    return all(file.exists() for file in files) and (bool(files) or job != "materialize")


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
