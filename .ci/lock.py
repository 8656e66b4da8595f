"""Renew requirements.lock: every extra but `gcp`, with hashes, no release younger than two weeks,
and no torch. Then the locks of the images, in `deploy/docker/`: of each what it needs, at the same versions.

torch is installed by exact version alone (Makefile, Dockerfile), so that a CPU or a CUDA build satisfies it;
what torch itself needs is locked here. Needs `uv` on the PATH (`pipx install uv`). `--images` renews the images'
locks alone.
"""

import datetime
import pathlib
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
TORCH_NEEDS = (
    "filelock",
    "typing-extensions",
    "sympy",
    "networkx",
    "jinja2",
    "fsspec",
    "setuptools",
)
BUILD = ("hatchling", "editables", "pip")
IMAGES = {
    "serve": ("serve", "production", "tracing"),
    "jobs": ("beam", "dask", "production"),
    "train": ("train", "production"),
}

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = project["optional-dependencies"]


def needed(extras: Iterable[str]) -> set[str]:
    """What extras ask for, and the extras that they name; without torch."""
    found = set(project["dependencies"])
    for extra in extras:
        for requirement in EXTRAS[extra]:
            if requirement.startswith("memoir-rec["):
                found |= needed([requirement.removeprefix("memoir-rec[").removesuffix("]")])
            elif not requirement.startswith("torch"):
                found.add(requirement)
    return found


def write(file: pathlib.Path, requirements: Iterable[str], *more: str) -> None:
    """Resolve requirements into a lock with hashes."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
        source.write("\n".join(sorted(requirements)))
        source.flush()
        command = ["uv", "pip", "compile", source.name, "--universal", "--python-version", "3.11"]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
        subprocess.run([*command, *more, "--output-file", str(file)], check=True)


if "--images" not in sys.argv:
    newest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=14)
    of_all = needed(extra for extra in EXTRAS if extra != "gcp")
    write(LOCK, of_all | {*TORCH_NEEDS, *BUILD}, "--exclude-newer", newest.date().isoformat())
folder = ROOT / "deploy" / "docker"
folder.mkdir(exist_ok=True)
pinned = ("--constraint", str(LOCK))
write(folder / "build.lock", BUILD, *pinned)
write(folder / "torch.lock", TORCH_NEEDS, *pinned)
for image, extras in IMAGES.items():
    write(folder / f"{image}.lock", needed(extras), *pinned)
