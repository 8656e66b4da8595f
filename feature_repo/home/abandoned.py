"""Folders that killed processes left in the machine's temporary folder.

Feast makes one for the metrics of each process that imports it, and removes it at the process's end, unless that was a
kill. They are small, and there is one for every kill.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "feast_metrics_"
# Seconds after which a folder without files is taken to be of nobody: its owner may never have written to it
EMPTY_S = 7 * 86_400.0


def remove_abandoned() -> int:
    """Remove the folders of processes of this account that live no longer; returns how many."""
    removed = 0
    # What this process was told to use, by Feast or by the process that started it
    ours = {value for name, value in os.environ.items() if name.startswith("PROMETHEUS_MULTI")}
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            is_mine = folder.stat().st_uid == os.getuid() and str(folder) not in ours
            if is_mine and _is_abandoned(folder):
                shutil.rmtree(folder)
                removed += 1
        except OSError:
            # Somebody else removes it, or its owner is just ending.
            continue
    return removed


def _is_abandoned(folder: Path) -> bool:
    """Return whether no process that wrote to a folder lives; files are named by their process."""
    writers = {file.stem.rpartition("_")[2] for file in folder.glob("*.db")}
    if not writers:
        return time.time() - folder.stat().st_mtime > EMPTY_S
    return not any(writer.isdecimal() and is_alive(int(writer)) for writer in writers)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine lives, or has not been waited for yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another account's
    return True
