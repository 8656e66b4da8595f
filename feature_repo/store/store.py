"""The one place that opens the Feast store for the settings in force. Imports Feast, which takes
seconds: call late.

`feature_store.yaml` is the local profile of the shipped dataset, as `feast -c feature_repo …` reads
it. For any other dataset or home, a yaml of the same content with its own paths is written into
that home, so that Feast's own commands work there too: `feast -c feature_repo -f
<home>/feature_store.yaml …`.

What an online store holds is asked of the store: each job that writes there leaves its run's id in
the view `store_epoch` once it is done. A store that was emptied, deleted or replaced has another
epoch, or none. On a Redis Cluster the same note stands in many slots, so that each shard says it for itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from feature_repo.atomic import atomic_write
from feature_repo.contract import meaning
from feature_repo.contract.contract import EPOCH_RUN, STORE_EPOCH, STORE_PART
from feature_repo.contract.meaning import Meaning
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.errors import ExpectedError, SettingsError, nearest
from feature_repo.home import engines  # noqa: F401  # settings of every engine, Feast's too
from feature_repo.home.redis_client import (
    KINDS,
    SENTINEL,
    SLOTS,
    RedisAddress,
    is_cluster,
    tag_of_slot,
)
from feature_repo.home.secrets import secret
from feature_repo.settings import CHECKOUT, SECRETS, Settings, declared_dataset

if TYPE_CHECKING:
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

REPO = CHECKOUT / "feature_repo"
LOCAL_YAML = REPO / "feature_store.yaml"
PRODUCTION_YAML = REPO / "profiles" / "production.yaml"
# The project of the local profile
PROJECT = "memoir"
REGISTRY = "registry.pb"
ONLINE = "online_store.db"
SPILL = "spill"
# Notes in the view of epochs: what columns mean, and an id that the store keeps as long as it keeps anything
COLUMNS = "columns"
STORE_ID = "store_id"
VARIABLE = re.compile(r"\$\{(\w+)\}")
# Notes of a kind on a cluster: a shard with as many slots in a row as lie between two has one
PLACES = 64


class StoreError(ExpectedError, RuntimeError):
    """The registry or the online store is not what the settings name."""


def yaml_path(settings: Settings) -> Path:
    """The Feast configuration of these settings; written first where the home is not the default
    one.
    """
    if settings.profile == "production":
        return _production_yaml(settings)
    if settings.is_default_home:
        return LOCAL_YAML
    text = LOCAL_YAML.read_text()
    for name in (REGISTRY, ONLINE, SPILL):
        text = text.replace(f"data/{name}", str(settings.path(name)))
    text = text.replace("dataset: online_retail", f"dataset: {settings.dataset}")
    path = settings.path("feature_store.yaml")
    _write_changed(path, text)
    return path


def check_profile(settings: Settings) -> None:
    """Look whether the environment has what the profile reads; nothing is written.

    Raises:
        SettingsError: it does not.
    """
    if settings.profile == "production":
        _production_text(settings)


def _production_yaml(settings: Settings) -> Path:
    """The production profile as Feast's own commands read it; where it must say more than the one in the checkout, a copy
    in the home.
    """
    text = _production_text(settings)
    if text == PRODUCTION_YAML.read_text():
        return PRODUCTION_YAML
    path = settings.path("feature_store.yaml")
    _write_changed(path, text)
    return path


def _production_text(settings: Settings) -> str:
    """The production profile: with the dataset's name where `MEMOIR_DATASET` is no plain one, and the kind of Redis.

    Raises:
        SettingsError: a variable that it reads is not set, or `MEMOIR_REDIS_TYPE` is no kind of Redis.
    """
    text = PRODUCTION_YAML.read_text()
    wanted = sorted(set(VARIABLE.findall(text)) - {"MEMOIR_DATASET"})
    missing = [name for name in wanted if not os.environ.get(name)]
    if missing:
        raise SettingsError(
            f"MEMOIR_PROFILE=production needs {' and '.join(missing)}; {PRODUCTION_YAML} says what they are"
        )
    kind = os.environ.get("MEMOIR_REDIS_TYPE") or KINDS[0]
    if kind not in KINDS:
        raise SettingsError(
            f"MEMOIR_REDIS_TYPE must be one of {KINDS}, not {kind!r}{nearest(kind, KINDS)}"
        )
    RedisAddress.parse(secret("MEMOIR_REDIS") or "")
    _look_at_url("MEMOIR_REGISTRY_URL")
    if os.environ.get("MEMOIR_DATASET") != settings.dataset:
        text = text.replace("${MEMOIR_DATASET}", settings.dataset)
    more = "" if kind == KINDS[0] else f"  redis_type: {kind}\n"
    if kind == SENTINEL:
        more += f"  sentinel_master: {os.environ.get('MEMOIR_REDIS_MASTER') or 'mymaster'}\n"
    return text.replace("  type: redis\n", f"  type: redis\n{more}")


def _look_at_url(name: str) -> None:
    """Refuse a malformed URL of a database, which would otherwise look like a database that is away.

    Raises:
        SettingsError: it is malformed; the message shows nothing of it, as it may hold a password.
    """
    try:
        make_url(secret(name) or "")
    except (ArgumentError, ValueError):
        raise SettingsError(
            f"{name} is no URL of a database: expected postgresql+psycopg://user:password@host:5432/name, any other character "
            "of a password as %XX"
        ) from None


def _write_changed(path: Path, text: str) -> None:
    """Write a file whole or not at all, and not where it says the same already."""
    if not path.exists() or path.read_text() != text:
        with atomic_write(path) as draft:
            draft.write_text(text)


def local_file(settings: Settings, name: str) -> Path:
    """Registry or online store of the local profile."""
    return REPO / "data" / name if settings.is_default_home else settings.path(name)


def store_digest(settings: Settings) -> str:
    """Digest of the Feast configuration with its environment filled in: which registry and online
    store are meant.

    The local profile's are files of the home, wherever it lies, so a home that is moved keeps its
    digest.
    """
    if settings.profile == "local":
        return "local"
    return hashlib.sha256(os.path.expandvars(_production_text(settings)).encode()).hexdigest()[:16]


def open_store(settings: Settings) -> FeatureStore:
    """The Feast store of these settings.

    Raises:
        StoreError: the registry was copied from elsewhere: its tables lie in another home.
    """
    from feast import FeatureStore

    if settings.profile == "local" and (elsewhere := tables_elsewhere(settings)):
        raise StoreError(
            f"the registry {local_file(settings, REGISTRY)} is of a home that lies elsewhere: its tables are in {elsewhere[0]}. "
            "Run `python -m feature_repo apply`, which makes this home's own"
        )
    if settings.profile == "local":
        return FeatureStore(repo_path=str(REPO), fs_yaml_file=yaml_path(settings))
    return FeatureStore(config=_production_config(settings))


def _production_config(settings: Settings) -> RepoConfig:
    """What Feast makes of the production profile, with the secrets themselves where variables say where they are kept."""
    from feast.repo_config import RepoConfig

    config = RepoConfig(**production_values(settings))
    config.repo_path = REPO
    return config


def production_values(settings: Settings) -> dict[str, Any]:
    """The production profile with its variables filled in.

    Raises:
        SettingsError: a variable that it reads is not set, or a secret is not where it is said to be kept.
    """
    import yaml

    # What a variable holds is a value, whatever it reads as: the text is YAML before it is filled in.
    raw: dict[str, Any] = _filled(yaml.safe_load(_production_text(settings)))
    return raw


def _filled(value: Any) -> Any:
    """A value of YAML with `${NAME}` replaced by what the variable holds, or says where it is kept."""
    if isinstance(value, dict):
        return {name: _filled(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_filled(each) for each in value]
    if not isinstance(value, str):
        return value
    return VARIABLE.sub(lambda found: secret(found[1]) or found[0], value)


def close_store(store: FeatureStore) -> None:
    """Let go of a store's connections, to registry and online store; what goes on using it opens new
    ones.
    """
    for name in ("write_engine", "read_engine", "engine"):
        if (engine := getattr(store.registry, name, None)) is not None:
            engine.dispose()
    online = store._get_provider().online_store
    for name in ("_client", "_conn"):
        if (held := getattr(online, name, None)) is not None:
            held.close()
            setattr(online, name, None)


def tables_elsewhere(settings: Settings) -> list[str]:
    """Files other than this home's online store in which the local registry says that its tables
    are.

    Feast would drop those tables at the next `feast apply`: they are still in use by whose they
    are.
    """
    return foreign_tables(local_file(settings, REGISTRY), local_file(settings, ONLINE))


def foreign_tables(registry: Path, online: Path) -> list[str]:
    """Files of SQLite tables that a registry file names, without `online`."""
    if not registry.exists():
        return []
    # Feast takes seconds to import: not where there is nothing to read.
    from feast.protos.feast.core.Registry_pb2 import Registry

    known = Registry.FromString(registry.read_bytes())
    files = {
        table.sqlite_table.path
        for table in known.infra.infra_objects
        if table.HasField("sqlite_table")
    }
    return sorted(file for file in files if Path(file).resolve() != online.resolve())


def missing_tables(settings: Settings, views: list[str]) -> list[str]:
    """List the views without a table in the local online store; none for the production profile, which
    has no tables.
    """
    if settings.profile == "production":
        return []
    if not local_file(settings, REGISTRY).exists():
        return views
    tables = {
        row[0]
        for row in _query(settings, "SELECT name FROM sqlite_master WHERE type = 'table'", ())
    }
    return [view for view in views if f"{PROJECT}_{view}" not in tables]


def held_epoch(settings: Settings, job: str) -> str | None:
    """The run of a job that the online store holds, as it says itself; None where it holds none.

    Of the local profile it is read without Feast, so that a skip costs nothing.
    """
    if settings.profile == "production":
        return noted(open_store(settings), job)
    query = f"SELECT value FROM {PROJECT}_{STORE_EPOCH} WHERE feature_name = ? AND instr(entity_key, CAST(? AS BLOB)) > 0"
    for (value,) in _query(settings, query, (EPOCH_RUN.name, job)):
        # A Value's string, field 2: its length in a byte, then its text
        if value[:1] == b"\x12":
            return bytes(value[2:]).decode()
    return None


def note_epoch(settings: Settings, job: str, run_id: str) -> None:
    """Leave the id of a finished run in the online store."""
    _note(settings, job, run_id)


def note_columns(settings: Settings, columns: dict[str, Any]) -> None:
    """Leave in the online store what the columns of its rows mean (`contract/meaning.py`)."""
    _note(settings, COLUMNS, json.dumps(columns))


def held_columns(store: FeatureStore) -> dict[str, Meaning]:
    """Read from an online store what the columns of its rows mean; empty where no job left that."""
    text = noted(store, COLUMNS)
    return {} if text is None else meaning.from_json(json.loads(text))


def id_of_store(settings: Settings) -> str:
    """The id of the online store; given to it where it, or a part of it, has none, as one that is new or was emptied."""
    held = held_epoch(settings, STORE_ID)
    if held is not None:
        return held
    made = uuid.uuid4().hex
    _note(settings, STORE_ID, made)
    return made


def noted(store: FeatureStore, part: str) -> str | None:
    """Read a note that a job left in an online store; None where a part of a cluster lacks it, or has another."""
    names = names_of_note(store.config.online_store, part)
    found = store.get_online_features(
        [f"{STORE_EPOCH}:{EPOCH_RUN.name}"], [{STORE_PART.join_key: name} for name in names]
    ).to_dict()[EPOCH_RUN.name]
    text: str | None = found[0]
    return text if all(one == text for one in found) else None


def names_of_note(online: Any, part: str) -> list[str]:
    """Names under which an online store has a note: one, or on a cluster one in each of `PLACES` stretches of slots."""
    if not is_cluster(online):
        return [part]
    slots = range(0, SLOTS, SLOTS // PLACES)
    return [f"{part}{{{tag_of_slot(slot)}}}" for slot in slots]


def _note(settings: Settings, part: str, text: str) -> None:
    from feature_repo.store.online_rows import write_rows

    store = open_store(settings)
    names = names_of_note(store.config.online_store, part)
    stamp = pa.array([datetime.now(UTC)] * len(names), pa.timestamp("us", "UTC"))
    rows = {
        STORE_PART.join_key: names,
        EPOCH_RUN.name: [text] * len(names),
        EVENT_TIMESTAMP: stamp,
        CREATED_TIMESTAMP: stamp,
    }
    write_rows(store, STORE_EPOCH, pa.table(rows))


def _query(settings: Settings, query: str, values: tuple[str, ...]) -> list[tuple]:
    file = local_file(settings, ONLINE)
    if not file.exists():
        return []
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return connection.execute(query, values).fetchall()
    except sqlite3.DatabaseError:
        # No such table, or no database: it holds nothing
        return []
    finally:
        connection.close()


def feast_apply(settings: Settings) -> str:
    """Run `feast apply` for these settings and return what it printed.

    Raises:
        StoreError: it failed; the message holds its output.
    """
    # One that names the same dataset by its file or package says more than the name.
    same = declared_dataset().name == settings.dataset
    named = (os.environ.get("MEMOIR_DATASET") if same else None) or settings.dataset
    if named.endswith(".py"):
        # The command works in a folder of its own.
        named = str(Path(named).expanduser().resolve())
    environment = {**os.environ, "MEMOIR_DATASET": named, "MEMOIR_HOME": settings.root}
    environment |= {name: secret(name) or "" for name in SECRETS if name in os.environ}
    command = [
        sys.executable,
        "-c",
        "from feast.cli.cli import cli; cli()",
        "-c",
        str(REPO),
        "-f",
        str(yaml_path(settings)),
        "apply",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=CHECKOUT, check=False
    )
    if done.returncode:
        log = settings.path("feast_apply.log")
        log.write_text(f"{done.stdout}\n{done.stderr}")
        last = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()][-1]
        raise StoreError(f"`feast apply` failed: {last.strip()}; all that it said is in {log}")
    return done.stdout
