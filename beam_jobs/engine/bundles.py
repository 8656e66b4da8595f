"""Bundles as jobs read them, without their model: the contract that one was trained under, and what its
columns meant.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType

from beam_jobs.errors import BreaksLiveError, OtherPlaceError
from feature_repo.contract import meaning
from feature_repo.contract.contract import Contract, contract
from feature_repo.contract.declarations import lacks, spec_of
from feature_repo.contract.meaning import Meaning, Moved
from feature_repo.home.tables import JobFolder

MANIFEST = "bundle.json"
GOES_ON = (
    "Train and export a bundle first; training needs no materialize. Or pass --break_live, where servers are to rank "
    "all the same"
)


@dataclass(frozen=True)
class TrainedBundle:
    """A bundle as a job sees it.

    Args:
        name: recipe and digest, as answers show it.
        learned: what the columns meant that it learned from.
    """

    name: str
    contract: Contract
    learned: dict[str, Meaning]

    def moved(self, columns: Mapping[str, Any]) -> list[Moved]:
        """Compare these columns with the ones in a manifest of `events`, the farthest first."""
        return meaning.moved(self.learned, meaning.from_json(columns))

    def refuse_lacking(self, found: Contract) -> None:
        """Refuse a contract that lacks some of what the bundle reads.

        Raises:
            BreaksLiveError: it does.
        """
        if lacking := lacks(self.contract, found):
            raise BreaksLiveError(
                f"the live bundle {self.name} reads {', '.join(lacking)}, which the contract in force does not have: its "
                f"servers would rank from nothing. {GOES_ON}"
            )

    def refuse_other_meaning(self, columns: Mapping[str, Any], how_on: str = GOES_ON) -> None:
        """Refuse tables whose columns mean something else than what the bundle learned from.

        Args:
            columns: as their manifest says it.

        Raises:
            BreaksLiveError: a column is declared or made otherwise by now, and its values moved.
        """
        if otherwise := [str(one) for one in self.moved(columns) if one.means_otherwise]:
            raise BreaksLiveError(
                f"bundle {self.name} learned from columns that mean something else by now: {'; '.join(otherwise)}. It "
                f"would rank from numbers that it does not understand. {how_on}"
            )


def keep_bundle(home: str, folder: Path, kept: str) -> None:
    """Copy a bundle into a home that is an object store, where workers find it; a home on disk holds it already.

    Args:
        folder: of the bundle.
        kept: its place below the home.
    """
    if "://" not in home:
        return
    store = JobFolder(home, kept)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = f"{store.root}/{file.relative_to(folder).as_posix()}"
        # A bundle's name holds its digest, so that a file which is there is the same one.
        if store.filesystem.get_file_info(place).size != file.stat().st_size:
            store.write_bytes(place, file.read_bytes())


def bundle_folder(home: str, folder: Path, kept: str) -> Path:
    """The folder of a bundle on this machine: where the run's planner had it, or a copy from the home.

    Raises:
        OtherPlaceError: it is in neither.
    """
    if (folder / MANIFEST).is_file():
        return folder
    store = JobFolder(home, kept)
    found = FileSelector(store.root, recursive=True, allow_not_found=True)
    files = [one for one in store.filesystem.get_file_info(found) if one.type == FileType.File]
    if not files:
        raise OtherPlaceError(
            f"a worker finds the bundle neither at {folder} nor below {home}/{kept}: set MEMOIR_HOME to a folder or an object store "
            "that workers share"
        )
    copy = Path(tempfile.mkdtemp(prefix="memoir-bundle-"), folder.name)
    for one in files:
        # Some file systems give paths without the first slash.
        _, _, below = one.path.partition(f"{store.root.strip('/')}/")
        target = copy / below
        target.parent.mkdir(parents=True, exist_ok=True)
        data = store.read_bytes(one.path)
        assert data is not None, one.path
        target.write_bytes(data)
    return copy


def bundle_at(path: Path, name: str) -> TrainedBundle | None:
    """The bundle in a folder; None where no server could load it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        needed = contract(spec_of(manifest["contract"]))
        return TrainedBundle(name, needed, meaning.from_json(manifest.get("columns", {})))
    except (OSError, ValueError, KeyError, TypeError):
        return None
