"""Flags → bundle, store, ranker → server."""

from __future__ import annotations

import argparse
import gc
from datetime import datetime
from pathlib import Path

from rich.console import Console

from feature_repo import datasets
from feature_repo.catalogue import Catalogue
from feature_repo.settings import Settings
from modeling import bundle as bundles
from serving.features import FeastReader, ItemTable
from serving.ranker import Ranker

console = Console()


def open_ranker(
    settings: Settings, bundle_path: str | None = None, *, replay: bool = False, item_refresh_s: float = 0.0
) -> Ranker:
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
        bundle = bundles.load(Path(live.path), contract, live.digest)
    reader = FeastReader(open_store(settings), contract, bundle.manifest["online_service"], bundle.tokens)
    known = bundle.encoder.vocabularies[contract.item.join_key].values.to_pylist()
    items = ItemTable(reader, contract, known, item_refresh_s)
    ranker = Ranker(bundle, reader, items, datetime.fromisoformat(bundle.manifest["data_as_of"]) if replay else None)
    ranker.warm_up()
    gc.collect()
    gc.freeze()  # what is loaded now stays; without this, full collections stop requests for tenths of a second
    return ranker


def serve(arguments: argparse.Namespace) -> int:
    """Serve until stopped. Returns 1 with the reason where the bundle is refused."""
    settings = Settings.from_env()
    try:
        ranker = open_ranker(
            settings, arguments.bundle, replay=arguments.replay, item_refresh_s=arguments.item_refresh_s
        )
    except (ValueError, LookupError) as error:
        console.print(f"serving: {error}", style="red", highlight=False, markup=False)
        return 1
    import uvicorn

    from serving.app import create_app

    address = f"http://{arguments.host}:{arguments.port}"
    console.print(f"serving {ranker.bundle.name} with {len(ranker.items):,} items on {address}", highlight=False)
    uvicorn.run(
        create_app(ranker),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=10,
    )
    return 0
