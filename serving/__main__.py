"""`python -m serving`: rank over HTTP with the live bundle. `python -m serving demo`: start it, ask it once, show it."""

from __future__ import annotations

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    """The command line, without importing torch or Feast."""
    made = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    made.add_argument("command", nargs="?", choices=("serve", "demo"), default="serve")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--bundle", help="folder of a bundle; default: the live one of the catalogue")
    made.add_argument(
        "--replay",
        action="store_true",
        help="requests without a time are taken as made at the end of the data, for samples of the past",
    )
    made.add_argument(
        "--item_refresh_s",
        type=float,
        default=300.0,
        help="seconds between refreshes of item features (default 300; 0: never)",
    )
    return made


def main() -> int:
    """Dispatch."""
    arguments = parser().parse_args()
    if arguments.command == "demo":
        from serving.demo import run_demo

        return run_demo()
    from serving.command import serve

    return serve(arguments)


if __name__ == "__main__":
    sys.exit(main())
