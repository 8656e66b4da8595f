"""The registry and the live bundle as a server of this home saw them last: what a server starts from while their
database is away.

The copy lies beside the home's bundles and is signed with a key of the home's, so that neither half a file nor one from
elsewhere is served from. A home that cannot be written keeps none.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_repo.atomic import atomic_write
from feature_repo.errors import ExpectedError
from feature_repo.settings import Settings
from feature_repo.store.store import REPO, yaml_path

if TYPE_CHECKING:
    from feast import FeatureStore

FOLDER = "last_seen"
KEY_BYTES = 32
logger = logging.getLogger(__name__)


class NothingSeenError(ExpectedError, LookupError):
    """No server of this home has kept a copy, or it is damaged."""


@dataclass(frozen=True)
class LiveBundle:
    """The live bundle, as the catalogue names it.

    Args:
        path: below the home.
    """

    digest: str
    path: str


@dataclass(frozen=True)
class Seen:
    """Registry and live bundle at one time.

    Args:
        registry: Feast's, as its protobuf is written.
        live: None where no bundle was live.
        at: when, as an ISO time.
    """

    registry: bytes
    live: LiveBundle | None
    at: str


def keep(settings: Settings, registry: bytes, live: LiveBundle | None) -> None:
    """Keep a copy for servers that start later; a home that cannot be written keeps none, which is logged."""
    content = {
        "registry": base64.b64encode(registry).decode(),
        "live": None if live is None else asdict(live),
    }
    file = settings.path(FOLDER, f"{settings.profile}.json")
    try:
        with suppress(NothingSeenError):
            before = last_seen(settings)
            if (before.registry, before.live) == (registry, live):
                return
        at = datetime.now(UTC).isoformat(timespec="seconds")
        signed = {"content": content, "at": at, "signature": _signature(settings, content, at)}
        with atomic_write(file) as draft:
            draft.write_text(json.dumps(signed))
    except OSError as error:
        logger.info(
            "no copy of registry and catalogue is kept, the home cannot be written: %s", error
        )


def last_seen(settings: Settings) -> Seen:
    """Read the copy.

    Raises:
        NothingSeenError: there is none, or not as a server of this home wrote it.
    """
    file = settings.path(FOLDER, f"{settings.profile}.json")
    try:
        stored = json.loads(file.read_text())
        content, at = stored["content"], stored["at"]
        right = hmac.compare_digest(stored["signature"], _signature(settings, content, at))
        live = content["live"] and LiveBundle(**content["live"])
        registry = base64.b64decode(content["registry"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NothingSeenError(f"{file} cannot be read: {error}") from error
    if not right:
        raise NothingSeenError(f"{file} is not as a server of this home wrote it")
    return Seen(registry, live, at)


def store_from_copy(settings: Settings) -> FeatureStore:
    """The Feast store of these settings over the copied registry.

    Raises:
        NothingSeenError: see `last_seen`.
    """
    import yaml
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

    seen = last_seen(settings)
    raw = yaml.safe_load(os.path.expandvars(yaml_path(settings).read_text()))
    # Feast may write to a file of its own; the copy stays as it was signed.
    file = Path(tempfile.mkdtemp(prefix="memoir-registry-"), "registry.pb")
    file.write_bytes(seen.registry)
    raw["registry"] = {"registry_type": "file", "path": str(file), "cache_ttl_seconds": 0}
    logger.error(
        "the registry's database is away: its tables and features are read from the copy of %s",
        seen.at,
    )
    return FeatureStore(config=RepoConfig(**raw, repo_path=REPO))


def is_of_database(store: FeatureStore) -> bool:
    """Return whether a store's registry is read from its database, and not from a copy."""
    return bool(store.config.registry.registry_type == "sql")


def _signature(settings: Settings, content: dict[str, Any], at: str) -> str:
    text = json.dumps([settings.dataset, content, at], sort_keys=True)
    return hmac.new(_key(settings), text.encode(), hashlib.sha256).hexdigest()


def _key(settings: Settings) -> bytes:
    """The home's key, made by whoever needs it first."""
    file = settings.path(FOLDER, "key")
    if not file.exists():
        draft = file.with_name(f".key.{uuid.uuid4().hex}")
        draft.touch(mode=0o600)
        draft.write_bytes(secrets.token_bytes(KEY_BYTES))
        # Of several processes one comes first, and its key stays.
        with suppress(FileExistsError):
            file.hardlink_to(draft)
        draft.unlink()
    return file.read_bytes()
