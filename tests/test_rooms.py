"""Who imports whom (CONTRIBUTING.md): rooms, and the heavy libraries that each may touch."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("feature_repo", "beam_jobs", "modeling", "serving")
MAY_IMPORT = {
    "feature_repo": {"feature_repo"},
    "beam_jobs": {"beam_jobs", "feature_repo"},
    "modeling": {"modeling", "feature_repo"},
    "serving": {"serving", "modeling", "feature_repo"},
}
# The summary job runs a model: the one exception.
EXCEPTIONS = {
    "beam_jobs/summary_tokens.py": {"modeling.bundle", "modeling.summary", "torch"},
    "beam_jobs/summarise.py": {"modeling.summary"},
    "beam_jobs/benchmarks/summary_tokens.py": {
        "modeling",
        "modeling.encoder",
        "modeling.columns",
        "modeling.recipes",
        "modeling.summary",
        "torch",
        "feast",
        "feast.infra.online_stores.redis",
        "feast.types",
    },
}
# Files that may import a library; a room stands for all its files.
LIBRARIES = {
    "feast": {
        "feature_repo/feature_definitions.py",
        "feature_repo/offline_store.py",
        "feature_repo/online_erase.py",
        "feature_repo/online_rows.py",
        "feature_repo/online_tokens.py",
        "feature_repo/online_users.py",
        "feature_repo/provider.py",
        "feature_repo/redis_writer.py",
        "feature_repo/store.py",
        "feature_repo/benchmarks/point_in_time.py",
        "modeling/dataset.py",
        "modeling/training_set.py",
        "serving/events.py",
        "serving/features.py",
        "serving/live.py",
        "serving/redis_reader.py",
        "serving/refresh.py",
    },
    "torch": {"modeling", "serving"},
    "apache_beam": {"beam_jobs"},
    "great_expectations": {"feature_repo/expectations.py"},
}
FOR_ALL = (
    "schema",
    "contract",
    "datasets",
    "transforms",
    "history",
    "tables",
    "settings",
    "catalogue",
    "arrow",
    "envelope",
    "errors",
    "cli",
    "raw",
    "limits",
    "key_index",
    "code",
    "declarations",
    "examples",
    "parse",
    "preview",
    "sources",
    "suggest",
    "names",
    "shapes",
    "sniff",
    "traces",
)


def files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by package name, not relatively"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    name = str(path.relative_to(ROOT))
    for module in imports(path) - EXCEPTIONS.get(name, set()):
        top = module.split(".")[0]
        if top in ROOMS:
            assert top in MAY_IMPORT[room], f"{name} imports {module}"
            assert module != "feature_repo.feature_definitions", (
                f"{name}: ask the registry by name instead"
            )
        if top in LIBRARIES:
            assert LIBRARIES[top] & {room, name}, f"{name} imports {module}"


@pytest.mark.parametrize("name", FOR_ALL)
def test_shared_modules_import_neither_feast_nor_torch_nor_beam(name: str) -> None:
    script = f"import sys, feature_repo.{name}; print([m for m in ('feast', 'torch', 'apache_beam', 'great_expectations') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("name", ["schema", "settings"])
def test_the_contract_and_the_settings_need_the_standard_library_only(name: str) -> None:
    for module in imports(ROOT / "feature_repo" / f"{name}.py"):
        top = module.split(".")[0]
        assert top in sys.stdlib_module_names or top == "feature_repo", (
            f"{name}.py imports {module}"
        )


@pytest.mark.parametrize("room", ROOMS)
def test_help_answers_within_a_second(room: str) -> None:
    best = min(_help_seconds(room) for _ in range(3))
    assert best < 1.0, f"python -m {room} --help took {best:.2f} s"


def _help_seconds(room: str) -> float:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", room, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith("Usage: python -m " + room)
    return time.perf_counter() - started


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(path: Path) -> None:
    banned = {"pickle", "dill", "marshal", "cloudpickle", "shelve"}
    assert not {module.split(".")[0] for module in imports(path)} & banned
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "yaml.load"}, (
                f"{path}:{node.lineno} calls {called}"
            )
            if called == "torch.load":
                assert any(
                    k.arg == "weights_only" and getattr(k.value, "value", False) is True
                    for k in node.keywords
                )
