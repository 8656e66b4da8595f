"""Helpers of every room's command line: how an app is made, how errors end a command, and how tables
fit a terminal.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from cyclopts import App
from rich.console import Console

from feature_repo.errors import ExpectedError, advice_on

# Modules that each extra brings, beside those of `features`
EXTRAS = {
    "features": (
        "feast",
        "duckdb",
        "ibis",
        "sqlglot",
        "great_expectations",
        "pandas",
        "google",
        "grpc",
    ),
    "beam": ("apache_beam",),
    "dask": ("distributed",),
    "train": (
        "torch",
        "safetensors",
        "matplotlib",
        "sklearn",
        "scipy",
        "lightgbm",
        "threadpoolctl",
    ),
    "serve": (
        "torch",
        "safetensors",
        "lightgbm",
        "starlette",
        "granian",
        "pydantic_settings",
        "msgspec",
        "prometheus_client",
    ),
    "production": ("redis", "hiredis", "psycopg"),
    "tracing": ("opentelemetry",),
}
# The exit code that a shell gives a process which SIGINT ended
INTERRUPTED = 130


def app(room: str, help_text: str) -> App:
    """A command-line app of a room: option names are spelt with underscores, as fields are."""
    return App(
        name=f"python -m {room}",
        help=help_text,
        name_transform=lambda name: name,
        version_flags=(),
        default_parameter=_spelling(),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )


def _spelling() -> Any:
    from cyclopts import Parameter

    return Parameter(name_transform=lambda name: name, negative=())


def run(command: Callable[[], Any]) -> int:
    """Run a command line to its exit code: 0 done, 1 refused with a reason, 2 called wrongly, 130
    interrupted.

    An `ExpectedError` becomes one line, and so does a service that is away or refuses. Any other error is a fault of
    ours, and its traceback is shown.
    """
    from cyclopts import CycloptsError

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that knows ASCII only gets question marks, not a traceback
            stream.reconfigure(errors="replace")
    # From here on every way in which a command can end has its exit code.
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except ExpectedError as error:
        complain(error)
        return error.exit_code
    except CycloptsError as error:
        error.verbose = False
        complain(error)
        return 2
    except ModuleNotFoundError as error:
        top = (error.name or "").split(".")[0]
        if top in ("feature_repo", "beam_jobs", "modeling", "serving", ""):
            raise
        complain(
            f"{top} is not installed in this Python ({sys.executable}): pip install 'memoir-rec[{extra_of(top)}]', or in a checkout "
            "`make setup`, then .venv/bin/python -m …"
        )
        return 1
    except KeyboardInterrupt:
        complain(
            "interrupted; what was not finished is not visible, and the same command goes on from there"
        )
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        complain(
            f"the disk is full{f', writing {error.filename}' if error.filename else ''}: nothing was published"
        )
        return 1
    except Exception as error:
        said = advice_on(error) or _said_by_database(error)
        if said is None:
            raise
        complain(said)
        return 1


def _said_by_database(error: BaseException) -> str | None:
    """A line for people on a database that is away or refuses; None of any other error."""
    if "sqlalchemy" not in sys.modules:
        return None
    from sqlalchemy.exc import InterfaceError, OperationalError

    # SQLite calls a wrong statement of ours an operational error as well.
    of_a_file = "sqlite3" in type(getattr(error, "orig", None)).__module__
    away = ("unable to open", "locked", "readonly")
    if not isinstance(error, InterfaceError | OperationalError) or (
        of_a_file and not any(word in str(error.orig) for word in away)
    ):
        return None
    return (
        f"the database of the registry or the catalogue did not do it, {str(error.orig).strip()}; look at MEMOIR_REGISTRY_URL and "
        "MEMOIR_CATALOGUE, and run the command again"
    )


def extra_of(module: str) -> str:
    """The extra of the package that brings a module: of several the one of the room that runs.

    >>> extra_of("apache_beam")
    'beam'
    """
    named = [extra for extra, modules in EXTRAS.items() if module in modules]
    running = "serve" if "serving.__main__" in sys.argv[0] or "serving" in sys.modules else "train"
    return running if running in named else named[0] if named else running


def complain(error: object) -> None:
    """A line about what went wrong, on standard error's terminal or in its file."""
    Console(stderr=True, soft_wrap=True).print(
        str(error), style="red", highlight=False, markup=False
    )
