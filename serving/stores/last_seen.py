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
import secrets
import tempfile
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_repo.atomic import atomic_write
from feature_repo.errors import ExpectedError
from feature_repo.settings import Settings
from feature_repo.store.store import REPO, production_values

if TYPE_CHECKING:
    from feast import FeatureStore

FOLDER = "last_seen"
KEY_BYTES = 32
# A copy of the same content is signed anew after so long, so that "as of" says when it was last right.
RENEWED_S = 600.0
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
class Copy:
    """Something as it was at one time.

    Args:
        content: of JSON.
        at: when, as an ISO time.
    """

    content: dict[str, Any]
    at: str


def keep_live(settings: Settings, live: LiveBundle) -> None:
    """Keep which bundle is live."""
    _keep(settings, "live", asdict(live))


def keep_registry(settings: Settings, store: FeatureStore) -> None:
    """Keep a store's registry, where it is that of the database."""
    # What was itself read from the copy would make it look younger than it is.
    if store.config.registry.registry_type == "sql":
        proto = store.registry.cached_registry_proto.SerializeToString()
        _keep(settings, "registry", {"proto": base64.b64encode(proto).decode()})


def last_live(settings: Settings) -> tuple[LiveBundle, str]:
    """The bundle that was live when a server of this home saw the catalogue last, and when that was.

    Raises:
        NothingSeenError: see `last_seen`.
    """
    seen = last_seen(settings, "live")
    return LiveBundle(**seen.content), seen.at


def store_from_copy(settings: Settings) -> FeatureStore:
    """The Feast store of these settings over the copied registry.

    Raises:
        NothingSeenError: see `last_seen`.
    """
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

    seen = last_seen(settings, "registry")
    raw = production_values(settings)
    logger.error(
        "the registry's database is away: its tables and features are read from the copy of %s",
        seen.at,
    )
    # Feast reads the file again and again, and may write to it: one of this process, and not the copy.
    file = Path(_own_folder().name, "registry.pb")
    with atomic_write(file) as draft:
        draft.write_bytes(base64.b64decode(seen.content["proto"]))
    raw["registry"] = {"registry_type": "file", "path": str(file), "cache_ttl_seconds": 0}
    return FeatureStore(config=RepoConfig(**raw, repo_path=REPO))


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that ends with the process."""
    return tempfile.TemporaryDirectory(prefix="memoir-registry-")


def last_seen(settings: Settings, name: str) -> Copy:
    """Read a copy.

    Raises:
        NothingSeenError: there is no copy, or not as a server of this home wrote it.
    """
    try:
        file = _file(settings, name)
        stored = json.loads(file.read_text())
        made = Copy(stored["content"], stored["at"])
        right = hmac.compare_digest(stored["signature"], _signature(settings, name, made))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NothingSeenError(f"the copy of the {name} cannot be read: {error}") from error
    if not right:
        raise NothingSeenError(f"{file} is not as a server of this home wrote it")
    return made


def _keep(settings: Settings, name: str, content: dict[str, Any]) -> None:
    """Keep a copy for servers that start later; a home that cannot be written keeps none, which is logged."""
    now = datetime.now(UTC)
    try:
        file = _file(settings, name)
        with suppress(NothingSeenError):
            before = last_seen(settings, name)
            age = now - datetime.fromisoformat(before.at)
            if before.content == content and age.total_seconds() < RENEWED_S:
                return
        made = Copy(content, now.isoformat(timespec="seconds"))
        signed = {**asdict(made), "signature": _signature(settings, name, made)}
        with atomic_write(file) as draft:
            draft.write_text(json.dumps(signed))
    except OSError as error:
        logger.info("no copy of %s is kept, the home cannot be written: %s", name, error)


def _file(settings: Settings, name: str) -> Path:
    return settings.path(FOLDER, f"{settings.profile}-{name}.json")


def _signature(settings: Settings, name: str, made: Copy) -> str:
    text = json.dumps([settings.dataset, name, made.content, made.at], sort_keys=True)
    return hmac.new(_key(settings), text.encode(), hashlib.sha256).hexdigest()


def _key(settings: Settings) -> bytes:
    """The home's key, made by the first process that needs it."""
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
