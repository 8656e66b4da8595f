"""The images, built from the Dockerfile as it stands and walked as compose.yaml says: buildah makes them, on a base that
debootstrap makes, as no registry of images is at hand. A quarter of an hour and eight gigabytes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from feature_repo.settings import CHECKOUT
from tests.conftest import missing
from tests.deploy.test_containers import COMPOSE, Parts, fresh_database, parts, resolved
from tests.promises import Promises

__all__ = ["parts"]
pytestmark = pytest.mark.whole
TARGETS = ("jobs", "train", "serve")
BASE = "localhost/python-of-debian"
# What pip of this machine reads, a build must see too.
PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip", "/etc/ssl/certs")
ACCOUNT = """
set -e
test "$(id -u)" = 10001
test ! -w /opt/memoir -a ! -w / -a ! -w /etc -a -w /srv/memoir
unset HOME
python -m pip check
memoir --help 2>&1 | grep -q usage
"""


def run(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*map(str, command)],
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **more,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with Python 3.11, of Debian's packages."""
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            missing(program)
    if os.getuid() != 0:
        pytest.skip("debootstrap wants root")
    root = tmp_path_factory.mktemp("base") / "root"
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root)
    (root / "usr/bin/python").symlink_to("python3")
    container = run("buildah", "from", "scratch").stdout.strip()
    run("buildah", "add", container, root, "/")
    run("buildah", "config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin", container)
    run("buildah", "commit", "--rm", container, BASE)
    shutil.rmtree(root)
    return BASE


def pip_of_here() -> list[str]:
    """Arguments of a build that let its pip find packages where this machine's does."""
    told = run(sys.executable, "-m", "pip", "config", "list").stdout
    places = re.findall(r"(?:file://)?(/[\w/.-]+)", told)
    found = {place for place in (*PIP_FILES, *places) if Path(place).exists()}
    mounts = [word for place in sorted(found) for word in ("-v", f"{place}:{place}:ro")]
    given = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    return [*mounts, *(word for one in given.items() for word in ("--env", "=".join(one)))]


@pytest.fixture(scope="module")
def images(base: str) -> Iterator[dict[str, str]]:
    """A container of each target."""
    made = {}
    for target in TARGETS:
        command = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers"]
        command += ["--target", target, "-t", f"memoir-{target}", "--build-arg", f"PYTHON={base}"]
        run(*command, *pip_of_here(), CHECKOUT)
        made[target] = run("buildah", "from", f"memoir-{target}").stdout.strip().splitlines()[-1]
    yield made
    for container in made.values():
        run("buildah", "rm", container)


def inside(container: str, words: list[str], *more: str) -> list[str]:
    command = ["buildah", "run", "--isolation", "chroot", "--network", "host", *more]
    return [*command, container, "--", *words]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_an_account_that_writes_its_home_alone(
    images: dict[str, str], target: str
) -> None:
    run(*inside(images[target], ["sh", "-c", ACCOUNT]))


def test_the_road_of_compose_in_images(
    images: dict[str, str],
    parts: Parts,
    postgres: Any,
    helpers: Any,
    tmp_path: Path,
    promises: Promises,
) -> None:
    fresh_database(postgres)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 10001, 10001)
    for folder in (tmp_path, *tmp_path.parents[:2], parts.data):
        folder.chmod(0o755)
    mounts = [
        f"{home}:/srv/memoir",
        # File by file, as compose does it: the folder is not for others.
        *(f"{file}:/run/secrets/{file.name}:ro" for file in parts.secrets.iterdir()),
        f"{parts.data}:/srv/raw:ro",
    ]
    given = {"MEMOIR_DATA": "/srv/raw"}

    def arguments(service: str) -> list[str]:
        named = parts.compose["services"][service]["environment"]
        found = [word for mount in mounts for word in ("-v", mount)]
        for name, value in named.items():
            found += ["--env", f"{name}={resolved(str(value), given)}"]
        return found

    lines = re.findall(r"^#   docker compose run --rm (.+)$", COMPOSE.read_text(), re.MULTILINE)
    for service, *words in map(shlex.split, lines):
        run(*inside(images[service], ["memoir", *words], *arguments(service)))
    port = helpers.free_port()
    words = parts.compose["services"]["serve"]["command"]
    words = [str(port) if word == "8000" else word for word in words]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            inside(images["serve"], ["memoir", "serve", *words], *arguments("serve")),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        helpers.wait_for_port(port, process, 120)
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 30
        while (ready := httpx.get(f"{address}/readyz", timeout=20)).status_code != 200:
            assert time.monotonic() < until, ready.text
            time.sleep(0.5)
        body = {"user_id": 13000, "candidates": ["S001", "S002"]}
        answer = httpx.post(f"{address}/v1/rank", json=body, timeout=20)
        promises.note(
            "images built of the Dockerfile, the road of compose.yaml walked in them",
            "from raw rows to a ranked list, as an account that writes its home alone",
            f"{answer.status_code}, {len(answer.json()['item_ids'])} items ranked",
            held=answer.status_code == 200,
        )
        assert answer.status_code == 200, answer.text
    finally:
        # The server is a grandchild, to which buildah hands no signal on.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
