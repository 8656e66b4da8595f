"""What makes a run stale: raw files that changed, output that is gone. Imports no Beam, so that a skip costs nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

from feature_repo.datasets import Dataset
from feature_repo.settings import Settings
from feature_repo.store import local_store_files
from feature_repo.tables import digest_of


def raw_digest(dataset: Dataset, data: str | None) -> str:
    """Digest of the names and contents of all raw files."""
    files = sorted({unit.file for unit in dataset.raw_units(data)})
    return digest_of([[Path(file).name, _sha256(file)] for file in files])


def output_is_there(job: str, settings: Settings) -> bool:
    """Whether what a finished job wrote outside its folder still exists: a deleted online store is not up to date."""
    return job != "materialize" or all(file.exists() for file in local_store_files(settings))


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
