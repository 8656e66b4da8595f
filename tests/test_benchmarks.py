"""Every benchmark of every room is called alike (CONTRIBUTING.md)."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

# Runs one peer's code for `ctr` and `sequence`, in a process of its own
PEERS = "modeling.benchmarks.peers"
ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.glob("*/benchmarks/*.py")
    if 'if __name__ == "__main__"' in path.read_text()
} - {PEERS}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_benchmarks_explain_themselves(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: importing torch anew for each would take a minute."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(name, run_name="__main__")
    said = capsys.readouterr().out
    assert "--json" in said
    assert "--quick" in said
