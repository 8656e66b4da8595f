"""Tells systemd that a server takes requests (`Type=notify`), over the socket that it names in `NOTIFY_SOCKET`; without
one nothing is sent.

Source: sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import socket

READY = "READY=1"
STOPPING = "STOPPING=1"
logger = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send a state; one that cannot be sent is said in the log.

    Args:
        state: a line of assignments, such as `READY=1`.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # A name that begins with @ is of the kernel's own space of names.
    name = f"\0{address[1:]}" if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to_systemd:
            to_systemd.connect(name)
            to_systemd.sendall(state.encode())
    except OSError as error:
        logger.warning("systemd could not be told %s: %s", state, error)
