"""A stranger's data on the road, as the README tells it: an invented shop's CSV files, `new`, `check`,
the jobs, every ranker, and the server with context. One new file, and not a line of code in it.
"""

from __future__ import annotations

import csv
import importlib
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch

from feature_repo import cli, datasets
from feature_repo.__main__ import app
from feature_repo.contract.arrow import arrow_type
from feature_repo.contract.schema import Examples, Kind
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from modeling import models
from modeling.__main__ import app as modeling_app
from modeling.bundle.bundle import Bundle
from modeling.comparison import memory_worth
from modeling.inputs.augment import forget, training_sample
from modeling.inputs.encoder import Encoded, Encoder, RequestColumns
from modeling.inputs.tasks import probabilities
from modeling.training.trainer import Trainer, predict
from modeling.training_set.dataset import Warehouse, point_in_time_join
from serving.api.messages import decode_request
from serving.ranking.ranker import RankService
from serving.stores.features import FeastReader
from serving.stores.items import ItemTable, Loaded
from tests.modeling.test_unknown_items import MODELS, RECIPES
from tests.periods import joined_period, vocabularies
from tests.ranking import ranked

NAME = "corner_shop"
TAGS = ("red", "blue", "gift", "très chic", "kitchen")


def write_shop(folder: Path, seed: int = 0) -> int:
    """A log of impressions in two files, out of order and with repeats, and a table of items: decimal
    commas, gaps in prices, marks of nothing, times in every zone and in more than one spelling. Returns
    how many impressions were made.
    """
    rng = np.random.default_rng(seed)
    items = [f"Tasse {n:03d} é" if n % 5 else f"0{n:04d}" for n in range(150)]
    users = [f"café user {n}" if n % 3 else f"0{n:05d}" for n in range(50)]
    vectors, tastes = rng.normal(size=(150, 16)), rng.normal(size=(50, 16))

    def number(value: float, digits: int) -> str:
        return f"{value:.{digits}f}".replace(".", ",")

    (folder / "log").mkdir(parents=True)
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter=";")
        out.writerow(["product", "name", "brand", "list_price", "tags", "embedding"])
        for n, item in enumerate(items):
            price = number(3 + n / 10, 2) if n % 4 else ("", "N/A")[n % 8 // 4]
            tags = "|".join(rng.permutation(TAGS)[: 1 + n % 3])
            vector = " ".join(number(v, 4) for v in vectors[n])
            out.writerow(
                [
                    item,
                    f"Item number {n}",
                    f"brand {n % 7}" if n % 11 else "-",
                    price,
                    tags,
                    f"[{vector}]",
                ]
            )
    rows: list[list[Any]] = []
    for session in range(900):
        user = int(rng.integers(50))
        at = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=int(rng.integers(86_400)))
        zone = timezone(timedelta(hours=int(rng.integers(-5, 6))))
        device = ("phone", "desktop", "tablet")[int(rng.integers(3))]
        for position, item in enumerate(rng.permutation(150)[: int(rng.integers(6, 12))]):
            like = tastes[user] @ vectors[item] / 3 - 0.2 * position + (device == "desktop")
            clicked = rng.random() < 1 / (1 + math.exp(1 - like))
            carted = clicked and rng.random() < 0.6
            bought = carted and rng.random() < 0.6
            moment = (at + timedelta(seconds=position)).astimezone(zone)
            when = moment.isoformat(
                "T" if session % 2 else " ", ("auto", "milliseconds")[session % 4 // 2]
            )
            paid = number(3 + item / 10 + rng.random(), 2) if rng.random() < 0.8 else r"\N"
            labels = [int(clicked), int(carted), int(bought)]
            about = [f"e{len(rows)}", f"s{session}", users[user], items[item], when, position]
            rows.append([*about, device, at.astimezone(zone).hour, *labels, paid])
    made = len(rows)
    rows += rows[::97]  # delivered twice
    rows.append(["x", "s1", users[1], items[0], "not a time", 0, "phone", 1, 0, 0, 0, "1,0"])
    for number_of, nobody in enumerate(("", "NULL", "(null)", "undefined")):
        about = [f"n{number_of}", f"s{number_of}", nobody, items[0], when, 0]
        rows.append([*about, "phone", 1, 0, 0, 0, "1,0"])
    names = "event_id session customer product shown_at position device local_hour clicked carted purchased price"
    order = rng.permutation(len(rows))
    for part, chosen in enumerate(np.array_split(order, 2)):
        encoding, end = ("utf-8-sig", "\r\n") if part else ("utf-8", "\n")
        path = folder / "log" / f"part{part}.csv"
        with open(path, "w", newline="", encoding=encoding) as file:
            out = csv.writer(file, delimiter=";", lineterminator=end)
            out.writerow(names.split())
            out.writerows(rows[n] for n in chosen)
    return made


@dataclass(frozen=True)
class Shop:
    """The invented shop on the road."""

    settings: Settings
    store: Any
    impressions: int
    told: str


@pytest.fixture(scope="module")
def shop_on_the_road(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Iterator[Shop]:
    """`new`, and every job up to the online store."""
    folder = tmp_path_factory.mktemp("own")
    impressions = write_shop(folder / "raw")
    modules = folder / "datasets"
    modules.mkdir()
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets, "__path__", [*datasets.__path__, str(modules)])
    told = command(
        "new", NAME, "--events", f"{folder}/raw/log", "--items", f"{folder}/raw/items.csv"
    )
    importlib.invalidate_caches()
    settings = helpers.settings_in(folder / "home", NAME, folder / "raw")
    road = helpers.walk(settings, folder / "raw")
    yield Shop(settings, road.store, impressions, told)
    patch.undo()
    sys.modules.pop(f"feature_repo.datasets.{NAME}", None)
    datasets.load.cache_clear()
    datasets.load_contract.cache_clear()


def command(*words: str) -> str:
    """What a command of `python -m feature_repo` prints; it must end well."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.run(lambda: app(list(words))) == 0
    return out.getvalue()


def test_new_takes_every_column_for_what_it_is(shop_on_the_road: Shop) -> None:
    spec = datasets.load(NAME).spec
    assert spec.events.columns == {
        "user_id": "customer",
        "item_id": "product",
        "event_timestamp": "shown_at",
        "request_id": "session",
    }
    assert spec.events.flags == {"click": "clicked", "cart": "carted", "purchase": "purchased"}
    assert (spec.events.delimiter, spec.events.decimal) == (";", ",")
    assert (spec.shown, spec.actions[0]) == ("impression", "purchase")
    assert [(t.name, t.given) for t in spec.tasks] == [
        ("label_click", ""),
        ("label_cart", "label_click"),
        ("label_purchase", "label_cart"),
    ]
    assert spec.requests.examples is Examples.IMPRESSIONS
    assert spec.event_identity == ("event_id",)
    assert {c.name: c.kind for c in spec.item_features} == {
        "name": None,
        "brand": Kind.CATEGORY,
        "list_price": Kind.NUMBER,
        "tags": Kind.BAG,
        "embedding": Kind.VECTOR,
    }
    assert {c.name for c in spec.context_features} == {"device", "local_hour"}
    assert [c.name for c in spec.shown_features] == ["position"]
    assert [c.name for c in spec.event_features] == ["price"]
    assert "customer: user: by its name" in shop_on_the_road.told
    text = Path(datasets.__path__[-1], f"{NAME}.py").read_text()
    assert "def " not in text


def test_the_readme_tells_the_same_commands() -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    block = readme.split("## Your own data")[1].split("```console\n")[1].split("```")[0]
    told = [line for line in block.splitlines() if line]
    assert told[0].startswith("python -m feature_repo new ")
    assert "--events" in told[0]
    assert "--items" in told[0]
    assert told[1].startswith("export MEMOIR_DATASET=")
    assert told[2:] == ["python -m feature_repo check", "make demo"]


def test_check_tells_in_seconds_what_comes_of_it(
    shop_on_the_road: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMOIR_DATASET", NAME)
    monkeypatch.setenv("MEMOIR_DATA", str(shop_on_the_road.settings.data))
    told = command("check")
    for line in (
        "repeated: the same event stands earlier",
        "4  customer: is missing",
        "1  shown_at: ",
        "100.0% of the events' items are in their table",
        "900 requests (",
        "label_purchase: ",
        "device (category)",
        "embedding (vector)",
        "nothing to mend",
    ):
        assert line in told


def test_events_have_an_identity_and_impressions_are_in_no_history(shop_on_the_road: Shop) -> None:
    settings = shop_on_the_road.settings
    counts = JobFolder(settings.home, "events").require().counts
    assert counts.dead["repeated: the same event stands earlier"] > 0
    events = JobFolder(settings.home, "events").read("events")
    shown = events["action"].to_numpy() == 3
    assert int(shown.sum()) == shop_on_the_road.impressions
    history = JobFolder(settings.home, "user_history").require().counts
    assert history["shown"] == shop_on_the_road.impressions
    ends = JobFolder(settings.home, "user_history").read("user_stats")["history_end"]
    assert max(ends.to_pylist()) < len(events) - int(shown.sum())


def test_marks_of_nothing_are_nobody_no_number_and_no_brand(shop_on_the_road: Shop) -> None:
    tables = JobFolder(shop_on_the_road.settings.home, "events")
    users = set(tables.read("user_profile")["user_id"].to_pylist())
    assert not users & {"", "NULL", "(null)", "undefined"}
    items = (
        tables.read("item_profile")
        .group_by("item_id")
        .aggregate([("brand", "max"), ("list_price", "max")])
    )
    assert items["brand_max"].null_count == len(range(0, 150, 11))
    assert items["list_price_max"].null_count == len(range(0, 150, 4))
    bought = tables.read("events")
    assert 0 < bought["price"].null_count < len(bought)


def test_the_order_of_files_does_not_matter(
    shop_on_the_road: Shop, tmp_path: Path, helpers: Any
) -> None:
    raw = Path(str(shop_on_the_road.settings.data))
    shutil.copytree(raw, tmp_path / "raw")
    first, second = (tmp_path / "raw" / "log" / f"part{n}.csv" for n in (0, 1))
    first.rename(tmp_path / "raw" / "log" / "part2.csv")  # now it comes last
    assert second.exists()
    settings = helpers.settings_in(tmp_path / "home", NAME, tmp_path / "raw")
    helpers.run_jobs(settings, "events", num_partitions=3)
    before, after = (
        JobFolder(home, "events").read("events").drop_columns(["source_position"])
        for home in (shop_on_the_road.settings.home, settings.home)
    )
    assert before.equals(after)


def test_every_label_has_its_mask(shop_on_the_road: Shop) -> None:
    rows = JobFolder(shop_on_the_road.settings.home, "training_examples").read("training_examples")
    click, cart, buy = (rows[name].to_pylist() for name in datasets.load_contract(NAME).labels)
    assert None not in click
    assert [c is None for c in cart] == [c == 0 for c in click]
    assert [b is None for b in buy] == [c != 1 for c in cart]
    assert 0 < sum(b == 1 for b in buy) < sum(c == 1 for c in cart) < sum(click)
    by_request = rows.group_by("request_id").aggregate([("device", "count_distinct")])
    assert set(by_request["device_count_distinct"].to_pylist()) == {1}


@dataclass(frozen=True)
class World:
    """What all rankers are trained on, and requests of the day after as both sides see them."""

    shop: Shop
    encoder: Encoder
    train: Encoded
    test: Encoded
    test_requests: RequestColumns
    bodies: list[dict[str, Any]]
    asked: Encoded


@pytest.fixture(scope="module")
def world(shop_on_the_road: Shop) -> World:
    """Encoder, training and test requests, and requests to be served."""
    warehouse, store = Warehouse(shop_on_the_road.settings), shop_on_the_road.store
    contract = warehouse.contract
    train, test = (
        joined_period(warehouse, store, "ranking_v1", name) for name in ("train", "test")
    )
    encoder = Encoder(contract, vocabularies(contract, train, 1), 16)
    # As of the end of the data the stores hold the same rows, whichever way they are asked.
    at = datetime.fromisoformat(warehouse.manifests["user_history"].as_of) + timedelta(seconds=1)
    rng, items = np.random.default_rng(3), encoder.items.values.to_pylist()
    users = [
        *rng.choice(test.users.to_pylist(), 12),
        "nobody",
        *rng.choice(test.users.to_pylist(), 3),
    ]
    bodies = []
    for number, user in enumerate(users):
        context = {"device": "phone", "local_hour": float(number)} if number % 3 else {}
        chosen = [*rng.choice(items, int(rng.integers(1, 30)), replace=False), "never seen"]
        context |= {"request_timestamp": at.isoformat()}
        bodies.append(
            {"user_id": str(user), "candidates": [str(i) for i in chosen], "context": context}
        )
    rows = [(body, item) for body in bodies for item in body["candidates"]]
    joined = point_in_time_join(
        store,
        "ranking_v1",
        pa.table(
            {
                "user_id": [body["user_id"] for body, _ in rows],
                "item_id": [item for _, item in rows],
                "event_timestamp": pa.array([at] * len(rows), pa.timestamp("us", "UTC")),
            }
        ),
    )
    for label in contract.labels:
        joined = joined.append_column(label, pa.array([0] * len(rows), pa.int8()))
    for column in contract.spec.context_features:
        values = [body["context"].get(column.name) for body, _ in rows]
        joined = joined.append_column(column.name, pa.array(values, arrow_type(column.dtype)))
    joined = joined.append_column("position", pa.nulls(len(rows), pa.int64()))
    numbers = np.repeat(np.arange(len(bodies)), [len(body["candidates"]) for body in bodies])
    asked = warehouse.assemble(joined, pa.array(numbers).cast(pa.string()))
    return World(
        shop_on_the_road,
        encoder,
        encoder.featurise(train.requests),
        encoder.featurise(test.requests),
        test.requests,
        bodies,
        encoder.featurise(asked.requests),
    )


def test_a_strangers_log_gets_a_recommendation(
    shop_on_the_road: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = shop_on_the_road.settings
    monkeypatch.setenv("MEMOIR_DATASET", NAME)
    monkeypatch.setenv("MEMOIR_HOME", settings.root)
    monkeypatch.setenv("MEMOIR_DATA", str(settings.data))

    def told(*words: str) -> str:
        assert cli.run(lambda: modeling_app(["memory", *words])) == 0
        return " ".join(capsys.readouterr().out.split())

    # 1. Figures, kinds of requests, and what to do.
    first = told("--quick")
    for part in (
        "Any history over none: NDCG@10",
        "what comes next",
        "items never had",
        "days of the median user",
        "Two trainings on the same events differ by",
        "Recommended:",
    ):
        assert part in first
    # 2. The same again is read, not trained.
    assert "memory: up to date" in told("--quick")
    # 3. Of a length that is gone, that length alone is trained.
    [stored] = Path(settings.path("memory")).glob("*/trees-50-1.arrow")
    stored.unlink()
    again = told("--quick")
    assert "memory: 50 events of each user" in again
    assert "memory: all events" not in again
    # 4. The picture with which the demo ends, or why there is none.
    told("--effort", "small")
    catalogue = Catalogue(settings.catalogue_url)
    assert catalogue.last_run(NAME, "memory").details["picture"][-1].startswith("Recommended:")
    monkeypatch.setattr(memory_worth, "LEAST", 1_000_000)
    told("--effort", "small")
    [said] = catalogue.last_run(NAME, "memory").details["picture"]
    assert said.startswith("what memory is worth: cannot tell: the test period has")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_ranker_trains_and_is_served_with_context(
    name: str, world: World, tmp_path: Path
) -> None:
    """The server's scores are training's, of every task, with the context of the request."""
    from modeling.recipes import Training

    torch.set_num_threads(1)
    torch.manual_seed(1)
    encoder = world.encoder
    model = models.build(RECIPES[name].model, MODELS[name], encoder.sizes)
    model.fit_statistics(training_sample(encoder, world.train))
    training = Training(epochs=1, max_requests=32, max_candidates=512, warmup_steps=5)
    trainer = Trainer(model, encoder, training, tmp_path, "own")
    assert trainer.fit(world.train, world.test)["steps"] > 10

    contract = encoder.contract
    bundle = Bundle("0" * 64, tmp_path, {"recipe": name, "tokens": None}, model.eval(), encoder)
    reader = FeastReader(world.shop.store, contract, "ranking_v1_online")
    known = encoder.items.values.to_pylist()
    items = ItemTable(encoder, reader.read_items, lambda: Loaded(reader.read_items(known)))
    ranker = RankService(bundle, reader, items)
    logits = predict(model, encoder, world.asked)
    expected = probabilities(contract.spec, logits)
    offsets = world.asked.candidate_offsets
    for number, body in enumerate(world.bodies):
        request = decode_request(msgspec.json.encode({**body, "task_scores": True}), contract)
        answer = ranked(ranker, request)
        place = {item: row for row, item in enumerate(body["candidates"])}
        order = [place[item] for item in answer.item_ids]
        wanted = expected[offsets[number] : offsets[number + 1]][order]
        assert isinstance(answer.task_scores, dict)
        served = np.stack([answer.task_scores[task] for task in contract.labels], axis=1)
        np.testing.assert_allclose(served, wanted, atol=1e-6)
        np.testing.assert_allclose(answer.scores, wanted[:, 0], atol=1e-6)
        assert answer.unknown_items == ["never seen"]


def test_context_is_read_and_checked_by_its_declaration(world: World) -> None:
    from serving.api.errors import InvalidRequestError
    from serving.api.openapi import openapi_document

    contract = world.encoder.contract
    schema = openapi_document(contract)["components"]["schemas"]["RankContext"]["properties"]
    assert {"request_timestamp", "device", "local_hour"} <= set(schema)
    body = {"user_id": "café user 1", "candidates": ["00000"], "context": {"device": 3}}
    with pytest.raises(InvalidRequestError, match="device"):
        decode_request(msgspec.json.encode(body), contract)
    body["context"] = {"screen": "wide"}
    with pytest.raises(InvalidRequestError, match="screen"):
        decode_request(msgspec.json.encode(body), contract)
    body["context"] = {"device": "phone"}
    assert decode_request(msgspec.json.encode(body), contract).context.device == "phone"  # type: ignore[union-attr]


def test_of_impressions_evaluation_knows_as_little_as_the_server(world: World) -> None:
    position = world.test_requests.candidate_columns["position"]
    assert position.null_count == len(position)
    slots = [c.name for c in world.encoder.candidate.categorical for _ in range(c.slots)]
    at = slots.index("position")
    assert world.train.candidate_category[:, at].all()
    assert not world.test.candidate_category[:, at].any()
    batch = world.encoder.collate(world.train, np.arange(64))
    left = forget(world.encoder, batch, np.random.default_rng(0))
    gone = (left.candidates.category_BCK[..., at] == 0).all(1)
    assert 0 < int(gone.sum()) < 64
    context = [c.name for c in world.encoder.request.categorical].index("device")
    assert 0 < int((left.user.field_BU[:, context] == 0).sum()) < 64
    assert (left.user.field_BU[:, -2:] == batch.user.field_BU[:, -2:]).all()  # the time is kept


def test_what_was_served_is_read_as_impressions_and_events_under_its_id_are_labels(
    shop_on_the_road: Shop, helpers: Any, tmp_path: Path
) -> None:
    from serving.served.impressions import ImpressionsError, write_impressions
    from serving.served.served_log import log_schema

    data = tmp_path / "raw"
    shutil.copytree(shop_on_the_road.settings.data or "", data)
    settings = helpers.settings_in(tmp_path / "home", NAME, data)
    contract = datasets.load_contract(NAME)
    items = ["00000", "Tasse 001 é", "Tasse 002 é"]
    at = datetime(2025, 2, 20, 12, 30, tzinfo=UTC)
    served = [
        {
            "request_id": f"served-{number}",
            "request_timestamp": at + timedelta(minutes=number),
            "user_id": "café user 1",
            "ranked": items[number:] + items[:number],
            "scores": [0.9, 0.5, 0.1] if number < 2 else [],  # the last rung is nobody's ranking
            "device": "phone",
            "local_hour": 12.0,
        }
        for number in range(3)
    ]
    log = pa.Table.from_pylist(served, schema=log_schema(contract))
    assert write_impressions(settings, log, data / "log" / "served.csv", 2) == 4
    with pytest.raises(ImpressionsError, match="is there already"):
        write_impressions(settings, log, data / "log" / "served.csv", 2)
    with pytest.raises(ImpressionsError, match="not among the files"):
        write_impressions(settings, log, data / "elsewhere" / "served.csv", 2)
    assert not (data / "elsewhere" / "served.csv").exists()
    # What the shop itself logs later, under the id that came with the answer.
    click = "c1;served-1;café user 1;Tasse 001 é;2025-02-20T12:31:05+00:00;;phone;12;1;0;0;"
    header = "event_id;session;customer;product;shown_at;position;device;local_hour;clicked;carted;purchased;price"
    (data / "log" / "clicks.csv").write_text(f"{header}\n{click}\n", encoding="utf-8")

    helpers.run_jobs(settings, "events", "item_stats", "training_examples", num_partitions=3)
    events = JobFolder(settings.home, "events").read("events").to_pylist()
    ours = [event for event in events if (event["request_id"] or "").startswith("served-")]
    letters = JobFolder(settings.home, "events").read("dead_letters").to_pylist()
    assert not [one for one in letters if "served" in one["raw"]], letters
    impression = contract.spec.actions.index(contract.spec.shown)
    shown = [e for e in ours if e["action"] == impression and e["event_id"] != "c1"]
    assert [(e["item_id"], e["position"]) for e in shown] == [
        ("00000", 0),
        ("Tasse 001 é", 1),
        ("Tasse 001 é", 0),
        ("Tasse 002 é", 1),
    ]
    assert {e["device"] for e in shown} == {"phone"}
    assert shown[0]["event_timestamp"] == at
    examples = JobFolder(settings.home, "training_examples").read("training_examples").to_pylist()
    mine = [
        one for one in examples if one["user_id"] == "café user 1" and one["event_timestamp"] >= at
    ]
    labels = {
        (one["event_timestamp"], one["item_id"]): one["label_click"]
        for one in mine
        if one["event_timestamp"] < at + timedelta(minutes=2)
    }
    assert labels == {
        (at, "00000"): 0,
        (at, "Tasse 001 é"): 0,
        (at + timedelta(minutes=1), "Tasse 001 é"): 1,
        (at + timedelta(minutes=1), "Tasse 002 é"): 0,
    }


def test_a_log_that_needs_what_was_not_served_is_refused() -> None:
    from serving.served.impressions import ImpressionsError, values_of

    with pytest.raises(ImpressionsError, match="declares no action for impressions"):
        values_of(datasets.load_contract("online_retail"))


def test_an_event_by_http_is_still_known_after_a_refresh(
    shop_on_the_road: Shop, helpers: Any
) -> None:
    """Named as the files name theirs; another one that is not. Impressions, requests and context they do not say."""
    from serving.api.messages import decode_events
    from serving.stores.refresh import UserMemory

    settings, contract = shop_on_the_road.settings, datasets.load_contract(NAME)
    log = JobFolder(settings.home, "events").read("events")
    user, item = log["user_id"][0].as_py(), log["item_id"][0].as_py()
    needed = {c.name: 1 for c in contract.spec.event_features if not c.nullable}
    events = [
        {"item_id": item, "event_timestamp": f"2026-03-01T00:00:0{n}Z", **needed, **named}
        for n, named in enumerate(({"event_id": "by http"}, {}))
    ]
    body = msgspec.json.encode({"user_id": user, "events": events})
    memory = UserMemory(shop_on_the_road.store, contract)
    assert memory.add(*decode_events(body, contract)).added == 2
    taken = memory.read(user)
    helpers.run_jobs(settings, "events", "user_history", "item_stats", "materialize")
    after = JobFolder(settings.home, "events").read("events")
    assert after.num_rows == log.num_rows + 2
    assert "by http" in after["event_id"].to_pylist()
    found = memory.read(user)
    assert found["user_stats"] == taken["user_stats"]
    assert found["user_history"]["history"] == taken["user_history"]["history"]
    memory.close()
