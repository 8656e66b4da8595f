"""Options → settings, source → server processes."""

from __future__ import annotations

import math
import os
import socket
import tempfile
import time
import warnings
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from feature_repo import datasets
from feature_repo.errors import ExpectedError, SettingsError
from feature_repo.home.catalogue import Catalogue
from feature_repo.settings import Settings
from feature_repo.store.store import check_profile
from serving.api.logs import of_http_server
from serving.api.settings import PREFIX, SHARED, STOPPING, ServeSettings, settings_from
from serving.ranking.ranker import RankService

console = Console()
SWITCH_S = 0.0005
# Connections of a process with a request under way; admission refuses long before
MAX_CONNECTIONS = 4_096


def open_ranker(
    settings: Settings,
    bundle_path: str | None = None,
    *,
    replay: bool = False,
    item_refresh_s: float = 0.0,
) -> RankService:
    """The live bundle (or the given one) over the online store, warm, without a server.

    Raises:
        BundleError: the bundle must not be served.
        NoLiveBundleError: no bundle was given and none is live.
    """
    from serving.live.live import BundleSource

    return BundleSource(settings, _path(bundle_path), replay, item_refresh_s).load().ranker


def run_audit(log: str, bundle_path: str | None) -> None:
    """Print which features of logged requests differ from what the tables say.

    Raises:
        NothingToAuditError: no logged request can be computed anew.
    """
    from serving.live.live import BundleSource
    from serving.served.audit import audit
    from serving.served.served_log import read_log

    settings = Settings.from_env()
    # The log has a folder for each bundle; only that bundle's encoder knows its numbers.
    bundle = BundleSource(settings, _path(bundle_path)).open_bundle()
    found = audit(settings, read_log(Path(log, bundle.name)), bundle)
    # Only features that differ get a row: a table of all features would hide them.
    wrong = [one for one in found.features if one.differ]
    table = Table("feature", "numbers", "differ", "rate", "largest difference", box=SIMPLE_HEAD)
    for one in wrong:
        table.add_row(
            one.feature,
            f"{one.compared:,}",
            f"{one.differ:,}",
            f"{one.rate:.4%}",
            f"{one.largest:.3g}",
        )
    if wrong:
        console.print(table)
    console.print(
        f"{found.requests:,} requests, {len(found.features)} features: {len(wrong)} differ anywhere; "
        f"{found.skipped:,} requests were served without something and are not compared",
        highlight=False,
    )


def run_replay(log: str, bundle_path: str | None) -> None:
    """Print how far a bundle's lists part from the served ones.

    Raises:
        NothingToAuditError: no logged request can be ranked anew.
    """
    from serving.live.live import BundleSource
    from serving.served.audit import replay
    from serving.served.served_log import read_log

    settings = Settings.from_env()
    bundle = BundleSource(settings, _path(bundle_path)).open_bundle()
    found = replay(settings, read_log(Path(log)), bundle)
    console.print(
        f"{found.requests:,} requests: the same first item in {found.same_first:.1%}, rank correlation "
        f"{found.rank_correlation:.3f}, {found.overlap_10:.1%} of the ten best in common",
        highlight=False,
    )


def run_compile(name: str | None) -> int:
    """Compile the steps of a bundle for this machine, and say which ones. Returns 1 where none could be."""
    import torch

    from modeling.bundle import bundle as bundles
    from modeling.bundle.compiled import STEPS, compile_and_record

    torch.set_num_threads(1)
    settings = Settings.from_env()
    catalogue = Catalogue(settings.catalogue_url)
    dataset = settings.dataset
    row = catalogue.live_bundle(dataset) if name is None else catalogue.bundle(dataset, name)
    contract = datasets.load_contract(dataset)
    bundle = bundles.load(settings.path(row.path), contract, row.digest)
    console.print(f"compile {bundle.name}: a minute or two", highlight=False)
    with warnings.catch_warnings():
        # Of torch to itself
        warnings.simplefilter("ignore")
        failed = compile_and_record(bundle, settings, catalogue)
    for step, why in failed.items():
        console.print(f"  {step}: {why}; the model takes it as before", style="yellow")
    steps = [step.name for step in STEPS if step.name not in failed]
    if not steps:
        return 1
    console.print(
        f"compile {bundle.name}: {' and '.join(steps)} for this machine; servers use them from when they next load it",
        highlight=False,
    )
    return 0


def run_impressions(log: str, file: str, top: int | None) -> None:
    """Write impressions and say how many.

    Raises:
        ImpressionsError: the dataset's raw log cannot hold them.
        NoLogError: nothing was logged.
    """
    from serving.served.impressions import write_impressions
    from serving.served.served_log import read_log

    number = write_impressions(Settings.from_env(), read_log(Path(log)), Path(file), top)
    console.print(
        f"{number:,} impressions in {file}: the next `python -m beam_jobs refresh` reads them",
        highlight=False,
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class PortTakenError(ExpectedError, OSError):
    """The address cannot be listened on."""


def serve(settings: ServeSettings) -> int:
    """Serve until stopped; without a bundle that can be served, not ready, and says why.

    Raises:
        SettingsError: a setting cannot be.
        PortTakenError: the address cannot be listened on.
        DeviceError: there is no such device.
    """
    # What a worker would end with, again and again, is said once, here.
    home = Settings.from_env()
    datasets.load_contract(home.dataset)
    check_profile(home)
    if settings.bundle is not None and not (settings.bundle / "bundle.json").is_file():
        raise SettingsError(
            f"bundle (--bundle or MEMOIR_SERVE_BUNDLE) names {settings.bundle}, which is no folder of a bundle: expected bundle.json in it"
        )
    for name in ("tls_certificate", "tls_key", "tls_client_ca"):
        file = getattr(settings, name)
        if file is not None and not os.access(file, os.R_OK):
            raise SettingsError(
                f"{name} (MEMOIR_SERVE_{name.upper()}) names {file}, which is not there or cannot be read"
            )
    if settings.stop_s <= max(settings.header_s, settings.body_s):
        raise SettingsError(
            f"stop_s is {settings.stop_s}, and a head or body may take {max(settings.header_s, settings.body_s):g} s: a "
            "server that stops would cut those off; raise MEMOIR_SERVE_STOP_S, or lower HEADER_S and BODY_S"
        )
    if not (settings.api_keys or settings.tls_certificate or _is_loopback(settings.host)):
        console.print(
            f"listening on {settings.host} without API keys and TLS: whoever reaches it may read histories and add events "
            "(MEMOIR_SERVE_API_KEYS, SECURITY.md)",
            style="yellow",
        )
    if settings.device != "cpu":
        from modeling.layers.host import device_named

        device_named(settings.device)
    # First, so that nobody waits for a bundle to load to hear of it.
    port = listenable(settings.host, settings.port)
    settings = settings.model_copy(update={"port": port})
    # Workers are new processes, which learn the settings from the environment alone.
    with tempfile.TemporaryDirectory(prefix="memoir-serving-") as folder:
        os.environ[STOPPING] = str(Path(folder, "stopping"))
        os.environ |= environment_of(settings)
        # Feast makes a folder of metrics for each process that finds none, which a killed one leaves behind.
        os.environ["PROMETHEUS_MULTIPROCESS_DIR"] = folder
        # prometheus_client reads this variable once, when a worker imports it.
        if settings.processes > 1:
            os.environ |= {"PROMETHEUS_MULTIPROC_DIR": folder, SHARED: "1"}
        _granian(settings, Path(folder, "stopping")).serve()
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def environment_of(settings: ServeSettings) -> dict[str, str]:
    """Settings as worker processes read them."""
    import json

    plain = settings.model_dump(mode="json", exclude_defaults=True)
    if settings.tls_key_password is not None:
        plain["tls_key_password"] = settings.tls_key_password.get_secret_value()
    return {
        f"{PREFIX}{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in plain.items()
    }


def _granian(settings: ServeSettings, stopping: Path) -> Any:
    """The HTTP server: granian's own processes, its limits, its TLS."""
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.log import LogLevels
    from granian.server.mp import MPServer

    class Stoppable(MPServer):
        """First unready, so that a load balancer sends nothing more; then granian's own stop."""

        def signal_handler_interrupt(self, *args: Any, **kwargs: Any) -> None:
            stopping.touch()
            time.sleep(settings.unready_s)
            super().signal_handler_interrupt(*args, **kwargs)  # type: ignore[no-untyped-call]

        def signal_handler_reload(self, *args: Any, **kwargs: Any) -> None:
            """Granian would start its workers anew, all at once, each without a bundle for seconds."""
            console.print(
                "SIGHUP is ignored: bundles, tables and items are followed as they change; for other settings, start anew",
                highlight=False,
            )

    password = settings.tls_key_password
    return Stoppable(
        "serving.command:app",
        # Each worker builds the app itself, from the environment that `serve` filled.
        factory=True,
        address=settings.host,
        port=settings.port,
        interface=Interfaces.ASGI,
        # HTTP/2 by guess would keep connections that send nothing.
        http=HTTPModes.http1,
        workers=settings.processes,
        respawn_failed_workers=True,
        workers_kill_timeout=settings.stop_s,
        websockets=False,
        backpressure=MAX_CONNECTIONS,
        http1_settings=HTTP1Settings(header_read_timeout=1000 * settings.header_s),
        log_level=LogLevels.warning,
        log_dictconfig=of_http_server(settings.log_format),
        ssl_cert=settings.tls_certificate,
        ssl_key=settings.tls_key,
        ssl_key_password=None if password is None else password.get_secret_value(),
        # With a CA for clients, a client without a certificate is refused.
        ssl_ca=settings.tls_client_ca,
        ssl_client_verify=settings.tls_client_ca is not None,
    )


def app() -> Any:
    """The ASGI app of a worker process, from the environment."""
    import sys

    from serving.api.logs import configure
    from serving.api.tracing import tracing_from_env
    from serving.live.live import BundleSource, Live, Repair
    from serving.live.notes import Notes
    from serving.live.store_watch import FILLS_ONLINE, look_of
    from serving.routes.app import app_of
    from serving.routes.server import Server

    settings = settings_from()
    configure(settings.log_format)
    # The event loop and the model's thread share an interpreter: refusals and store reads must not wait
    # for five milliseconds each time the model's thread holds it.
    sys.setswitchinterval(SWITCH_S)
    home = Settings.from_env()
    source = BundleSource(
        home,
        settings.bundle,
        settings.replay,
        settings.item_refresh_s,
        settings.stale_days,
        settings.state_mib << 20,
        settings.deadline_ms,
        settings.device,
        settings.compiled,
        settings.log_folder,
    )
    notes = Notes(home, FILLS_ONLINE)
    live = Live(
        source.load,
        source.live_digest,
        look_of(home, notes),
        Repair(home) if settings.repair else None,
        source.held_columns,
        lambda: source.catalogue.problem,
        notes,
    )
    # A bundle that cannot be loaded does not end the worker: `follow` tries again.
    live.load_now()
    if live.current is not None:
        console.print(
            f"serving {live.current.name} with {len(live.current.ranker.items):,} items on "
            f"{'https' if settings.tls_certificate else 'http'}://{settings.host}:{settings.port}",
            highlight=False,
        )
    else:
        console.print(f"not ready: {live.not_loaded}", highlight=False)
    stopping = os.environ.get(STOPPING)
    shadow = None
    if settings.shadow is not None:
        # No client waits for the shadow's answers, so that no deadline may refuse its bundle.
        shadow = replace(source, bundle=settings.shadow, deadline_ms=math.inf).load
    stopping_file = Path(stopping) if stopping else None
    server = Server(live, settings, stopping_file, home, tracing_from_env())
    return app_of(server, keep_up=True, shadow=shadow)


def listenable(host: str, port: int) -> int:
    """A port that can be listened on: this one, or any free one for 0.

    Raises:
        PortTakenError: it cannot be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, port))
        except OSError as error:
            raise PortTakenError(
                f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port or --host"
            ) from error
        found: int = made.getsockname()[1]
        return found
