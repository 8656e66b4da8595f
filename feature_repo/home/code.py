"""Digests of our own code: what made a run is part of its name, so that nothing made by other code
is taken for it.

A module stands for itself and for all of ours that it imports, however deep. Comments, docstrings
and layout do not count; what only talks to people does not either.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from feature_repo.settings import CHECKOUT

ROOMS = ("feature_repo", "beam_jobs", "modeling", "serving")
TALK = {
    "feature_repo.cli",
    "feature_repo.errors",
    "feature_repo.settings",
    "modeling.console",
    "modeling.evaluation.report",
}


def code_digest(*modules: str) -> str:
    """16 hex digits over these modules and all of ours that they import.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    found = _closure(modules)
    content = hashlib.sha256()
    for module in sorted(found):
        content.update(f"{module} {_digest(module)}\n".encode())
    return content.hexdigest()[:16]


def own_digest(module: str, without: tuple[str, ...] = ()) -> str:
    """16 hex digits over one module alone, and nothing that it imports; "" where nothing but imports is left.

    Args:
        without: names whose assignments at the top do not count.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    if _file(module) is None:
        raise ModuleNotFoundError(f"no module {module} in {CHECKOUT}")
    tree = _undocumented(_tree(module))
    left = [
        node
        for node in tree.body
        if not isinstance(node, (ast.Import, ast.ImportFrom)) and not _assigns(node, without)
    ]
    if not left:
        return ""
    dumped = "\n".join(ast.dump(node) for node in left)
    return hashlib.sha256(dumped.encode()).hexdigest()[:16]


def _assigns(node: ast.stmt, names: tuple[str, ...]) -> bool:
    """True if a statement assigns one of these names."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id in names for target in targets)


def _closure(modules: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or module in TALK:
            continue
        if _file(module) is None:
            raise ModuleNotFoundError(f"no module {module} in {CHECKOUT}")
        found.add(module)
        waiting += _imports(module)
    return found


@cache
def _file(module: str) -> Path | None:
    path = CHECKOUT.joinpath(*module.split("."))
    candidates = [path.with_suffix(".py"), path / "__init__.py"]
    # A package may have further folders, as that of datasets where some lie elsewhere.
    package, _, name = module.rpartition(".")
    folders = getattr(sys.modules.get(package), "__path__", ())
    candidates += [Path(folder, f"{name}.py") for folder in folders]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    file = _file(module)
    assert file is not None
    return ast.parse(file.read_text())


@cache
def _imports(module: str) -> tuple[str, ...]:
    """Modules of ours that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return tuple(
        sorted(n for n in names if n.split(".")[0] in ROOMS and "." in n and _file(n) is not None)
    )


@cache
def _digest(module: str) -> str:
    return hashlib.sha256(ast.dump(_undocumented(_tree(module))).encode()).hexdigest()


def _undocumented(tree: ast.Module) -> ast.Module:
    """A copy of a module without docstrings."""
    bare = copy.deepcopy(tree)
    for node in ast.walk(bare):
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        ) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return bare
