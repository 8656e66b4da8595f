"""A Redis Cluster and a Redis behind Sentinels, of our own, on free loopback ports."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import redis

from tests.conftest import Redis, free_port, missing, wait_for_port

SLOTS = 16_384


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that must come true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.05)


class Cluster:
    """Masters that share the slots evenly, without replicas.

    Args:
        folder: each node gets a folder in it.
    """

    def __init__(self, folder: Path, masters: int = 3) -> None:
        self.nodes = []
        for number in range(masters):
            own = folder / f"node-{number}"
            own.mkdir(parents=True)
            options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            # The others go on where one is lost, as a store of features should.
            options += ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "1000"]
            self.nodes.append(Redis(own, *options))

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        per_node = SLOTS / len(self.nodes)
        for number, client in enumerate(self.clients()):
            first, last = round(number * per_node), round((number + 1) * per_node) - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        first_node = self.clients()[0]
        for node in self.nodes[1:]:
            bus = node.options[node.options.index("--cluster-port") + 1]
            first_node.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait_until(lambda: all(self._is_whole(client) for client in self.clients()))

    def clients(self) -> list[redis.Redis]:
        """A client of each node."""
        return [redis.Redis(port=node.port) for node in self.nodes]

    @property
    def address(self) -> str:
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:2])

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def _is_whole(self, client: redis.Redis) -> bool:
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
        if not shutil.which("redis-sentinel"):
            missing("redis-sentinel")
        self._password = password
        self.stores = []
        for name in ("master", "replica"):
            (folder / name).mkdir(parents=True)
            self.stores.append(Redis(folder / name))
        self._folder = folder
        self.ports: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        master, replica = self.stores
        master.start()
        replica.start()
        client = redis.Redis(port=replica.port)
        client.replicaof("127.0.0.1", master.port)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        for number in range(3):
            port = free_port()
            file = self._folder / f"sentinel-{number}.conf"
            file.write_text(
                f"port {port}\nbind 127.0.0.1\nrequirepass {self._password}\nsentinel sentinel-pass {self._password}\n"
                f"sentinel monitor {self.NAME} 127.0.0.1 {master.port} 2\n"
                f"sentinel down-after-milliseconds {self.NAME} 500\n"
                f"sentinel failover-timeout {self.NAME} 3000\n"
            )
            process = subprocess.Popen(["redis-sentinel", str(file)], stdout=subprocess.DEVNULL)
            self._processes.append(process)
            self.ports.append(port)
            wait_for_port(port, process)
        wait_until(lambda: all(self._watches(port) for port in self.ports))

    @property
    def address(self) -> str:
        nodes = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis://{nodes}?sentinel_password={self._password}"

    def stop(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for store in self.stores:
            store.stop()

    def _watches(self, port: int) -> bool:
        """Whether a Sentinel knows the replica and the other Sentinels."""
        client = redis.Redis(port=port, password=self._password)
        state = client.sentinel_masters()[self.NAME]
        return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == 2)
