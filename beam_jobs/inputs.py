"""Digests of a dataset's raw files: what makes a run stale. Imports no Beam, so that a skip costs nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

from feature_repo.datasets import Dataset
from feature_repo.tables import digest_of


def raw_digest(dataset: Dataset, data: str | None) -> str:
    """Digest of the names and contents of all raw files."""
    files = sorted({unit.file for unit in dataset.raw_units(data)})
    return digest_of([[Path(file).name, _sha256(file)] for file in files])


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
