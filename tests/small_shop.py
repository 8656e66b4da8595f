"""A small shop of plain purchases, declared for a test: its module, its files, its settings."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings

START = datetime(2026, 1, 1, tzinfo=UTC)
IMPORTS = (
    "from feature_repo.contract.schema import (\n"
    "    CATEGORY, FILE_TIME, NUMBER, Column, DatasetSpec, DType, Examples, Requests, Source, Task,\n)\n"
)


def declared(name: str, events: str, **fields: str) -> str:
    """A module that declares a shop of plain purchases."""
    more = "".join(f", {field}={value}" for field, value in fields.items())
    return f'''"""{name}: of a test."""
{IMPORTS}
SPEC = DatasetSpec(
    name="{name}", title="{name}", user_id=DType.STRING, item_id=DType.STRING, actions=("buy", "like"),
    tasks=(Task("label_buy", "bought", action="buy"),),
    requests=Requests(Examples.ACTIONS, validation_from="2026-01-20T00:00:00+00:00",
        test_from="2026-01-25T00:00:00+00:00", train_negatives_per_positive=1, eval_negatives=2),
    events=Source({events}),
    event_features=(Column("price", DType.FLOAT32, "", kind=NUMBER, minimum=0, nullable=True),),
    user_features=(Column("country", DType.STRING, "", kind=CATEGORY, nullable=True),){more})
'''


def shop(modules: Path, helpers: Any, name: str, text: str, files: dict[str, str]) -> Settings:
    (modules / f"{name}.py").write_text(text)
    data = modules.parent / name
    for file, content in files.items():
        path = data / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    found: Settings = helpers.settings_in(modules.parent / "home", name, data)
    return found


def at(days: float) -> str:
    return (START + timedelta(days=days)).isoformat()


def read(settings: Settings, job: str, table: str) -> pa.Table:
    return JobFolder(settings.home, job).read(table)
