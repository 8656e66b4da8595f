"""Images, compose and Kubernetes: linted, and their steps walked by hand, as no daemon of containers is here: the same commands,
in the same order, with the environment that each file gives, over the Redis that compose.yaml starts and a real PostgreSQL.
`make reliability` builds the images too, from the Dockerfile as it stands.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy import create_engine, text

from feature_repo.settings import CHECKOUT
from tests.conftest import missing

COMPOSE = CHECKOUT / "deploy" / "compose" / "compose.yaml"
KUBERNETES = CHECKOUT / "deploy" / "kubernetes"
DOCKERFILE = CHECKOUT / "Dockerfile"
LOCKS = CHECKOUT / "deploy" / "docker"
SERVER = re.compile(r"up --detach --wait serve$")
# `memoir …` for each line of its standard input, in one process
MEMOIR = """
import json, sys
from importlib import import_module
from feature_repo import cli
from feature_repo.script import ROOMS
for line in sys.stdin:
    room, *words = json.loads(line)
    app = import_module(f"{ROOMS[room]}.__main__").app
    code = cli.run(lambda: app(words))
    print("==", room, *words, code, flush=True)
    if code:
        sys.exit(code)
"""


def tool(name: str) -> str:
    """A program of the virtual environment."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        missing(name)
    assert found is not None
    return found


def linted(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What kustomize makes of the folder, valid by Kubernetes' own schemas."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path_factory.mktemp("kubernetes") / "all.yaml"
    file.write_text(done.stdout)
    for version in ("1.29", "1.37"):
        linted(tool("kubernetes-validate"), "-k", version, "--strict", file)
    return list(yaml.safe_load_all(done.stdout))


def pins(lock: Path) -> set[str]:
    return set(re.findall(r"^[\w.\[\]-]+==[^ ;\\]+", lock.read_text(), re.MULTILINE))


def test_each_image_has_the_versions_of_the_lock() -> None:
    known = pins(CHECKOUT / "requirements.lock")
    locks = sorted(LOCKS.glob("*.lock"))
    assert [lock.stem for lock in locks] == ["build", "jobs", "serve", "torch", "train"]
    for lock in locks:
        assert pins(lock)
        assert pins(lock) <= known, lock
        # No tool of ours for tests and checks is in an image.
        assert not {"pytest", "ruff", "hypothesis"} & {pin.partition("==")[0] for pin in pins(lock)}


def test_a_linter_takes_the_dockerfile_and_compose() -> None:
    linted(tool("hadolint"), DOCKERFILE)
    linted(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_images_are_named_alike(manifests: list[dict[str, Any]]) -> None:
    targets = set(re.findall(r"^FROM account AS (\w+)$", DOCKERFILE.read_text(), re.MULTILINE))
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    built = {one["build"]["target"] for one in services.values() if "build" in one}
    used = {
        re.sub(r".*/memoir-(\w+):.*", r"\1", one["image"])
        for manifest in manifests
        for one in containers(manifest)
    }
    assert targets == built == used


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """A workload's containers, in the order in which they run."""
    spec = manifest.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    pod = spec.get("template", {}).get("spec", {})
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def test_nothing_runs_as_root_or_writes_elsewhere(manifests: list[dict[str, Any]]) -> None:
    workloads = [manifest for manifest in manifests if containers(manifest)]
    assert len(workloads) == 3
    for manifest in workloads:
        spec = manifest["spec"]
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        assert spec["template"]["spec"]["securityContext"]["runAsNonRoot"]
        for one in containers(manifest):
            locked = one["securityContext"]
            assert locked["readOnlyRootFilesystem"]
            assert not locked["allowPrivilegeEscalation"]
            assert locked["capabilities"] == {"drop": ["ALL"]}
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for name in ("jobs", "train", "serve"):
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]
    assert "docker-entrypoint.sh" in services["redis"]["command"][-1]


@dataclass
class Parts:
    """A Redis and a PostgreSQL as compose.yaml starts them, and where their secrets are."""

    compose: dict[str, Any]
    secrets: Path
    data: Path
    work: Path


@pytest.fixture(scope="module")
def parts(
    postgres: Any, shop_data: Path, tmp_path_factory: pytest.TempPathFactory, helpers: Any
) -> Iterator[Parts]:
    work = tmp_path_factory.mktemp("compose")
    # 1. The secrets, by the script; made once.
    shutil.copy(COMPOSE.with_name("secrets.sh"), work)
    for _ in range(2):
        subprocess.run([str(work / "secrets.sh")], check=True)
    secrets = work / "secrets"
    assert secrets.stat().st_mode & 0o077 == 0
    # 2. Redis, by the command of the file, with a port and a folder.
    if not shutil.which("redis-server"):
        missing("redis-server")
    compose = yaml.safe_load(COMPOSE.read_text())
    shell, option, script = compose["services"]["redis"]["command"]
    port = helpers.free_port()
    script = (
        script.replace("$$", "$")
        .replace("/run/secrets", str(secrets))
        .replace(
            "docker-entrypoint.sh redis-server -", f"redis-server - --port {port} --dir {work}"
        )
    )
    process = subprocess.Popen([shell, option, script], stdout=subprocess.DEVNULL)
    helpers.wait_for_port(port, process)
    # 3. Where both are reached from here
    for name, inside, here in (
        ("redis", "redis:6379", f"127.0.0.1:{port}"),
        ("registry", "postgres:5432", f"127.0.0.1:{postgres.port}"),
    ):
        file = secrets / name
        changed = file.read_text().replace(inside, here)
        assert here in changed
        file.unlink()
        file.write_text(changed)
    check = compose["services"]["redis"]["healthcheck"]["test"][1]
    check = check.replace("$$", "$").replace("/run/secrets", str(secrets))
    check = check.replace("redis-cli", f"redis-cli -p {port}")
    assert subprocess.run(["sh", "-c", check], check=False).returncode == 0
    yield Parts(compose, secrets, shop_data, work)
    process.terminate()
    process.wait(timeout=20)


def fresh_database(postgres: Any) -> None:
    engine = create_engine(postgres.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS memoir"))
        connection.execute(text("CREATE DATABASE memoir"))
    engine.dispose()


def walked(steps: list[list[str]], environment: dict[str, str], folder: Path) -> str:
    """Walk commands, in a folder that is not theirs to write, without a HOME; returns what they printed."""
    done = subprocess.run(
        [sys.executable, "-c", MEMOIR],
        input="".join(json.dumps(step) + "\n" for step in steps),
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    assert list(folder.iterdir()) == []
    return done.stdout


def served(
    words: list[str], environment: dict[str, str], folder: Path, helpers: Any, host: str = ""
) -> None:
    """Start a server, rank, and stop it as a container is stopped.

    Args:
        host: what its callers call it.
    """
    port = helpers.free_port()
    words = [str(port) if word == "8000" else word for word in words]
    main = "from feature_repo.script import main; raise SystemExit(main())"
    command = [sys.executable, "-c", main]
    process = subprocess.Popen(
        [*command, "serve", *words],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    helpers.wait_for_port(port, process, 120)
    address = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{address}/livez").status_code == 200
    ready = httpx.get(f"{address}/readyz", timeout=20)
    assert ready.status_code == 200, ready.text
    body = {"user_id": 13000, "candidates": ["S001", "S002"]}
    headers = {"Host": host} if host else {}
    answer = httpx.post(f"{address}/v1/rank", json=body, headers=headers, timeout=20)
    assert answer.status_code == 200, answer.text
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert list(folder.iterdir()) == []


def resolved(value: str, given: dict[str, str]) -> str:
    """A value of compose.yaml: `${NAME:-default}`."""
    return re.sub(r"\$\{(\w+):-(.*?)\}", lambda found: given.get(found[1]) or found[2], value)


def here(named: dict[str, str], parts: Parts, home: Path, mounted: str) -> dict[str, str]:
    """The environment of a container, with its places as they are here."""
    found = {"PATH": os.environ["PATH"], "MEMOIR_HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
    for name, value in named.items():
        value = value.replace(f"file://{mounted}", parts.secrets.as_uri())
        found[name] = value.replace("/srv/memoir", str(home))
    return found


@pytest.mark.slow
def test_compose_by_hand(parts: Parts, postgres: Any, helpers: Any, tmp_path: Path) -> None:
    fresh_database(postgres)
    given = {"MEMOIR_DATA": str(parts.data)}
    services = parts.compose["services"]
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    folder.mkdir(mode=0o555)
    lines = re.findall(r"^#   docker compose (.+)$", COMPOSE.read_text(), re.MULTILINE)
    steps = [shlex.split(line)[2:] for line in lines if line.startswith("run --rm")]
    assert {service for service, *_ in steps} == {"jobs", "train"}
    assert SERVER.search(lines[-1])

    def of(service: str) -> dict[str, str]:
        named = services[service]["environment"]
        return here(
            {name: resolved(str(value), given) for name, value in named.items()},
            parts,
            home,
            "/run/secrets",
        )

    assert of("jobs") == of("train")
    size = ["serve", "size", "--replay", "--sample=20", "--users=1000000", "--requests_per_s=100"]
    said = walked([*(words for _, *words in steps), size], of("jobs"), folder)
    # By Redis' own word of the keys' memory
    assert "1,000,000 users" in said
    assert "memory to give a Redis" in said
    served(services["serve"]["command"], of("serve"), folder, helpers)


@pytest.mark.whole
def test_kubernetes_by_hand(
    parts: Parts,
    postgres: Any,
    manifests: list[dict[str, Any]],
    helpers: Any,
    tmp_path: Path,
) -> None:
    fresh_database(postgres)
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    folder.mkdir(mode=0o555)
    maps = {one["metadata"]["name"]: one["data"] for one in manifests if one["kind"] == "ConfigMap"}

    def of(container: dict[str, Any]) -> dict[str, str]:
        named: dict[str, str] = {"MEMOIR_DATA": str(parts.data)}
        for source in container["envFrom"]:
            named |= maps[source["configMapRef"]["name"]]
        return here(named, parts, home, "/run/secrets/memoir")

    by_name = {
        one["metadata"]["name"]: containers(one)
        for one in manifests
        if one["kind"] in ("CronJob", "Deployment")
    }
    jobs = [*by_name["memoir-refresh"], *by_name["memoir-train"]]
    walked([one["args"] for one in jobs], of(jobs[0]), folder)
    (serve,) = by_name["memoir-serve"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert serve[probe]["httpGet"]["path"] in ("/livez", "/readyz")
    (service,) = (one for one in manifests if one["kind"] == "Service")
    named = service["metadata"]
    served(serve["args"], of(serve), folder, helpers, f"{named['name']}.{named['namespace']}.svc")
