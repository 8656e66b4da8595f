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
from serving.api.logs import LogFormat
from serving.api.messages import MAX_BODY_BYTES

PREFIX = "MEMOIR_SERVE_"
# A file whose existence says that the server is about to stop
STOPPING = f"{PREFIX}STOPPING_FILE"
# Set where several processes count together
SHARED = f"{PREFIX}SHARED_METRICS"
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
    # Further names by which callers without an API key may call it
    hosts: tuple[str, ...] = ()
    # Each holds the model and all items
    processes: Annotated[int, Field(ge=1, le=256)] = 1
    # Where the model runs, such as cuda
    device: str = "cpu"
    # Steps of the model that `python -m serving compile` made for this machine are used
    compiled: bool = True
    # Default: the live one of the catalogue, which is followed
    bundle: Path | None = None
    # Requests without a time are as of the end of the data
    replay: bool = False

    # Milliseconds of a request from its arrival; a caller may ask for less
    deadline_ms: Positive = 250.0
    # Milliseconds of these for the online store
    store_ms: Positive = 50.0
    # Bytes of an answer from which on it is compressed, for callers who read gzip; 0: never
    compress_bytes: Annotated[int, Field(ge=0)] = 8_192
    # Requests of a process under way; more are refused at once
    max_in_flight: Annotated[int, Field(ge=1)] = 16
    # The same of `POST /v1/events`
    max_events_in_flight: Annotated[int, Field(ge=1)] = 16
    # For the online store to take a user's events
    events_s: Positive = 5.0
    max_body_bytes: Annotated[int, Field(ge=1)] = MAX_BODY_BYTES
    # For a body to arrive
    body_s: Positive = 5.0
    # For a request's head to arrive
    header_s: Annotated[int, Field(ge=1, le=60)] = 5
    # Seconds by which a time may be ahead
    max_future_s: Annotated[float, Field(ge=0)] = 300.0
    # Encoded users kept between requests, for each bundle
    state_mib: Annotated[int, Field(ge=0)] = 64
    # Item features that are older are said to be stale
    stale_days: Positive = 7.0

    item_refresh_s: Annotated[float, Field(ge=0, lt=1e9)] = 300.0  # 0: never
    # Seconds between questions to the catalogue; 0: never
    follow_s: Annotated[float, Field(ge=0)] = 5.0
    # Seconds between questions to the online store
    watch_s: Positive = 0.5
    # An emptied store is filled again from the tables, by the jobs
    repair: bool = False

    # After SIGTERM, before connections are refused
    unready_s: Annotated[float, Field(ge=0)] = 0.0
    # For requests that are under way by then
    stop_s: Annotated[int, Field(ge=1)] = 10

    # Callers' API keys and the scopes of each; none: every caller may do everything.
    api_keys: dict[Key, tuple[Scope, ...]] = Field(default_factory=dict, repr=False)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_key_password: SecretStr | None = None
    # Callers must show a certificate that it signed
    tls_client_ca: Path | None = None

    access_log: bool = False
    # Each line of the log as text, or as a JSON object
    log_format: LogFormat = "text"
    # A bundle's folder: asked beside the one that ranks
    shadow: Path | None = None
    shadow_share: Annotated[float, Field(gt=0, le=1)] = 0.01  # of the requests
    # Folder of what was served, with the numbers that the model saw
    log_folder: Path | None = None
    log_share: Annotated[float, Field(gt=0, le=1)] = 0.01  # of the users


def settings_from(**options: Any) -> ServeSettings:
    """Settings from options and, for those that are not given, the environment.

    Raises:
        SettingsError: a value that cannot be, or an unknown variable of the server.
    """
    # A misspelt variable must not be ignored: the server would run with a default.
    known = {f"{PREFIX}{name.upper()}" for name in ServeSettings.model_fields} | {STOPPING, SHARED}
    of_ours = {n: v for n, v in os.environ.items() if n.startswith(PREFIX)}
    unknown = sorted(n for n, v in of_ours.items() if n not in known and not is_of_kubernetes(n, v))
    if unknown:
        listed = " ".join(f"{name}{nearest(name, sorted(known)) or '.'}" for name in unknown)
        raise SettingsError(f"environment variables that are none of the server's: {listed}")
    # Kubernetes sets this one for a service that is named memoir-serve.
    port = f"{PREFIX}PORT"
    if is_of_kubernetes(port, os.environ.get(port, "")):
        options = {"port": ServeSettings.model_fields["port"].default, **options}
    try:
        return ServeSettings(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])
        # They must not stand in a log
        if where == "api_keys":
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
