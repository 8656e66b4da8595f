"""The notebook runs, cell after cell, on the synthetic shop."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "serving" / "walkthrough.ipynb"


def test_the_walkthrough_runs(
    trained_shop: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MEMOIR_HOME", trained_shop.settings.root)
    monkeypatch.setenv("MEMOIR_DATA", str(trained_shop.data))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)  # what it shows is the reader's own data
    (tmp_path / "walkthrough.py").write_text("\n".join("".join(c["source"]) for c in code))
    names = runpy.run_path(str(tmp_path / "walkthrough.py"))
    said = capsys.readouterr().out
    assert "UCI Online Retail" in said
    assert "of ten are the same; degraded: ['unknown_user'" in said
    assert len(names["answer"].item_ids) == 10
