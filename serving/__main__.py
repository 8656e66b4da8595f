"""`python -m serving`: rank over HTTP with the live bundle. `python -m serving demo`: start it, ask
it once, show it.
"""

from __future__ import annotations

import sys

from feature_repo import cli
from feature_repo.errors import UsageError

app = cli.app(
    "serving",
    """Rank over HTTP with the live bundle.

    Example: `python -m serving --port 8000 --replay`. `python -m serving demo` starts a server, asks it once, shows it.""",
)


@app.default
def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    bundle: str | None = None,
    replay: bool = False,
    item_refresh_s: float = 300.0,
) -> int:
    """Rank over HTTP until stopped.

    Args:
        host: address to listen on; by default this machine only.
        port: port to listen on.
        bundle: folder of a bundle; by default the live one of the catalogue.
        replay: requests without a time are taken as made at the end of the data, for samples of the
            past.
        item_refresh_s: seconds between refreshes of item features; 0 for never.
    """
    if not 0 <= port <= 65_535:
        raise UsageError(f"--port expects a number from 0 to 65,535, not {port}")
    if not 0 <= item_refresh_s < 1e9:
        raise UsageError(f"--item_refresh_s expects seconds, 0 for never, not {item_refresh_s}")
    from serving import command

    return command.serve(command.ServeOptions(host, port, bundle, replay, item_refresh_s))


@app.command
def demo(*, recipe: str | None = None) -> int:
    """Start a server, ask it once, show what it answers.

    Args:
        recipe: that the demo has trained; of one that nothing serves there is nothing to show.
    """
    from modeling import recipes
    from serving.demo import run_demo

    if recipe is not None and isinstance(recipes.load(recipe), recipes.NextItemRecipe):
        print(f"nothing to serve: {recipes.about(recipes.load(recipe))}")
        return 0
    return run_demo()


def main() -> int:
    """Dispatch."""
    return cli.run(app)


if __name__ == "__main__":
    sys.exit(main())
