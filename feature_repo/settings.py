"""Where things are: the dataset, its raw data and the working folder, from the environment. Standard library only.

| variable | meaning | default |
|---|---|---|
| `MEMOIR_DATASET` | dataset module under `feature_repo/datasets/` | `online_retail` |
| `MEMOIR_DATA` | its raw data, a folder | the shipped sample, where the dataset has one |
| `MEMOIR_HOME` | built tables, runs, bundles, catalogue | `.memoir` in the checkout |
| `MEMOIR_PROFILE` | Feast profile: `local` or `production` | `local` |
| `MEMOIR_CATALOGUE` | SQLAlchemy URL of the catalogue | SQLite under the home |
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
DEFAULT_DATASET = "online_retail"


@dataclass(frozen=True)
class Settings:
    """One run's surroundings. `home` is this dataset's own folder (or object-store URI) under `MEMOIR_HOME`."""

    dataset: str
    data: str | None
    home: str
    profile: str
    catalogue_url: str
    is_default_home: bool

    @staticmethod
    def from_env() -> Settings:
        """Read the environment.

        Raises:
            ValueError: `MEMOIR_PROFILE` is not a known profile.
        """
        dataset = os.environ.get("MEMOIR_DATASET", DEFAULT_DATASET)
        root = os.environ.get("MEMOIR_HOME", str(CHECKOUT / ".memoir"))
        if "://" not in root:
            root = str(Path(root).resolve())
        profile = os.environ.get("MEMOIR_PROFILE", "local")
        if profile not in ("local", "production"):
            raise ValueError(f"MEMOIR_PROFILE must be 'local' or 'production', not {profile!r}")
        home = f"{root}/{dataset}"
        catalogue = os.environ.get("MEMOIR_CATALOGUE") or f"sqlite:///{_local(home, dataset)}/catalogue.db"
        default = root == str(CHECKOUT / ".memoir") and dataset == DEFAULT_DATASET
        return Settings(dataset, os.environ.get("MEMOIR_DATA"), home, profile, catalogue, default)

    @property
    def root(self) -> str:
        """What `MEMOIR_HOME` is: the home without the dataset."""
        return self.home.rsplit("/", 1)[0]

    def path(self, *parts: str) -> Path:
        """A local path, its folder made: under the home, or under `.memoir` where the home is an object store.

        Runs, bundles, Data Docs and Feast's configuration are files of the machine that trains and serves.
        """
        path = Path(_local(self.home, self.dataset), *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _local(home: str, dataset: str) -> str:
    return str(CHECKOUT / ".memoir" / dataset) if "://" in home else home
