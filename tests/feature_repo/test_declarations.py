"""A dataset's declaration is refused where it is made, by the name of the field; commands refuse
what they do not know.
"""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from feature_repo import cli, datasets
from feature_repo.contract.contract import contract
from feature_repo.contract.declarations import groups, is_iso_time, lacks, plain, problems, spec_of
from feature_repo.contract.schema import (
    CATEGORY,
    NUMBER,
    VECTOR,
    Column,
    DType,
    Examples,
    Kind,
    Memory,
    OwnView,
    Source,
    Task,
)
from feature_repo.datasets import online_retail
from feature_repo.errors import DeclarationError, ExpectedError, SettingsError
from feature_repo.home import code
from feature_repo.settings import Settings

SPEC = online_retail.SPEC
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", datasets.names())
def test_the_datasets_here_have_nothing_to_mend(name: str) -> None:
    assert problems(datasets.load(name).spec) == []
    assert (
        contract(spec_of(plain(datasets.load(name).spec))).fingerprint
        == datasets.load_contract(name).fingerprint
    )


DRAWN = replace(SPEC.requests, eval_negatives=0)
RATED = replace(SPEC.requests, examples=Examples.RATINGS)


def features(*columns: Column) -> dict[str, Any]:
    return {"item_features": (*SPEC.item_features, *columns)}


def remembering(by: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    categories = [
        Column(name, DType.STRING, "", kind=CATEGORY) for name in ("type", "brand", "type_brand")
    ]
    return {**features(*categories), "memory": Memory(by, pairs=pairs)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"item_title": "desciption"}, "did you mean description?"),
        ({"item_title": "item_id"}, "item_title names 'item_id'"),
        ({"stat_value": "price"}, "stat_value names 'price'; there are ['quantity', 'unit_price']"),
        (features(Column("x", DType.STRING, "", kind=NUMBER)), "is string and of kind number"),
        (features(Column("x", DType.FLOAT32_LIST, "", kind=VECTOR)), "say how long it is"),
        (features(Column("x", DType.STRING, "", kind=CATEGORY, hashed=1)), "has hashed=1"),
        (features(Column("x", DType.STRING, "", kind=CATEGORY, buckets=4)), "has buckets=4"),
        (features(Column("x", DType.BYTES, "")), "is bytes"),
        (features(Column("x", DType.STRING_LIST, "", values=("a",))), "only texts and whole"),
        (features(Column("x", DType.FLOAT32_LIST, "")), "say how long it is"),
        ({"item_title": "description_tokens"}, "item_title names 'description_tokens'"),
        ({"views": (OwnView("user_stats", "user", SPEC.user_features, "v"),)}, "one of Memoir's"),
        (features(Column("two words", DType.STRING, "")), "expected a name of letters"),
        ({"context_features": (Column("device", DType.STRING, ""),)}, "'device' has no kind"),
        ({"event_identity": ("invoice",)}, "event_identity names 'invoice'"),
        ({"actions": ()}, "actions is ()"),
        ({"shown": "impression"}, "shown names 'impression'"),
        ({"shown": "purchase"}, "the first action"),
        ({"tasks": ()}, "name at least one"),
        ({"tasks": (Task("label", "", action="buy"),)}, "is about 'buy'"),
        ({"tasks": (Task("label", "", "purchase", given="click"),)}, "is given 'click'"),
        ({"tasks": (Task("label", "", "purchase", weight=0),)}, "has weight 0"),
        ({"rank_by": (("label_buy", 1.0),)}, "rank_by names 'label_buy'"),
        ({"rank_by": (("label_purchase", -1.0),)}, "the weight -1.0"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5"),
        ({"events": replace(SPEC.events, zone="Europe/Londn")}, "events.zone is 'Europe/Londn'"),
        ({"events": replace(SPEC.events, time_unit="s")}, "events.time_unit is 's'"),
        ({"events": replace(SPEC.events, format="xlsx")}, "events.format is 'xlsx'"),
        ({"events": replace(SPEC.events, delimiter="")}, "events.delimiter is empty"),
        ({"events": replace(SPEC.events, columns={"user": "u"})}, "events.columns names 'user'"),
        ({"events": replace(SPEC.events, flags={"buy": "b"})}, "the action 'buy'"),
        ({"events": replace(SPEC.events, action="a", flags={"return": "r"})}, "by one column"),
        ({"events": replace(SPEC.events, at_least=4)}, "events.at_least needs events.action"),
        ({"users": Source("u.csv", decimal=";")}, "users.decimal is ';'"),
        ({"views": (OwnView("v", "user", (), "v.parquet"),)}, "has no column"),
        ({"views": (OwnView("V", "shop", SPEC.user_features, "v"),)}, "is of 'shop'"),
        (
            {"requests": replace(SPEC.requests, test_from="2011-13-01")},
            "requests.test_from is '2011-13-01'",
        ),
        ({"requests": replace(SPEC.requests, test_from="2011-11-10")}, "without a zone"),
        (
            {"requests": replace(SPEC.requests, test_from=SPEC.requests.validation_from)},
            "is not before",
        ),
        ({"requests": DRAWN}, "examples of actions want 1 or more"),
        ({"requests": RATED}, "nothing is drawn"),
        ({"memory": Memory(("description",))}, "memory.by names 'description'"),
        (remembering(("type", "brand"), (("type", "type"),)), "two different categories"),
        (remembering(("type",), (("type", "brand"),)), "among memory.by, of ['type']"),
        (
            remembering(("type", "brand"), (("type", "brand"), ("brand", "type"))),
            "name each pair once",
        ),
        (
            remembering(("type", "brand", "type_brand"), (("type", "brand"),)),
            "'type_brand' is a column of memory.by",
        ),
    ],
)
def test_each_slip_is_named(change: dict[str, Any], says: str) -> None:
    assert any(says in line for line in problems(replace(SPEC, **change))), problems(
        replace(SPEC, **change)
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"item_features": (*SPEC.item_features, Column("Country", DType.STRING, ""))},
            "item_features 'Country' and user_features",
        ),
        ({"user_features": (Column("split", DType.STRING, ""),)}, "a name of Memoir's"),
        (
            {"event_features": (*SPEC.event_features, Column("action", DType.FLOAT32, ""))},
            "'action'",
        ),
        ({"tasks": (Task("Country", "", action="purchase"),)}, "task 'Country'"),
        (
            {"context_features": (Column("request_timestamp", DType.STRING, "", kind=CATEGORY),)},
            "a name of Memoir's",
        ),
        ({"tasks": (Task("split", "", action="purchase"),)}, "task 'split' and a name of Memoir's"),
        (
            {"context_features": (Column("quantity", DType.FLOAT32, "", kind=NUMBER),)},
            "context_features 'quantity' and event_features",
        ),
    ],
)
def test_features_that_would_meet_under_one_name_are_refused_where_they_are_declared(
    change: dict[str, Any], says: str
) -> None:
    with pytest.raises(DeclarationError, match=says):
        contract(replace(SPEC, **change))


def test_the_template_can_be_what_it_says_on_sixty_lines() -> None:
    from feature_repo.datasets import _template

    assert problems(_template.SPEC) == []
    assert contract(_template.SPEC).labels == ("label_click", "label_purchase")
    text = Path(str(_template.__file__)).read_text()
    assert len(text.splitlines()) <= 60
    assert {kind.value for kind in Kind} == {c.kind for c in _columns(_template.SPEC) if c.kind}


def _columns(spec: Any) -> list[Column]:
    return [column for _, columns in groups(spec) for column in columns]


@pytest.mark.parametrize(
    ("name", "most"), [("online_retail", 60), ("movielens_1m", 40), ("complete_journey", 40)]
)
def test_a_dataset_is_declared_and_hardly_written(name: str, most: int) -> None:
    tree = ast.parse((ROOT / "feature_repo" / "datasets" / f"{name}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert sum((f.end_lineno or 0) - f.lineno + 1 for f in functions) <= most


def test_a_module_of_another_name_or_without_its_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("from feature_repo.datasets.online_retail import SPEC\n")
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(DeclarationError, match="expected 'mine'") as refused:
        datasets.load("mine")
    assert "the module has no function derive" in str(refused.value)
    sys.modules.pop("feature_repo.datasets.mine", None)
    with pytest.raises(DeclarationError, match="did you mean online_retail"):
        datasets.load("online_retial")


def test_a_wider_contract_lacks_nothing_and_a_narrower_one_says_what() -> None:
    wide = replace(
        SPEC,
        user_features=(*SPEC.user_features, Column("segment", DType.STRING, "")),
        event_features=(*SPEC.event_features, Column("margin", DType.FLOAT32, "")),
        actions=(*SPEC.actions, "view"),
    )
    assert lacks(contract(SPEC), contract(wide)) == []
    missing = lacks(contract(wide), contract(SPEC))
    assert any("segment" in line for line in missing)
    assert any("margin" in line for line in missing)
    assert any("actions" in line for line in missing)
    bare = contract(replace(SPEC, user_features=()))
    assert lacks(bare, contract(SPEC)) == []  # the first feature takes nothing from it
    vector = Column("cover", DType.FLOAT32_LIST, "", kind=VECTOR, max_length=16)
    longer = replace(vector, max_length=32)
    with_vector, with_longer = (
        contract(replace(SPEC, item_features=(*SPEC.item_features, column)))
        for column in (vector, longer)
    )
    assert lacks(with_vector, with_longer) == ["cover (float32_list) of items"]
    assert lacks(contract(SPEC), contract(replace(SPEC, shown="return")))
    assert lacks(contract(SPEC), contract(replace(SPEC, num_history_online=8)))
    retyped = replace(SPEC, user_features=(Column("country", DType.INT64, ""),))
    assert lacks(contract(SPEC), contract(retyped)) == ["country (string) of users"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MEMOIR_DATASETT", "x", "did you mean MEMOIR_DATASET?"),
        ("MEMOIR_PROFILE", "prod", "must be one of"),
        ("MEMOIR_DATA", __file__, "is a file"),
        ("MEMOIR_DATA", "/no/such/folder", "is not there"),
    ],
)
def test_settings_that_are_none_are_refused(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=says.replace("?", r"\?")):
        Settings.from_env()


def test_a_persons_mistake_is_a_line_and_our_own_bug_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def mistake() -> None:
        raise ExpectedError("expected this, got that: do so")

    def bug() -> None:
        raise KeyError("no_such_internal_key")

    def interrupted() -> None:
        raise KeyboardInterrupt

    def disk_full() -> None:
        raise OSError(28, "No space left on device", "/x")

    assert cli.run(mistake) == 1
    assert capsys.readouterr().err.strip() == "expected this, got that: do so"
    with pytest.raises(KeyError):
        cli.run(bug)
    assert cli.run(interrupted) == 130
    assert cli.run(disk_full) == 1
    assert "disk is full" in capsys.readouterr().err


def test_feast_imports_every_file_that_is_not_ours() -> None:
    ignored = (ROOT / "feature_repo" / ".feastignore").read_text().split("\n")
    room = ROOT / "feature_repo"
    ours = {path.name for path in room.glob("*.py")} - {"feature_definitions.py"}
    ours |= {path.name for path in room.iterdir() if any(path.glob("*.py"))}
    assert ours <= set(ignored), ours - set(ignored)


def test_code_counts_and_comments_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "CHECKOUT", tmp_path)
    room = tmp_path / "modeling"
    room.mkdir()
    (room / "a.py").write_text("from modeling import b\n\n\ndef f():\n    return b.x\n")
    (room / "b.py").write_text("x = 1\n")

    def digest() -> str:
        for cached in (code._file, code._tree, code._imports, code._digest):
            cached.cache_clear()
        return code.code_digest("modeling.a")

    before = digest()
    (room / "a.py").write_text(
        '"""Says more."""\nfrom modeling import b\n\n# why\ndef f():\n    """Doc."""\n    return b.x\n'
    )
    assert digest() == before
    (room / "b.py").write_text("x = 2\n")
    assert digest() != before
    with pytest.raises(ModuleNotFoundError):
        code.code_digest("modeling.nowhere")
    monkeypatch.undo()
    for cached in (code._file, code._tree, code._imports, code._digest):
        cached.cache_clear()


def test_times_of_movielens_in_another_unit_are_refused(tmp_path: Path) -> None:
    lines = [f"{user}::1::4::{974_000_000_000 + user}" for user in range(1, 9)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines) + "\n")
    unit = datasets.RawUnit(str(tmp_path / "ratings.dat"), 0, 8)
    with pytest.raises(datasets.RawDataError, match="look like milliseconds"):
        list(datasets.load("movielens_1m").parse(unit))
    assert is_iso_time("2011-12-09T12:00:00Z")


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "latin-1"])
def test_titles_are_read_in_the_encodings_that_files_have(encoding: str, tmp_path: Path) -> None:
    title = "Ådalen 31… (1969)" if encoding != "latin-1" else "Ådalen 31 (1969)"
    (tmp_path / "movies.dat").write_bytes(f"1::{title}::Drama|War\n\n".encode(encoding))
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n")
    (tmp_path / "ratings.dat").write_text("1::1::5::978300760\n")
    films = datasets.load("movielens_1m")
    (unit,) = [unit for unit in films.raw_units(str(tmp_path)) if unit.kind == "items"]
    items = next(films.parse(unit)).items.to_pylist()
    assert [(row["title"], row["year"], row["genres"]) for row in items] == [
        (title, 1969, ["Drama", "War"])
    ]
