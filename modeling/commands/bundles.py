"""`python -m modeling bundles`: what was exported, what is live, and making another one live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feature_repo.home.catalogue import Catalogue
from feature_repo.settings import Settings
from modeling.console import print_table, say

if TYPE_CHECKING:
    pass


def run_bundles(promote: str | None, rollback: bool) -> None:
    """List bundles; make one live."""
    settings = Settings.from_env()
    catalogue = Catalogue(settings.catalogue_url)
    dataset = settings.dataset
    # 1. Change which bundle is live.
    if promote is not None:
        catalogue.set_live(dataset, catalogue.bundle(dataset, promote).digest)
    if rollback:
        # The bundle is noted before `set_live` makes another one the live one.
        left = catalogue.live_bundle(dataset).digest
        catalogue.set_live(dataset, catalogue.live_before(dataset).digest)
        # So that its own tokens, once they are built, do not make it live again.
        catalogue.hold_back(left, "it was rolled back")
    # 2. List the bundles with their states after the change.
    live = catalogue.live_or_none(dataset)
    rows = [["bundle", "state", "ndcg@10", "gauc", "exported"]]
    for row in catalogue.bundles(dataset):
        held = catalogue.held_back(dataset, row.digest)
        if live is not None and row.digest == live.digest:
            state = "live"
        else:
            state = f"held back: {held}" if held else "recorded"
        figures = [
            f"{row.metrics[name]['value']:.4f}" if row.metrics.get(name) else "–"
            for name in ("ndcg@10", "gauc")
        ]
        rows.append(
            [f"{row.recipe}@{row.digest[:12]}", state, *figures, f"{row.created_at:%Y-%m-%d %H:%M}"]
        )
    if len(rows) == 1:
        say(
            f"no bundle of {dataset!r} yet: run `python -m modeling train`, `evaluate` and `export`"
        )
        return
    print_table(rows)
