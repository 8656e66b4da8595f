"""Redis servers of our own on free loopback ports: one, a cluster of masters, or one that Sentinels watch over."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.command import listenable

SLOTS = 16_384


@dataclass
class Redis:
    """A Redis that may be killed.

    Args:
        folder: where it works.
        options: further ones of `redis-server`.

    Example:
        >>> redis = Redis(6400, Path("/tmp"))
        >>> redis.start()
        >>> redis.send(signal.SIGKILL)
    """

    port: int
    folder: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self.folder), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(lambda: connects(self.port))

    def send(self, number: signal.Signals) -> None:
        if self.process is None:
            raise RuntimeError("it was not started")
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(timeout=10)


def connects(port: int) -> bool:
    """Whether anybody listens."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_for(true: Callable[[], bool], seconds: float = 30.0) -> float:
    """Wait until something holds; returns the seconds that it took."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"it did not come within {seconds} s")
        time.sleep(0.02)
    return time.monotonic() - began


class Cluster:
    """Masters that share the slots evenly, without replicas.

    Args:
        folder: each node gets a folder in it.
    """

    def __init__(self, folder: Path, masters: int = 3) -> None:
        self.nodes: list[Redis] = []
        self._buses: list[int] = []
        for number in range(masters):
            own = folder / f"node-{number}"
            own.mkdir(parents=True)
            bus = listenable("127.0.0.1", 0)
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus)]
            # The others go on where one is lost, as a store of features should.
            options += ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "1000"]
            self.nodes.append(Redis(listenable("127.0.0.1", 0), own, tuple(options)))
            self._buses.append(bus)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        per_node = SLOTS / len(self.nodes)
        for number, client in enumerate(self.clients()):
            first, last = round(number * per_node), round((number + 1) * per_node) - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        first_node = self.clients()[0]
        for node, bus in zip(self.nodes[1:], self._buses[1:], strict=True):
            first_node.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait_for(lambda: all(self._is_whole(client) for client in self.clients()))

    def clients(self) -> list[Any]:
        """A client of each node."""
        import redis

        return [redis.Redis(port=node.port) for node in self.nodes]

    @property
    def address(self) -> str:
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:2])

    def stop(self) -> None:
        for node in self.nodes:
            node.send(signal.SIGKILL)

    def _is_whole(self, client: Any) -> bool:
        said = client.execute_command("CLUSTER", "INFO").decode().split()
        known = dict(line.split(":") for line in said)
        whole = known["cluster_known_nodes"] == str(len(self.nodes))
        return whole and (known["cluster_state"], known["cluster_slots_ok"]) == ("ok", str(SLOTS))


class Sentinels:
    """A master, a replica, and three Sentinels that watch over them.

    Args:
        folder: each process gets a folder in it.
        password: of the Sentinels themselves.
    """

    NAME = "shop"

    def __init__(self, folder: Path, password: str) -> None:
        self._password = password
        self.stores: list[Redis] = []
        for name in ("master", "replica"):
            (folder / name).mkdir(parents=True)
            self.stores.append(Redis(listenable("127.0.0.1", 0), folder / name))
        self._folder = folder
        self.ports: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        import redis

        master, replica = self.stores
        master.start()
        replica.start()
        client: Any = redis.Redis(port=replica.port)
        client.replicaof("127.0.0.1", master.port)
        wait_for(lambda: client.info("replication")["master_link_status"] == "up")
        for number in range(3):
            port = listenable("127.0.0.1", 0)
            file = self._folder / f"sentinel-{number}.conf"
            file.write_text(
                f"port {port}\nbind 127.0.0.1\nrequirepass {self._password}\nsentinel sentinel-pass {self._password}\n"
                f"sentinel monitor {self.NAME} 127.0.0.1 {master.port} 2\n"
                f"sentinel down-after-milliseconds {self.NAME} 500\n"
                f"sentinel failover-timeout {self.NAME} 3000\n"
            )
            process = subprocess.Popen(
                ["redis-server", str(file), "--sentinel"], stdout=subprocess.DEVNULL
            )
            self.processes.append(process)
            self.ports.append(port)
            wait_for(lambda port=port: connects(port))  # type: ignore[misc]
        wait_for(lambda: all(self._watches(port) for port in self.ports))

    @property
    def address(self) -> str:
        nodes = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis://{nodes}?sentinel_password={self._password}"

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(timeout=10)
        for store in self.stores:
            store.send(signal.SIGKILL)

    def _watches(self, port: int) -> bool:
        """Whether a Sentinel knows the replica and the other Sentinels."""
        import redis

        client: Any = redis.Redis(port=port, password=self._password)
        state = client.sentinel_masters()[self.NAME]
        return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == 2)
