"""Who imports whom (CONTRIBUTING.md): rooms, the packages inside of them, and the heavy libraries that each may
touch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterable
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
# Inside a room a package, or a file beside the packages, imports only what stands before it.
ORDER = {
    "feature_repo": (
        "errors atomic cli script settings contract home history raw datasets feature_definitions scaffold store __main__"
    ),
    "beam_jobs": "errors erase engine registry command jobs summary_tokens __main__",
    "modeling": (
        "console errors metrics recipes registry inputs claims layers models baselines trees training_set summaries training "
        "evaluation next_item bundle comparison commands __main__"
    ),
    "serving": "api demo stores ranking served live size routes command __main__",
}
MOST_FILES = 14  # of a package; layers may have more
# Packages that may import a library; a room stands for all of its packages.
LIBRARIES = {
    "feast": {
        "feature_repo.store",
        "feature_repo.feature_definitions",
        "feature_repo.benchmarks",
        "modeling.training_set",
        "serving.stores",
        "serving.live",
    },
    "torch": {"modeling", "serving", "beam_jobs.summary_tokens"},
    "apache_beam": {"beam_jobs"},
    "great_expectations": {"feature_repo.contract"},
    "lightgbm": {"modeling.trees", "modeling.benchmarks"},
}
# The summary job runs a model, and is measured with one.
RUNS_A_MODEL = {"beam_jobs.summary_tokens", "beam_jobs.benchmarks"}
FOR_ALL = (
    "atomic", "cli", "contract.arrow", "contract.contract", "contract.declarations", "contract.key_index",
    "contract.limits", "contract.schema", "datasets", "errors", "history.envelope", "history.history",
    "history.transforms", "history.user_stats", "home.catalogue", "home.code", "home.tables", "home.traces",
    "raw.examples", "raw.parse", "raw.raw", "raw.sources", "scaffold.names", "scaffold.preview", "scaffold.shapes",
    "scaffold.sniff", "scaffold.suggest", "settings",
)  # fmt: skip


def files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def package_of(module: str) -> str:
    """`modeling.training` of `modeling.training.trainer`; a file beside the packages is its own."""
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    return _imported(ast.walk(ast.parse(path.read_text())), path)


def imports_at_run_time(path: Path) -> set[str]:
    """The same without what only type checkers see."""
    tree = ast.parse(path.read_text())
    unseen: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            unseen |= set(ast.walk(node))
    return _imported((node for node in ast.walk(tree) if node not in unseen), path)


def _imported(nodes: Iterable[ast.AST], path: Path) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by package name, not relatively"
            # `from modeling import recipes` names a package of the room, `from x.y import name` a module.
            beside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= set(beside) if node.module in ROOMS else {node.module or ""}
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_and_package_may(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    room, package = name.split(".")[0], package_of(name)
    for module in imports(path):
        top = module.split(".")[0]
        if top in ROOMS and not (package in RUNS_A_MODEL and top == "modeling"):
            assert top in MAY_IMPORT[room], f"{name} imports {module}"
            assert module != "feature_repo.feature_definitions", (
                f"{name}: ask the registry by name instead"
            )
        if top in LIBRARIES and package not in RUNS_A_MODEL:
            assert LIBRARIES[top] & {room, package}, f"{name} imports {module}"
    below = ORDER[room].split()
    own = package.rpartition(".")[2]
    if own not in below:
        assert own in ("__init__", "benchmarks"), f"{package} has no place in ORDER"
        return
    for module in imports_at_run_time(path):
        if module.startswith(f"{room}."):
            other = package_of(module).rpartition(".")[2]
            allowed = below[: below.index(own) + 1]
            assert other in allowed, f"{name} imports {module}: an arrow that runs up"


def test_no_two_files_import_each_other() -> None:
    """Nor any more in a ring, type checkers' imports among them."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files()}
    left = {name: imports(path) & set(names) - {name} for name, path in names.items()}
    # What imports nothing that is left is in no ring; what stays is.
    while free := {name for name, below in left.items() if not below & set(left)}:
        left = {name: below for name, below in left.items() if name not in free}
    assert not left, f"they import each other, or what does: {sorted(left)}"


def test_a_package_is_a_noun_of_a_few_files_that_says_what_it_is() -> None:
    for room in ROOMS:
        for folder in sorted({path.parent for path in (ROOT / room).rglob("*.py")}):
            files = [p for p in folder.glob("*.py") if p.stem not in ("__init__", "__main__")]
            if folder.name not in ("layers", "benchmarks"):
                assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files"
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("name", FOR_ALL)
def test_shared_modules_import_neither_feast_nor_torch_nor_beam(name: str) -> None:
    script = f"import sys, feature_repo.{name}; print([m for m in ('feast', 'torch', 'apache_beam', 'great_expectations') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("name", ["contract/schema", "settings"])
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
