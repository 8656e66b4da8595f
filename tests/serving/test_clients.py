"""Clients that others generate from the OpenAPI document: they compile, and they rank."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from feature_repo.datasets import load_contract
from serving.api.messages import ASKED
from serving.api.openapi import openapi_document
from tests.conftest import server_environment

CONTRACT = load_contract("online_retail")
# The same request through `openapi-fetch`, which checks it against the types that were generated
TYPESCRIPT = """
import createClient from "openapi-fetch";
import type { paths, components } from "./schema.js";
const [address, user, ...candidates] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: address });
const request: components["schemas"]["RankRequest"] = { user_id: Number(user), candidates };
const { data, error } = await client.POST("/v1/rank", { body: request });
if (error) throw new Error(error.message);
const best: string = data.item_ids[0];
console.log(JSON.stringify({ best, scores: data.scores.length, degraded: data.degraded }));
"""
COMPILER = {"strict": True, "module": "nodenext", "target": "es2022", "types": ["node"]}


@pytest.fixture(scope="module")
def address(
    trained_shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server over the shop."""
    port = helpers.free_port()
    environment = server_environment(trained_shop)
    command = [sys.executable, "-m", "serving", "--port", str(port), "--replay"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=helpers.checkout,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    helpers.wait_for_port(port, process, 90)
    found = f"http://127.0.0.1:{port}"
    for _ in range(200):
        if httpx.get(f"{found}/readyz").status_code == 200:
            break
    yield found
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def document(address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document in a file."""
    file = tmp_path_factory.mktemp("document") / "openapi.json"
    file.write_bytes(httpx.get(f"{address}/openapi.json").content)
    return file


@pytest.fixture(scope="module")
def asked(address: str) -> tuple[int, list[str]]:
    """A user whom the server knows, and items."""
    overview = httpx.get(f"{address}/v1/overview").json()
    return overview["users"][0]["user_id"], [item["item_id"] for item in overview["items"][:5]]


def every_schema(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, list):
        for each in node:
            yield from every_schema(each)
    elif isinstance(node, dict):
        yield node
        for each in node.values():
            yield from every_schema(each)


def test_the_document_says_what_generators_need() -> None:
    document = openapi_document(CONTRACT)
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names) == 12
    assert all("content" in operation["responses"]["200"] for operation in operations)
    assert document["servers"] == [{"url": "/"}]
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    schemas = document["components"]["schemas"]
    assert not [
        one for one in every_schema(schemas) if "prefixItems" in one or one.get("items") is False
    ]
    for name in ASKED:
        assert not [one for one in schemas[name]["properties"].values() if "default" in one], name
    assert "Default: false." in schemas["RankRequest"]["properties"]["task_scores"]["description"]
    user = schemas["RankRequest"]["properties"]["user_id"]
    assert (user["format"], "2^53" in user["description"]) == ("int64", True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_python_client_ranks(
    address: str, document: Path, asked: tuple[int, list[str]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", str(document)]
    made = subprocess.run(
        [*command, "--meta", "none", "--output-path", str(tmp_path / "shop_client")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    client, models, rank = (
        _imported(tmp_path, f"shop_client{name}")
        for name in (".client", ".models", ".api.default.rank")
    )
    user, items = asked
    request = models.RankRequest(user_id=user, candidates=items, k=3)
    answer = rank.sync(client=client.Client(base_url=address), body=request)
    assert set(answer.item_ids) < set(items)
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert answer.degraded == []
    # What is refused comes as what the document says.
    refused = rank.sync(client=client.Client(base_url=address), body=models.RankRequest(user, []))
    assert isinstance(refused, models.ErrorBody)


def _imported(folder: Path, name: str) -> ModuleType:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def test_a_typescript_client_compiles_and_ranks(
    address: str, document: Path, asked: tuple[int, list[str]], tmp_path: Path
) -> None:
    """Where Node is: its packages come from its registry."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    package = {"name": "shop", "version": "0.0.0", "type": "module", "private": True}
    (tmp_path / "package.json").write_text(json.dumps(package))
    names = ["openapi-typescript@7.13.0", "typescript@5", "openapi-fetch@0.15", "@types/node@22"]
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *names]
    if subprocess.run(install, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("npm's registry cannot be reached")
    (tmp_path / "rank.ts").write_text(TYPESCRIPT)
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": COMPILER}))

    def node(*command: str) -> str:
        done = subprocess.run(
            ["npx", "--no-install", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    node("openapi-typescript", str(document), "-o", "schema.d.ts")
    node("tsc", "-p", ".")
    user, items = asked
    said = json.loads(node("node", "rank.js", address, str(user), *items))
    assert said["best"] in items
    assert (said["scores"], said["degraded"]) == (len(items), [])
