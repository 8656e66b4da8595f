"""Renew requirements.lock: every extra but `gcp`, with hashes, no release younger than two weeks,
and no torch.

torch is installed by exact version alone (Makefile), so that a CPU or a CUDA build satisfies it;
what torch itself needs is locked here. Needs `uv` on the PATH (`pipx install uv`).
"""

import datetime
import pathlib
import subprocess
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
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

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
wanted = set(project["dependencies"])
for extra, requirements in project["optional-dependencies"].items():
    if extra != "gcp":
        wanted |= {r for r in requirements if not r.startswith(("memoir-rec", "torch"))}
newest = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=14)).date().isoformat()
with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
    source.write("\n".join(sorted(wanted) + list(TORCH_NEEDS + BUILD)))
    source.flush()
    command = [
        "uv",
        "pip",
        "compile",
        source.name,
        "--universal",
        "--python-version",
        "3.11",
        "--generate-hashes",
        "--no-header",
    ]
    command += [
        "--no-annotate",
        "--quiet",
        "--exclude-newer",
        newest,
        "--output-file",
        str(ROOT / "requirements.lock"),
    ]
    subprocess.run(command, check=True)
