"""Measurements in processes of their own, so that peak memory and CPU seconds are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from feature_repo.settings import WORK


def wait_passively() -> None:
    """Have threads that wait for others sleep rather than spin, where nothing else is said: beside other
    load a spinning one takes the time of the one it waits for. Before torch or scikit-learn is loaded.
    """
    for name, value in (
        ("OMP_WAIT_POLICY", "PASSIVE"),
        ("GOMP_SPINCOUNT", "0"),
        ("KMP_BLOCKTIME", "0"),
    ):
        os.environ.setdefault(name, value)


def ask(module: str, case: str, question: dict[str, Any]) -> dict[str, Any]:
    """Run `python -m <module> --child <case>` with a question, whose `threads` it gets, and read
    its answer.
    """
    return ask_command([sys.executable, "-m", module, "--child", case], question)


def ask_command(command: list[str], question: dict[str, Any]) -> dict[str, Any]:
    """Run a measurement: JSON in, the last line of its output back.

    Raises:
        RuntimeError: it failed; the message holds the end of what it said.
    """
    threads = str(question["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(
        command,
        input=json.dumps(question),
        capture_output=True,
        text=True,
        cwd=WORK,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-1500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def peak_mb() -> float:
    """Peak memory of this process alone: `ru_maxrss` would remember its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
