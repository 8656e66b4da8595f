"""The systemd unit, and what a server tells systemd."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from feature_repo.settings import CHECKOUT
from serving.api.settings import ServeSettings
from serving.command import open_ranker
from serving.live import systemd
from serving.live.live import Live
from serving.live.systemd import READY, STOPPING, notify
from serving.routes.app import app_of, serving_of
from serving.routes.server import Server

UNIT = CHECKOUT / "deploy" / "systemd" / "memoir.service"


@pytest.fixture(params=["file", "abstract"])
def told(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A socket as systemd has one."""
    named = (
        str(tmp_path / "notify")
        if request.param == "file"
        else f"@memoir-{tmp_path.name}-{id(tmp_path)}"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(named.replace("@", "\0"))
        listening.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", named)
        yield listening


def test_a_server_says_once_that_it_is_ready(trained_shop: Any, told: Any) -> None:
    live_one = serving_of(open_ranker(trained_shop.settings, replay=True))
    live = Live(load=lambda digest: live_one)
    live.current = live_one
    app = app_of(Server(live, ServeSettings(follow_s=60.0)), keep_up=True)

    async def run() -> list[str]:
        async with app.router.lifespan_context(app):
            first = (await asyncio.to_thread(told.recv, 100)).decode()
            # It is looked at each second.
            await asyncio.sleep(2.2)
        return [first, told.recv(100).decode()]

    assert asyncio.run(run()) == [READY, STOPPING]


def test_a_socket_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    said: list[Any] = []
    monkeypatch.setattr(systemd.logger, "warning", lambda *words: said.append(words))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify(READY)
    ((text, state, _),) = said
    assert (text, state) == ("systemd could not be told %s: %s", "READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify(READY)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed")
    # It looks whether the program is there.
    (unit := tmp_path / UNIT.name).write_text(
        UNIT.read_text().replace("/opt/memoir/.venv/bin/memoir", "/bin/true")
    )
    done = subprocess.run(
        [program, "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr
