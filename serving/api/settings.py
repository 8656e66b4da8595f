"""Settings of a server: options of `python -m serving`, each also an environment variable
(`MEMOIR_SERVE_DEADLINE_MS=100`). Worker processes read them from there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from feature_repo.errors import SettingsError, nearest
from feature_repo.settings import is_of_kubernetes
from serving.api.messages import MAX_BODY_BYTES

PREFIX = "MEMOIR_SERVE_"
STOPPING = f"{PREFIX}STOPPING_FILE"  # which file's existence says that the server is about to stop
SHARED = f"{PREFIX}SHARED_METRICS"  # set where several processes count together
Scope = Literal["rank", "events", "explain", "metrics", "models"]
Positive = Annotated[float, Field(gt=0)]
Key = Annotated[str, Field(min_length=16, pattern=r"^[\x21-\x7e]+$")]  # visible ASCII


class ServeSettings(BaseSettings):
    """See the module docstring.

    >>> ServeSettings(deadline_ms=100).deadline_ms
    100.0
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    hosts: tuple[str, ...] = ()  # further names by which callers without an API key may call it
    processes: Annotated[int, Field(ge=1, le=256)] = 1  # each holds the model and all items
    bundle: Path | None = None  # default: the live one of the catalogue, which is followed
    replay: bool = False  # requests without a time are as of the end of the data

    deadline_ms: Positive = 250.0  # of a request, from its arrival; a caller may ask for less
    store_ms: Positive = 50.0  # of it, for the online store
    max_in_flight: Annotated[int, Field(ge=1)] = 16  # of a process; more are refused at once
    max_events_in_flight: Annotated[int, Field(ge=1)] = 16  # the same of `POST /v1/events`
    events_s: Positive = 5.0  # for the online store to take a user's events
    max_body_bytes: Annotated[int, Field(ge=1)] = MAX_BODY_BYTES
    body_s: Positive = 5.0  # for a body to arrive
    header_s: Annotated[int, Field(ge=1, le=60)] = 5  # for a request's head to arrive
    max_future_s: Annotated[float, Field(ge=0)] = 300.0  # by how much a time may be ahead
    state_mib: Annotated[int, Field(ge=0)] = 64  # of encoded users kept between requests, a bundle
    stale_days: Positive = 7.0  # item features that are older are said to be stale

    item_refresh_s: Annotated[float, Field(ge=0, lt=1e9)] = 300.0  # 0: never
    follow_s: Annotated[float, Field(ge=0)] = 5.0  # between looks into the catalogue; 0: never
    watch_s: Positive = 0.5  # between looks at the online store
    repair: bool = False  # an emptied store is filled again from the tables, by the jobs

    unready_s: Annotated[float, Field(ge=0)] = 0.0  # after SIGTERM, before connections are refused
    stop_s: Annotated[int, Field(ge=1)] = 10  # for requests that are under way by then

    # Callers' API keys and the scopes of each; none: every caller may do everything.
    api_keys: dict[Key, tuple[Scope, ...]] = Field(default_factory=dict, repr=False)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_key_password: SecretStr | None = None
    tls_client_ca: Path | None = None  # callers must show a certificate that it signed

    access_log: bool = False
    shadow: Path | None = None  # a bundle's folder: asked beside the one that ranks
    shadow_share: Annotated[float, Field(gt=0, le=1)] = 0.01  # of the requests
    log_folder: Path | None = None  # of what was served, with the numbers that the model saw
    log_share: Annotated[float, Field(gt=0, le=1)] = 0.01  # of the users


def settings_from(**options: Any) -> ServeSettings:
    """Settings from options and, for those that are not given, the environment.

    Raises:
        SettingsError: a value that cannot be, or an unknown variable of the server.
    """
    known = {f"{PREFIX}{name.upper()}" for name in ServeSettings.model_fields} | {STOPPING, SHARED}
    of_ours = {n: v for n, v in os.environ.items() if n.startswith(PREFIX)}
    unknown = sorted(n for n, v in of_ours.items() if n not in known and not is_of_kubernetes(n, v))
    if unknown:
        said = " ".join(f"{name}{nearest(name, sorted(known)) or '.'}" for name in unknown)
        raise SettingsError(f"environment variables that are none of the server's: {said}")
    # Kubernetes sets this one for a service that is named memoir-serve.
    port = f"{PREFIX}PORT"
    if is_of_kubernetes(port, os.environ.get(port, "")):
        options = {"port": ServeSettings.model_fields["port"].default, **options}
    try:
        return ServeSettings(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])
        if where == "api_keys":  # they must not stand in a log
            raise SettingsError(
                f"{PREFIX}API_KEYS must be JSON of keys, each of at least 16 visible ASCII characters, and their scopes, "
                f"of {list(get_args(Scope))}"
            ) from None
        raise SettingsError(
            f"{where} (--{where} or {PREFIX}{where.upper()}) cannot be {first['input']!r}: {first['msg']}"
        ) from error
    except SourceError as error:
        raise SettingsError(
            f"{str(error).split(' from ')[0]}: expected JSON in a variable {PREFIX}…"
        ) from None
