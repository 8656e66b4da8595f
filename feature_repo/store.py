"""The one place that opens the Feast store for the settings in force. Imports Feast, which takes seconds: call late.

`feature_store.yaml` is the local profile of the shipped dataset, as `feast -c feature_repo …` reads it. For any other
dataset or home, a yaml of the same content with its own paths is written into that home, so that Feast's own commands
work there too: `feast -c feature_repo -f <home>/feature_store.yaml …`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from feature_repo.settings import CHECKOUT, Settings

if TYPE_CHECKING:
    from feast import FeatureStore

REPO = CHECKOUT / "feature_repo"
LOCAL_YAML = REPO / "feature_store.yaml"
PRODUCTION_YAML = REPO / "profiles" / "production.yaml"


def yaml_path(settings: Settings) -> Path:
    """The Feast configuration of these settings; written first where the home is not the default one."""
    if settings.profile == "production":
        return PRODUCTION_YAML
    if settings.is_default_home:
        return LOCAL_YAML
    text = LOCAL_YAML.read_text()
    for name in ("registry.db", "online_store.db"):
        text = text.replace(f"data/{name}", str(settings.path(name)))
    text = text.replace("dataset: online_retail", f"dataset: {settings.dataset}")
    path = settings.path("feature_store.yaml")
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def local_store_files(settings: Settings) -> list[Path]:
    """Registry and online store of the local profile, as files; none for the production profile."""
    if settings.profile == "production":
        return []
    names = ("registry.db", "online_store.db")
    return [REPO / "data" / name if settings.is_default_home else settings.path(name) for name in names]


def store_digest(settings: Settings) -> str:
    """Digest of the Feast configuration with its environment filled in: which registry and online store are meant."""
    return hashlib.sha256(os.path.expandvars(yaml_path(settings).read_text()).encode()).hexdigest()[:16]


def open_store(settings: Settings) -> FeatureStore:
    """The Feast store of these settings. Relative paths of the local profile are taken from `feature_repo/`."""
    from feast import FeatureStore
    from feast.repo_config import load_repo_config

    config = load_repo_config(REPO, yaml_path(settings))
    registry = dict(config.registry_config)
    registry["path"] = str(registry["path"]).replace("sqlite:///data/", f"sqlite:///{REPO}/data/")
    config.registry_config = registry
    config._registry = None
    return FeatureStore(config=config)


def feast_apply(settings: Settings) -> str:
    """Run `feast apply` for these settings and return what it printed.

    Raises:
        RuntimeError: it failed; the message holds its output.
    """
    environment = {**os.environ, "MEMOIR_DATASET": settings.dataset, "MEMOIR_HOME": settings.root}
    command = [str(Path(sys.executable).parent / "feast"), "-c", str(REPO), "-f", str(yaml_path(settings)), "apply"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHECKOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout
