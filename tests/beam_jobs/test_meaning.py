"""A column that changes its meaning while its name and type stay."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from beam_jobs.errors import BreaksLiveError
from feature_repo import datasets
from feature_repo.contract import meaning
from feature_repo.home import code
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from feature_repo.store.store import held_columns, open_store
from serving.api.messages import RankRequest
from serving.live.live import BundleSource
from serving.ranking.ranker import Clock
from tests.promises import Promises
from tests.silent import lists_of, note_silent

NAME = "changing_shop"
BEFORE_ONLINE = ("events", "user_history", "item_stats")
MODULE = f'''"""A shop whose declaration changes."""
from dataclasses import replace
import pyarrow.compute as pc
from feature_repo.datasets import online_retail

SPEC = replace(online_retail.SPEC, name="{NAME}")


def derive(kind, read, given):
    found = online_retail.derive(kind, read, given)
    columns = found.columns | {{"unit_price": pc.cast(PRICE, "float32")}}
    return replace(found, columns=columns)
'''
POUNDS = MODULE.replace("PRICE", 'read["unit_price"]')
PENCE = MODULE.replace("PRICE", 'pc.multiply(read["unit_price"], 100)')
# Other code, the same values
DOUBLED_AND_HALVED = MODULE.replace("PRICE", 'pc.divide(pc.multiply(read["unit_price"], 2), 2)')


@pytest.fixture(scope="module")
def declare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """Writes the dataset's module, as an editor would between two commands."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "__path__", [*datasets.__path__, str(folder)])

        def write(text: str) -> None:
            (folder / f"{NAME}.py").write_text(text)
            forget()

        yield write
        forget()


def forget() -> None:
    """What a process remembers of a module."""
    sys.modules.pop(f"feature_repo.datasets.{NAME}", None)
    for cached in (datasets.load, datasets.load_contract, code._tree, code._digest, code._imports):
        cached.cache_clear()


@pytest.fixture(scope="module")
def trained(
    declare: Callable[[str], None],
    tmp_path_factory: pytest.TempPathFactory,
    shop_data: Path,
    helpers: Any,
) -> Any:
    """The road over that shop, prices in pounds, with a live bundle and its tokens."""
    declare(POUNDS)
    settings = helpers.settings_in(tmp_path_factory.mktemp("home"), NAME, shop_data)
    road = helpers.walk(settings, shop_data)
    return helpers.token_road(road, tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def rebuilt(
    trained: Any, declare: Callable[[str], None], helpers: Any
) -> Callable[[str, Settings | None], None]:
    """Declares the shop anew and builds its tables."""

    def build(text: str, settings: Settings | None = None) -> None:
        declare(text)
        helpers.run_jobs(settings or trained.settings, *BEFORE_ONLINE, num_partitions=3)

    return build


def answer_of(settings: Settings) -> tuple[Any, Any]:
    """A ranking by the live bundle, and what it says of columns."""
    serving = BundleSource(settings, replay=True).load()
    try:
        items = serving.ranker.bundle.encoder.items.values[:5].to_pylist()
        request = RankRequest(user_id=12345, candidates=items)
        answer = serving.ranker.answer(request, serving.ranker.nobody(), Clock())
        return answer.response, serving.ranker.moved
    finally:
        serving.ranker.items.close()


def test_a_bundle_and_the_store_know_what_columns_mean(trained: Any) -> None:
    columns = JobFolder(trained.settings.home, "events").require().columns
    assert {"events.unit_price", "events.item_id", "events.action"} <= set(columns)
    assert {"user_profile.country", "item_profile.description_tokens"} <= set(columns)
    assert held_columns(open_store(trained.settings)) == meaning.from_json(columns)
    answer, moved = answer_of(trained.settings)
    assert "changed_features" not in answer.degraded
    assert [one.distance for one in moved] == [0.0] * len(columns)
    assert not any(one.redeclared for one in moved)


def test_other_code_for_the_same_values_is_no_change(
    trained: Any, rebuilt: Callable[[str], None], helpers: Any
) -> None:
    rebuilt(DOUBLED_AND_HALVED)
    helpers.run_jobs(trained.settings, "materialize")
    answer, moved = answer_of(trained.settings)
    assert "changed_features" not in answer.degraded
    assert any(one.redeclared for one in moved)


def test_values_that_move_by_themselves_are_said(
    trained: Any,
    rebuilt: Callable[..., None],
    tmp_path: Path,
    helpers: Any,
) -> None:
    """The same declaration, and a log in which all became dear."""
    lines = pd.read_parquet(trained.data / "online_retail.parquet")
    lines["UnitPrice"] *= 10
    lines.to_parquet(tmp_path / "online_retail.parquet", index=False)
    dear = helpers.replace(trained.settings, data=str(tmp_path))
    rebuilt(POUNDS, dear)
    outcome = helpers.run_jobs(dear, "materialize")["materialize"]
    (line,) = [line for line in outcome.lines if "learned" in line]
    assert "events.unit_price (declared as then, its values moved by " in line
    answer, moved = answer_of(dear)
    assert "changed_features" not in answer.degraded
    assert moved[0].column == "events.unit_price"
    assert moved[0].worth_saying


@pytest.mark.whole
def test_no_list_differs_without_a_word_when_pounds_become_pence(
    trained: Any, rebuilt: Callable[[str], None], helpers: Any, promises: Promises
) -> None:
    rebuilt(POUNDS)
    helpers.run_jobs(trained.settings, "materialize", force=True)
    stats = JobFolder(trained.settings.home, "user_history").read("user_stats")
    users = stats["user_id"].unique().to_pylist()

    def lists() -> dict[Any, Any]:
        serving = BundleSource(trained.settings, replay=True).load()
        try:
            # Tokens are of the run before, in either state.
            return lists_of(serving, users)
        finally:
            serving.ranker.items.close()

    before = lists()
    rebuilt(PENCE)
    with pytest.raises(BreaksLiveError):
        helpers.run_jobs(trained.settings, "materialize")
    refused = lists()
    assert [one.item_ids for one in refused.values()] == [one.item_ids for one in before.values()]
    helpers.run_jobs(trained.settings, "materialize", break_live=True)
    what = "a price declared in pence, and materialize made to send it"
    note_silent(promises, what, before, lists(), said=False)
    rebuilt(POUNDS)
    helpers.run_jobs(trained.settings, "materialize", break_live=True, force=True)


def test_pounds_that_become_pence_are_refused(
    trained: Any, rebuilt: Callable[[str], None], helpers: Any
) -> None:
    rebuilt(PENCE)
    with pytest.raises(BreaksLiveError) as refused:
        helpers.run_jobs(trained.settings, "materialize")
    message = str(refused.value)
    assert (
        "events.unit_price (declared or made otherwise since, its values moved by 1.00 of 1)"
        in message
    )
    assert "quantity" not in message
    assert "--break_live" in message
    # 1. What servers read is as it was.
    answer, _ = answer_of(trained.settings)
    assert "changed_features" not in answer.degraded
    # 2. Forced, each answer says it.
    helpers.run_jobs(trained.settings, "materialize", break_live=True)
    answer, moved = answer_of(trained.settings)
    assert "changed_features" in answer.degraded
    assert [one.column for one in moved if one.means_otherwise] == ["events.unit_price"]
    # 3. No tokens are made of pence by a stage 1 that learned from pounds.
    with pytest.raises(BreaksLiveError, match=r"events\.unit_price .* Train and export it again"):
        helpers.run_jobs(trained.settings, "summary_tokens", bundle="vista_tiny")


def test_meanings_travel_as_json(trained: Any) -> None:
    columns = JobFolder(trained.settings.home, "events").require().columns
    assert json.loads(json.dumps(meaning.to_json(meaning.from_json(columns)))) == columns
