"""The commands of README and docs run: each one, on the synthetic shop where it needs data."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from feature_repo.home.tables import JobFolder
from modeling import recipes
from modeling.commands.road import road
from modeling.models import model_class
from modeling.models.base import TokenMaker
from modeling.recipes import Recipe
from modeling.registry import makes_tokens

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
# The walk comes first: other pages look at what it built.
ORDER = [ROOT / "docs" / "walk.md", *(page for page in DOCS if page.name != "walk.md")]
EVERYTHING = "\n".join([README, *(page.read_text() for page in ORDER)])


def commands(text: str = EVERYTHING) -> list[str]:
    """Commands of `sh` blocks, each once; `console` blocks hold what needs things that are not here."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return list(
        dict.fromkeys(re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip())
    )


def test_the_readme_opens_with_a_sentence_and_the_two_commands() -> None:
    lines = [line for line in README.splitlines() if line]
    assert lines[0] == "# Memoir"
    assert lines[1].startswith("Memoir ranks") and lines[1].endswith(".")  # noqa: PT018
    assert commands(README)[:2] == ["make demo", "make check"]
    assert len(README.splitlines()) <= 100
    assert len(README.split()) <= 1000


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", EVERYTHING))))
def test_every_make_target_that_is_named_exists(target: str) -> None:
    done = subprocess.run(
        ["make", "-n", target], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_demo_runs_the_commands_that_are_told_step_by_step() -> None:
    """`make demo` reads as the data flow, and the README tells the same story."""
    shown = subprocess.run(
        ["make", "-n", "demo"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    told = [
        c
        for c in commands()
        if c.startswith(".venv/bin/python")
        and "--dry_run" not in c
        and "recipes" not in c
        and "dictionary" not in c
        and not c.endswith(("tokens", "check"))
    ]
    assert len(told) == 10
    steps = []
    for line in shown.splitlines():
        if "modeling road" in line:
            found = road(recipes.load("vista_trees"), "FnApiRunner")
            steps += [f".venv/bin/python -m {command}" for command in found]
        elif line.startswith(".venv/bin/python -m") and " pip " not in line:
            steps.append(line)
    assert [step for step in steps if step in told] == told
    assert steps[-1] == ".venv/bin/python -m serving demo --recipe vista_trees"


def test_the_road_to_a_recipe_that_reads_tokens_makes_them_first() -> None:
    assert road(recipes.load("amortised_tokens"), "FnApiRunner") == [
        "modeling train vista_stream",
        "modeling evaluate vista_stream",
        "modeling export vista_stream --not_live",
        "beam_jobs summary_tokens --bundle vista_stream --runner=FnApiRunner --every_days 7",
        "modeling train amortised_tokens",
        "modeling evaluate amortised_tokens",
        "modeling export amortised_tokens",
    ]
    # Whether a model makes tokens is said where torch is not imported, and is so.
    for name in recipes.all_recipes():
        recipe = recipes.load(name)
        if isinstance(recipe, Recipe):
            made = issubclass(model_class(recipe.model), TokenMaker) and recipe.tokens is None
            assert makes_tokens(recipe) == made, name


def test_a_recipe_says_which_paper_it_walks_and_where_it_departs() -> None:
    said = {name: recipes.walks(recipes.load(name)) for name in recipes.all_recipes()}
    assert "which is ours" in said["vista_trees"]
    assert said["vista"].startswith("it walks VISTA (arXiv 2510.22049); what else")
    assert "stage 2 alone" in said["vista_stage_2"]
    assert said["trees"] == said["din"] == ""
    for name, line in said.items():
        if line:
            file = ROOT / line.rpartition(" ")[2]
            assert "Differs" in file.read_text(), name


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path: Path, shop_data: Path) -> None:
    """All of them, in order, in processes of their own, from raw rows to a live bundle; then once
    more, all up to date.
    """
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("*.db", "*.pb", "__pycache__", "*.parquet")
    for room in ("feature_repo", "beam_jobs", "modeling", "serving"):
        shutil.copytree(ROOT / room, copy / room, ignore=ignore)
    # What tells a checkout from an installed package
    shutil.copy(ROOT / "pyproject.toml", copy)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MEMOIR_")}
    environment |= {"PYTHONPATH": str(copy), "MEMOIR_DATA": str(shop_data)}
    replaced = {
        ".venv/bin/python": sys.executable,
        ".venv/bin/feast": str(Path(sys.executable).parent / "feast"),
    }
    told = [c for c in commands() if c.startswith(".venv/")]
    assert len(told) == 16
    for command in told:
        program, *arguments = shlex.split(command)
        arguments = ["vista_trees_tiny" if a == "vista_trees" else a for a in arguments]
        done = subprocess.run(
            [replaced[program], *arguments],
            capture_output=True,
            text=True,
            cwd=copy,
            env=environment,
            check=False,
        )
        if command.endswith("feature_repo check"):
            # One customer of the invented shop has bought everything once, and that is said.
            said = [line for line in done.stdout.splitlines() if line.startswith("to mend: ")]
            assert [line.rsplit("'", 2)[1] for line in said] == ["large_share"]
            continue
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    # Of the jobs that build tables the first stands for all, which one class drives.
    alike = ("user_history", "item_stats", "training_examples")
    for command in told:
        if any(f"beam_jobs {job}" in command for job in alike):
            continue
        if "--runner" in command or "-m modeling" in command and "recipes" not in command:  # noqa: RUF021
            _, *arguments = shlex.split(command)
            arguments = ["vista_trees_tiny" if a == "vista_trees" else a for a in arguments]
            done = subprocess.run(
                [sys.executable, *arguments],
                capture_output=True,
                text=True,
                cwd=copy,
                env=environment,
                check=False,
            )
            assert "up to date" in done.stdout, f"{command}\n{done.stdout}\n{done.stderr}"
    shown = subprocess.run(
        [sys.executable, "-m", "serving", "demo"],
        capture_output=True,
        text=True,
        cwd=copy,
        env=environment,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    for part in (
        "the best 10",
        "recently",
        "PRODUCT",
        "stages:",
        "ndcg@10",
        "own frequency",
        "make serve",
        "report:",
        "users covered",
        "one more purchase",
    ):
        assert part in shown.stdout, shown.stdout


def test_the_request_that_is_shown_is_answered(trained_shop: Any) -> None:
    from starlette.testclient import TestClient

    from serving.command import open_ranker
    from serving.routes.app import create_app

    (curl,) = [c for c in commands() if c.startswith("curl")]
    arguments = shlex.split(curl)
    assert "localhost:8000/v1/rank" in arguments
    body = arguments[arguments.index("-d") + 1]
    header = arguments[arguments.index("-H") + 1].split(": ")
    client = TestClient(
        create_app(open_ranker(trained_shop.settings, replay=True)), base_url="http://localhost"
    )
    answer = client.post("/v1/rank", content=body, headers=dict([header]))
    assert answer.status_code == 200
    assert len(answer.json()["item_ids"]) == json.loads(body)["k"]
    for name in (
        "item_ids",
        "scores",
        "bundle",
        "tokens",
        "degraded",
        "unknown_items",
        "timings_ms",
    ):
        assert name in answer.json()
        assert f'"{name}"' in README
    for path in re.findall(r"`(/[a-z.]+)`", README):
        assert client.get(path).status_code == 200


def test_the_sequence_that_is_shown_knows_the_purchase(
    shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rank, an event of now, rank again, as printed but for the ids: nothing is lacking, and the list is
    another one. `make serve` replays data of the past.
    """
    from starlette.testclient import TestClient

    from serving.api.settings import ServeSettings
    from serving.live.live import BundleSource, Live
    from serving.routes.app import app_of
    from serving.routes.server import Server

    road = helpers.token_road(shop, tmp_path_factory.mktemp("readme"))
    live = Live(BundleSource(road.settings, replay=True).load)
    live.load_now()
    assert live.current is not None, live.not_loaded
    server = Server(live, ServeSettings(deadline_ms=10_000, store_ms=5_000))
    client = TestClient(app_of(server), base_url="http://localhost")
    ranker = live.current.ranker
    users = JobFolder(road.settings.home, "user_history").read("user_history")["user_id"]
    known = ranker.bundle.encoder.items.values.to_pylist()
    ids = {"12680": str(users[0]), "22726": known[3], "85123A": known[4], "23256": known[5]}
    ranked, event = (
        shlex.split(re.sub("|".join(ids), lambda found: ids[found[0]], text))
        for text in (curl_of("/v1/rank"), curl_of("/v1/events"))
    )

    def send(words: list[str]) -> dict[str, Any]:
        path = words[2].removeprefix("localhost:8000")
        header = words[words.index("-H") + 1].split(": ")
        answer = client.post(path, content=words[words.index("-d") + 1], headers=dict([header]))
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    before = send(ranked)
    assert (before["degraded"], before["tokens"]) == ([], ranker.bundle.tokens)
    assert send(event) == {"added": 1, "known": 0, "waiting": 0}
    after = send(ranked)
    assert (after["degraded"], after["tokens"]) == ([], ranker.bundle.tokens)
    assert after["scores"] != before["scores"]
    # The next batch knows the purchase: `make refresh` is these jobs.
    rows = JobFolder(road.settings.home, "events").read("events").num_rows
    helpers.run_jobs(road.settings, "events", "user_history", "item_stats", "materialize")
    helpers.run_jobs(road.settings, "summary_tokens", bundle="vista_tiny")
    assert JobFolder(road.settings.home, "events").read("events").num_rows == rows + 1
    live.load_now()
    assert live.current is not None
    row = live.current.ranker.reader.read_user(users[0].as_py())
    assert row.history is not None
    assert row.history["event_timestamp"][-1].as_py() > datetime.now(UTC) - timedelta(minutes=5)
    refreshed = send(ranked)
    assert (refreshed["degraded"], refreshed["tokens"]) == ([], ranker.bundle.tokens)


def curl_of(path: str) -> str:
    """The call of a path that the README prints, with the shell's clock read."""
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", README, re.DOTALL)
    (block,) = [block for block in blocks if f"localhost:8000{path} " in block]
    return block.replace("'$(date -u +%FT%TZ)'", f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")


def test_links_lead_somewhere() -> None:
    rooms = ("feature_repo", "beam_jobs", "modeling", "serving")
    of_rooms = [ROOT / room / name for room in rooms for name in ("README.md", "DECISIONS.md")]
    for file in (ROOT / "README.md", *DOCS, *of_rooms):
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            if "://" not in link:
                assert (file.parent / link).exists(), f"{file}: {link}"
