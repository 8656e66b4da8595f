"""The notebook runs, cell after cell, on the synthetic shop."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from feature_repo.home.tables import JobFolder

PAGE = Path(__file__).resolve().parent.parent / "docs" / "notebook.md"
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


def test_the_page_trains_on_histories_as_it_says(
    shop: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every block of Python, in order, with nothing but Feast, pandas and torch."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    store = shop.store
    monkeypatch.setattr("feast.FeatureStore", lambda repo: store)
    user = str(JobFolder(shop.settings.home, "user_history").read("user_stats")["user_id"][0])
    (tmp_path / "page.py").write_text("\n".join(blocks).replace("12680", user))
    names = runpy.run_path(str(tmp_path / "page.py"))
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"cross-entropy ([0-9.]+)", said)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert names["online"]["history_item_ids"][0]
