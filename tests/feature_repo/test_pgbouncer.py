"""Catalogue and registry behind PgBouncer, whose every transaction may have another connection."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from feature_repo.errors import SettingsError
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.engines import typed_parameters
from feature_repo.store.store import open_store
from tests.conftest import Postgres, free_port, missing, wait_for_port

CONFIG = """
[databases]
* = host=127.0.0.1 port={database} user=memoir
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
"""


@pytest.fixture(scope="module")
def pooled_url(postgres: Postgres) -> Iterator[str]:
    """A database through a pooler with two connections, for any number of clients."""
    binary = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    if not Path(binary).exists():
        missing("pgbouncer")
    folder = Path(tempfile.mkdtemp(prefix="memoir-pgbouncer-"))
    folder.chmod(0o755)
    port = free_port()
    file = folder / "pgbouncer.ini"
    file.write_text(CONFIG.format(database=postgres.port, port=port))
    process = subprocess.Popen(
        [*postgres.as_user, binary, "-q", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_port(port, process)
    admin = create_engine(postgres.url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("CREATE DATABASE pooled"))
    admin.dispose()
    yield f"postgresql+psycopg://memoir@127.0.0.1:{port}/pooled"
    process.terminate()
    process.wait(timeout=10)
    shutil.rmtree(folder, ignore_errors=True)


def test_eight_clients_at_a_time(pooled_url: str) -> None:
    def use(number: int) -> int:
        catalogue = Catalogue(pooled_url)
        for n in range(20):
            with catalogue.stage("shop", f"stage {number}", f"inputs {n}") as stage:
                stage.details = {"n": n}
            assert catalogue.last_run("shop", f"stage {number}").details == {"n": n}
        catalogue.engine.dispose()
        return number

    Catalogue(pooled_url).engine.dispose()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(use, range(8))) == list(range(8))


def test_the_registry_is_read_and_written_through_it(
    shop: Any,
    pooled_url: str,
    redis_address: str,
    monkeypatch: pytest.MonkeyPatch,
    helpers: Any,
) -> None:
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", pooled_url)
    monkeypatch.setenv("MEMOIR_REDIS", redis_address)
    monkeypatch.setenv("MEMOIR_DATASET", shop.settings.dataset)
    production = replace(shop.settings, profile="production")
    helpers.apply_in_process(production)

    def read(number: int) -> set[str]:
        store = open_store(production)
        return {store.get_feature_view(name).name for name in ("user_stats", "item_stats") * 6}

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(8))) == [{"user_stats", "item_stats"}] * 8


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", {"prepare_threshold": None}),
        ("?prepare_threshold=7", {"prepare_threshold": 7}),
        ("?prepare_threshold=none", {"prepare_threshold": None}),
        ("?autocommit=off&connect_timeout=3", {"autocommit": False, "connect_timeout": "3"}),
    ],
)
def test_parameters_of_a_url_have_their_types(query: str, expected: dict[str, Any]) -> None:
    given = dict(make_url(f"postgresql+psycopg://db/registry{query}").query)
    assert typed_parameters(given).items() >= expected.items()


def test_a_value_that_none_can_have_is_named() -> None:
    with pytest.raises(SettingsError, match="prepare_threshold='often'"):
        typed_parameters({"prepare_threshold": "often"})
    with pytest.raises(SettingsError, match="autocommit='perhaps'"):
        typed_parameters({"autocommit": "perhaps"})
