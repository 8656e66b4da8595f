"""Options → bundle, store, ranker → server."""

from __future__ import annotations

import gc
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from feature_repo import datasets
from feature_repo.catalogue import Catalogue
from feature_repo.errors import ExpectedError
from feature_repo.settings import Settings
from modeling import bundle as bundles
from serving.features import FeastReader
from serving.items import ItemTable, published_rows
from serving.ranker import RankService

console = Console()


def open_ranker(
    settings: Settings,
    bundle_path: str | None = None,
    *,
    replay: bool = False,
    item_refresh_s: float = 0.0,
) -> RankService:
    """The live bundle (or the given one) over the online store, warm.

    Raises:
        BundleError: the bundle must not be served.
        NoLiveBundleError: no bundle was given and none is live.
    """
    import torch

    from feature_repo.store import open_store

    torch.set_num_threads(1)
    contract = datasets.load_contract(settings.dataset)
    if bundle_path:
        bundle = bundles.load(Path(bundle_path), contract)
    else:
        live = Catalogue(settings.catalogue_url).live_bundle(settings.dataset)
        bundle = bundles.load(settings.path(live.path), contract, live.digest)
    contract = (
        bundle.encoder.contract
    )  # the bundle's own: what it was trained under, the one in force has
    reader = FeastReader(
        open_store(settings), contract, bundle.manifest["online_service"], bundle.tokens
    )
    # Of its own, so that no request waits for the store while items are read.
    item_reader = FeastReader(open_store(settings), contract, bundle.manifest["online_service"])

    def load_items() -> pa.Table:
        known = bundle.encoder.items.values.to_pylist()
        rows = published_rows(settings, contract)
        return item_reader.read_items(known) if rows is None else rows

    items = ItemTable(bundle.encoder, item_reader.read_items, load_items, item_refresh_s)
    ranker = RankService(
        bundle,
        reader,
        items,
        datetime.fromisoformat(bundle.manifest["data_as_of"]) if replay else None,
    )
    ranker.warm_up()
    gc.collect()
    gc.freeze()  # what is loaded now stays; without this, full collections stop requests for tenths of a second
    return ranker


@dataclass(frozen=True)
class ServeOptions:
    """What a server is started with; see its help."""

    host: str
    port: int
    bundle: str | None
    replay: bool
    item_refresh_s: float


class PortTakenError(ExpectedError, OSError):
    """The address cannot be listened on."""


def serve(options: ServeOptions) -> int:
    """Serve until stopped.

    Raises:
        PortTakenError: the address cannot be listened on.
        BundleError, NoLiveBundleError: there is nothing to serve.
    """
    settings = Settings.from_env()
    listening = listen(
        options.host, options.port
    )  # first, so that nobody waits for a bundle to load to hear of it
    ranker = open_ranker(
        settings, options.bundle, replay=options.replay, item_refresh_s=options.item_refresh_s
    )
    import uvicorn

    from serving.app import create_app

    host, port = listening.getsockname()[:2]
    console.print(
        f"serving {ranker.bundle.name} with {len(ranker.items):,} items on http://{host}:{port}",
        highlight=False,
    )
    config = uvicorn.Config(
        create_app(ranker), log_level="warning", access_log=False, timeout_keep_alive=10
    )
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, not yet listened on.

    Raises:
        PortTakenError: it cannot be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise PortTakenError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port or --host"
        ) from error
    return made
