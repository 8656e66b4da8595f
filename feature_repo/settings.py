"""Settings from the environment: the dataset, its raw data and the working folder.
Standard library only.

| variable | meaning | default |
|---|---|---|
| `MEMOIR_DATASET` | dataset module under `feature_repo/datasets/`; or a module of yours, `my_package.my_module`, or a file, `/srv/shop/my_module.py` | `online_retail` |
| `MEMOIR_DATA` | its raw data, a folder | the shipped sample, where the dataset has one |
| `MEMOIR_HOME` | built tables, runs, bundles, catalogue | `.memoir` in the checkout; of an installed package, in the working folder |
| `MEMOIR_PROFILE` | Feast profile: `local` or `production` | `local` |
| `MEMOIR_CATALOGUE` | SQLAlchemy URL of the catalogue | SQLite under the home |
| `MEMOIR_REGISTRY_URL`, `MEMOIR_REDIS` | of the production profile; as `MEMOIR_CATALOGUE`, a value or where it is kept: `file:///run/secrets/redis`, `gs://…` | |
| `MEMOIR_REDIS_TYPE` | of the production profile: `redis`, `redis_cluster` or `redis_sentinel` | `redis` |
| `MEMOIR_REDIS_MASTER` | what Sentinels call the master | `mymaster` |
| `MEMOIR_SERVE_…` | of the server: `serving/api/settings.py` | |
| `MEMOIR_REQUIRE_SERVICES` | tests: a missing service is a failure | |
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from feature_repo.errors import SettingsError, nearest

# Where the code lies; of an installed package, among all others.
CHECKOUT = Path(__file__).resolve().parent.parent
IS_INSTALLED = not (CHECKOUT / "pyproject.toml").is_file()
# Where a person works, and where what they make lies unless they say otherwise
WORK = Path.cwd() if IS_INSTALLED else CHECKOUT
DEFAULT_DATASET = "online_retail"
PROFILES = ("local", "production")
# Prefix of the server's own settings: serving/api/settings.py
OF_THE_SERVER = "MEMOIR_SERVE_"
# Kubernetes sets these for every service that is named memoir, or memoir-something.
LINK = re.compile(
    r"MEMOIR(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
# What they hold shows to nobody: no log, no plan of a run
SECRETS = ("MEMOIR_REDIS", "MEMOIR_REGISTRY_URL")
# A variable that begins so says where a secret is kept
KEPT = ("file:///", "gs://", "s3://")
VARIABLES = frozenset(
    f"MEMOIR_{name}"
    for name in (
        "DATASET",
        "DATA",
        "HOME",
        "PROFILE",
        "CATALOGUE",
        "REGISTRY_URL",
        "REDIS",
        "REDIS_TYPE",
        "REDIS_MASTER",
        "REQUIRE_SERVICES",
    )
)


@dataclass(frozen=True)
class Settings:
    """One run's surroundings. `home` is this dataset's own folder (or object-store URI) under
    `MEMOIR_HOME`.
    """

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
            SettingsError: a variable that begins with `MEMOIR_` is unknown, `MEMOIR_PROFILE` is no
                profile, or `MEMOIR_DATA` is no folder.
        """
        refuse_unknown_variables()
        dataset = declared_dataset().name
        root = os.environ.get("MEMOIR_HOME") or str(WORK / ".memoir")
        if "://" not in root:
            root = str(Path(root).resolve())
        profile = os.environ.get("MEMOIR_PROFILE") or "local"
        if profile not in PROFILES:
            raise SettingsError(
                f"MEMOIR_PROFILE must be one of {PROFILES}, not {profile!r}{nearest(profile, PROFILES)}"
            )
        data = os.environ.get("MEMOIR_DATA") or None
        if data is not None and "://" not in data and not Path(data).is_dir():
            what = "a file" if Path(data).exists() else "not there"
            raise SettingsError(
                f"MEMOIR_DATA must name the folder that holds the raw data; {data} is {what}"
            )
        home = f"{root}/{dataset}"
        catalogue = (
            os.environ.get("MEMOIR_CATALOGUE") or f"sqlite:///{_local(home, dataset)}/catalogue.db"
        )
        default = root == str(CHECKOUT / ".memoir") and dataset == DEFAULT_DATASET
        return Settings(dataset, data, home, profile, catalogue, default)

    @property
    def root(self) -> str:
        """The value of `MEMOIR_HOME`: the home without the dataset."""
        return self.home.rsplit("/", 1)[0]

    def path(self, *parts: str) -> Path:
        """A local path, its folder made: under the home, or under `.memoir` where the home is an
        object store.

        Runs, bundles, Data Docs and Feast's configuration are files of the machine that trains and
        serves.
        """
        path = Path(_local(self.home, self.dataset), *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True)
class Declared:
    """A dataset by name, and the folder of its module if that lies outside of this checkout."""

    name: str
    folder: str = ""


def declared_dataset(value: str | None = None) -> Declared:
    """The dataset that `MEMOIR_DATASET` names: one of this checkout, a module, or a file.

    Args:
        value: in place of the variable's own.

    Raises:
        SettingsError: there is no such module or file.
    """
    value = value or os.environ.get("MEMOIR_DATASET") or DEFAULT_DATASET
    if value.endswith(".py") or "/" in value:
        file = Path(value).expanduser().resolve()
        if not file.is_file():
            raise SettingsError(f"MEMOIR_DATASET names the file {value}, which is not there")
        return Declared(file.stem, str(file.parent))
    if "." not in value:
        return Declared(value)
    try:
        found = find_spec(value)
    except ModuleNotFoundError:
        found = None
    if found is None or not found.origin:
        raise SettingsError(
            f"MEMOIR_DATASET names the module {value}, which cannot be imported: install its package, or put its folder "
            "on PYTHONPATH"
        )
    return Declared(value.rpartition(".")[2], str(Path(found.origin).parent))


def is_reference(text: str) -> bool:
    """Return whether a variable says where a secret is kept: a file, or an object of a store that Arrow reads."""
    return text.startswith(KEPT)


def is_of_kubernetes(name: str, value: str) -> bool:
    """Return whether Kubernetes set a variable, to describe one of its services."""
    link = value.startswith(("tcp://", "udp://", "sctp://"))
    return LINK.fullmatch(name) is not None or (name.endswith("_PORT") and link)


def refuse_unknown_variables() -> None:
    """Refuse a misspelt variable, which would otherwise be ignored without a word.

    Raises:
        SettingsError: a variable begins with `MEMOIR_` and is not a setting.
    """
    unknown = sorted(
        name
        for name, value in os.environ.items()
        if name.startswith("MEMOIR_")
        and name not in VARIABLES
        and not name.startswith(OF_THE_SERVER)
        and not is_of_kubernetes(name, value)
    )
    if unknown:
        listed = " ".join(f"{name}{nearest(name, VARIABLES) or '.'}" for name in unknown)
        raise SettingsError(
            f"environment variables that are none of Memoir's: {listed} There are {', '.join(sorted(VARIABLES))}"
        )


def _local(home: str, dataset: str) -> str:
    return str(WORK / ".memoir" / dataset) if "://" in home else home
