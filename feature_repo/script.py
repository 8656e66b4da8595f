"""The command `memoir ROOM …`, the same as `python -m ROOM …`: it loads the room that is named and no other."""

from __future__ import annotations

import sys
from importlib import import_module

ROOMS = {
    "features": "feature_repo",
    "jobs": "beam_jobs",
    "models": "modeling",
    "serve": "serving",
}


def main() -> int:
    """Dispatch to a room by its name, short or long."""
    named = sys.argv[1] if len(sys.argv) > 1 else ""
    room = ROOMS.get(named, named)
    if room not in ROOMS.values():
        known = ", ".join(f"{short} ({long})" for short, long in ROOMS.items())
        print(f"usage: memoir ROOM COMMAND …; rooms are {known}", file=sys.stderr)
        return 2
    sys.argv = [f"memoir {named}", *sys.argv[2:]]
    code = import_module(f"{room}.__main__").main()
    return int(code)
