"""Whose stage 1 makes the summary tokens that a bundle reads."""

from __future__ import annotations

from collections.abc import Sequence

from feature_repo.home.catalogue import BundleRow
from feature_repo.settings import Settings
from modeling.bundle.bundle import read_manifest


def maker_among(settings: Settings, rows: Sequence[BundleRow], tokens: str) -> BundleRow | None:
    """The first bundle of these whose own stage 1 makes tokens of a version; None where there is none that can be read.

    Args:
        rows: the newest first, as `Catalogue.bundles` has them.
    """
    for row in rows:
        if row.tokens == tokens and _makes_some(settings, row):
            return row
    return None


def _makes_some(settings: Settings, row: BundleRow) -> bool:
    try:
        manifest = read_manifest(settings.path(row.path))
        return bool(manifest["tokens"]["made_here"])
    except (OSError, ValueError, KeyError, TypeError):
        # A bundle whose folder is gone or damaged makes nothing; loading says why.
        return False
