"""The end of `make demo`: start the server, rank for one real customer, show what came of it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.table import Table as RichTable

from feature_repo import datasets
from feature_repo.contract.arrow import micros, micros_iso
from feature_repo.contract.contract import TOKEN_VERSION, Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history.history import HistoryLog, newest_rows
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.settings import IS_INSTALLED, Settings

STAGES = (
    "events",
    "user_history",
    "item_stats",
    "training_examples",
    "apply",
    "materialize",
    "summary_tokens",
    "memory",
)
RECIPE_STAGES = ("train", "evaluate", "export")
NUM_CANDIDATES = 500
START_S = 120


def run_demo() -> int:
    """Start, ask, print. Returns the exit code."""
    settings = Settings.from_env()
    contract = datasets.load_contract(settings.dataset)
    console = Console()
    user_id, recent = choose_user(settings, contract)
    seen = set() if contract.spec.items_repeat else seen_items(settings, contract, user_id)
    candidates, titles = popular_items(settings, contract, seen)
    # 1. Ask twice: the first answer pays for what is set up on first use.
    began = time.perf_counter()
    with console.status("starting the server"), server() as address:
        started_s = time.perf_counter() - began
        body = {"user_id": user_id, "candidates": candidates, "k": 10}
        post(address, body)
        answer = post(address, body)
        one = one_more(settings, contract, address, body, titles)
    # 2. The list, with what the user did lately beside it.
    console.print()
    ranked = RichTable(
        title=f"{len(candidates)} candidates{' that they have not seen' if seen else ''} ranked for {contract.user.name} {user_id}: the best 10",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    value = contract.spec.stat_value.replace("_", " ")
    title_of = contract.spec.item_title
    for heading in ("", "item", title_of, value, "score"):
        ranked.add_column(heading, justify="left" if heading in ("item", title_of) else "right")
    for place, (item_id, score) in enumerate(
        zip(answer["item_ids"], answer["scores"], strict=True), 1
    ):
        title, price = titles[item_id]
        ranked.add_row(
            str(place),
            str(item_id),
            title or "",
            "" if price is None else f"{price:.2f}",
            f"{score:.3f}",
        )
    history = RichTable(title="recently", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("day", "action", title_of or "item"):
        history.add_column(heading)
    for day, action, item_id in recent:
        history.add_row(
            day, action, (titles.get(item_id) or (str(item_id), None))[0] or str(item_id)
        )
    (console if console.width >= 150 else Console(width=150)).print(
        Columns([ranked, history], padding=(0, 3))
    )
    # 3. Where the answer came from, and what one more event changes.
    print(f"bundle {answer['bundle']}, degraded by {', '.join(answer['degraded']) or 'nothing'}")
    if answer["tokens"]:
        token_summary(settings, answer["tokens"])
    show_one_more(console, contract, titles, one)
    timings = answer["timings_ms"]
    print(
        "request: "
        + ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in timings.items())
        + f"; sum {sum(timings.values()):.1f} ms"
    )
    summary(settings, started_s)
    return 0


def token_summary(settings: Settings, version: str) -> None:
    """Bytes of a user's tokens, and how many users have some."""
    folder = JobFolder(settings.home, "summary_tokens")
    rows = folder.read("summary_tokens")
    rows = newest_rows(
        rows.filter(pc.equal(rows[TOKEN_VERSION.join_key], version)), rows.column_names[0]
    )
    tokens, states = (pc.binary_length(rows[name]) for name in ("tokens", "state"))
    built = next(
        row
        for row in Catalogue(settings.catalogue_url).token_versions(settings.dataset)
        if row.fingerprint == version
    )
    print(
        f"summary tokens {version[:12]}: {built.num_tokens} × {built.width}, {pc.mean(tokens).as_py():,.0f} bytes a user"
        + (
            f" (and {pc.mean(states).as_py():,.0f} of state for streaming)"
            if states.null_count < len(states)
            else ""
        )
        + f", whatever the history; {built.covered:,} of {built.users:,} users covered ({built.coverage:.1%})"
    )


@dataclass(frozen=True)
class OneMore:
    """One more action of a user, and the answers before and after it."""

    item: Any
    before: dict[str, Any]
    after: dict[str, Any]


def one_more(
    settings: Settings,
    contract: Contract,
    address: str,
    body: dict[str, Any],
    titles: dict[Any, tuple[str | None, float | None]],
) -> OneMore:
    """Ask what the list would be if the user had acted once more, at the end of the data, on the item in
    the middle of the list. Nothing is written.
    """
    as_of = JobFolder(settings.home, "user_history").require().as_of_micros
    now = {"request_timestamp": micros_iso(as_of + 1_000_000)}
    whole = {**body, "k": None, "context": now, "what_if": {}}
    before = post(address, whole)
    item = before["item_ids"][len(before["item_ids"]) // 2]
    # What an event carries beside the item is as at the user's last one.
    known = post(address, {"user_id": body["user_id"]}, "/v1/history")["events"]
    event = {
        "action": contract.spec.actions[0],
        **{name: value for name, value in known[0]["values"].items() if value is not None},
        contract.item.join_key: item,
        EVENT_TIMESTAMP: micros_iso(as_of),
    }
    if contract.spec.stat_value and titles[item][1]:
        event[contract.spec.stat_value] = titles[item][1]
    after = post(address, {**whole, "what_if": {"events": [event]}})
    return OneMore(item, before, after)


def show_one_more(
    console: Console,
    contract: Contract,
    titles: dict[Any, tuple[str | None, float | None]],
    one: OneMore,
) -> None:
    """Show what one more action did: the items that rose and fell most."""
    # 1. Find each item's places before and after, and sort by how far an item rose.
    places = [
        {item_id: place for place, item_id in enumerate(found["item_ids"], 1)}
        for found in (one.before, one.after)
    ]
    moved = sorted(
        places[0], key=lambda item_id: (places[1][item_id] - places[0][item_id], places[0][item_id])
    )
    word = contract.spec.actions[0].replace("_", " ")
    title = titles[one.item][0] or one.item
    took = sum(one.after["timings_ms"].values())
    print(f"\nhad they one more {word}, of {one.item} ({title}): ranked in {took:.1f} ms")
    shown = RichTable(box=SIMPLE_HEAD)
    for heading in ("item", "", "place before", "after", "score before", "after"):
        shown.add_column(heading, justify="left" if heading in ("item", "") else "right")
    scores = [
        dict(zip(found["item_ids"], found["scores"], strict=True))
        for found in (one.before, one.after)
    ]
    # 2. Show the item itself, the three that rose most and the two that fell most.
    for item_id in dict.fromkeys([one.item, *moved[:3], *moved[-2:]]):
        shown.add_row(
            str(item_id),
            titles[item_id][0] or "",
            *(str(place[item_id]) for place in places),
            *(f"{score[item_id]:.3f}" for score in scores),
        )
    console.print(shown)
    # 3. Say how much of the whole list changed.
    pairs = zip(one.before["item_ids"], one.after["item_ids"], strict=True)
    changed = sum(first != second for first, second in pairs)
    print(f"{changed} of {len(places[0])} places changed; nothing was written")


def summary(settings: Settings, started_s: float) -> None:
    """Stage timings, metrics and how to go on."""
    from modeling.evaluation.evaluate import best_baselines

    # 1. How long each stage took in its last run.
    catalogue = Catalogue(settings.catalogue_url)
    recipe = catalogue.live_bundle(settings.dataset).recipe
    # The catalogue knows the stages of a recipe by the recipe's name too.
    stages = {stage: stage for stage in STAGES} | {
        stage: f"{stage} {recipe}" for stage in RECIPE_STAGES
    }
    runs = {
        stage: run
        for stage, name in stages.items()
        if (run := catalogue.last_run(settings.dataset, name))
    }
    total = sum(run.duration_s for run in runs.values()) + started_s
    print(
        "\nstages: "
        + ", ".join(f"{stage} {run.duration_s:.1f} s" for stage, run in runs.items())
        + f", server start {started_s:.1f} s; sum {total:.0f} s"
    )
    # 2. How well the model ranks, beside the best baselines.
    evaluation = runs["evaluate"].details
    counts = evaluation["counts"]
    print(f"\ntest period: {counts['requests']:,} requests, {counts['candidates']:,} candidates")
    metrics = evaluation["metrics"]
    figures = [
        f"{name} {metrics[name]['ndcg@10']['value']:.4f}"
        for name in ("model", *best_baselines(metrics))
        if metrics[name].get("ndcg@10")
    ]
    print(f"ndcg@10: {', '.join(figures)} (the whole table stands above, by evaluate)")
    print(f"report: {evaluation['report']}\ndata docs: {runs['events'].details['docs']}")
    # 3. What memory is worth, whatever that is.
    measured = runs.get("memory")
    if measured and "picture" in measured.details:
        print("\n" + "\n".join(measured.details["picture"]))
        if "page" in measured.details:
            print(f"page: {measured.details['page']}")
    # 4. What to try next.
    steps = {
        "python -m serving --replay"
        if IS_INSTALLED
        else "make serve": "rank over HTTP on port 8000",
        **({} if IS_INSTALLED else {"make check": "lint, types, tests"}),
    }
    listed = "\n".join(f"  {command:<14} {what}" for command, what in steps.items())
    print(f"\ngo on:\n{listed}\n  bring your own data: python -m feature_repo new, see README.md")


def choose_user(
    settings: Settings, contract: Contract
) -> tuple[int | str, list[tuple[str, str, int | str]]]:
    """A user with a history of middling length who acted lately, and their newest events, newest
    first.
    """
    # 1. Read how many events each user has, and when the last one was.
    log = HistoryLog(contract, JobFolder(settings.home, "user_history"))
    index = JobFolder(settings.home, "user_history").read("user_stats")
    by_user = index.group_by(contract.user.join_key).aggregate(
        [("history_end", "max"), ("event_timestamp", "max")]
    )
    length = by_user["history_end_max"].to_numpy()
    last = micros(by_user["event_timestamp_max"])
    # 2. Choose a user whose history is neither too short nor too long, if there is one.
    fitting = np.flatnonzero((length >= 40) & (length <= 400))
    if not len(fitting):
        fitting = np.arange(len(length))
    ids = by_user[contract.user.join_key].combine_chunks()
    by_id = pc.rank(ids.take(pa.array(fitting)), tiebreaker="first").to_numpy()
    # The latest, and of those the first id
    chosen = fitting[np.lexsort((by_id, -last[fitting]))[0]]
    user_id = ids[int(chosen)].as_py()
    # 3. Gather that user's newest events.
    histories = log.gather(row := log.rows_of(pa.array([user_id], ids.type)), log.lengths[row], 10)
    rows = []
    for event in range(len(histories.item_keys) - 1, -1, -1):
        day = str(np.datetime64(int(histories.times[event]), "us"))[:10]
        rows.append(
            (
                day,
                contract.spec.actions[int(histories.columns["action"][event])],
                log.items[int(histories.item_keys[event])].as_py(),
            )
        )
    return user_id, rows


def seen_items(settings: Settings, contract: Contract, user_id: Any) -> set[Any]:
    """All items that a user has acted on."""
    log = HistoryLog(contract, JobFolder(settings.home, "user_history"))
    row = log.rows_of(pa.array([user_id], log.users.type))
    return set(log.items.take(pa.array(log.gather(row, log.lengths[row]).item_keys)).to_pylist())


def popular_items(
    settings: Settings, contract: Contract, seen: set[Any]
) -> tuple[list[Any], dict[Any, tuple[str | None, float | None]]]:
    """The items with most events in the newest two weeks, without those seen; and (title, mean
    value) of every item.
    """
    item = contract.item.join_key
    stats = newest_rows(JobFolder(settings.home, "item_stats").read("item_stats"), item)
    profile = newest_rows(JobFolder(settings.home, "events").read("item_profile"), item)
    spec = contract.spec
    titled = [spec.item_title] if spec.item_title else []
    joined = stats.join(profile.select([item, *titled]), item, join_type="left outer")
    joined = joined.sort_by([("count_14d", "descending"), (item, "ascending")])
    ids = joined[item].to_pylist()
    titles = joined[spec.item_title].to_pylist() if spec.item_title else [None] * len(ids)
    value = f"mean_{spec.stat_value}"
    values = joined[value].to_pylist() if spec.stat_value else [None] * len(ids)
    unseen = [item_id for item_id in ids if item_id not in seen]
    return unseen[:NUM_CANDIDATES], {
        i: (title, value) for i, title, value in zip(ids, titles, values, strict=True)
    }


@contextmanager
def server() -> Iterator[str]:
    """A server in a process on a free port, ready; stopped at the end.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message holds what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        command = [sys.executable, "-m", "serving", "--port", str(port), "--replay"]
        process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_S
            while not _is_ready(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the server did not become ready within {timedelta(seconds=START_S)}:\n{log.read_text()}"
                    )
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=30)


def post(address: str, body: dict[str, Any], path: str = "/v1/rank") -> dict[str, Any]:
    """Ask the server."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
