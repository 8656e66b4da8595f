"""WHAT a feature is: the contract, datasets, expectations, stored formats and Feast definitions.

Imports no other room. `schema`, `datasets`, `transforms`, `history`, `tables`, `settings` and
`catalogue` are for all rooms and import neither Feast nor torch nor Beam.
"""

import sys as _sys
from importlib.util import find_spec as _find_spec

# `python -m …` of a Python that lacks everything: said here, before the first import fails.
if _sys.argv[:1] == ["-m"] and _find_spec("cyclopts") is None:
    _sys.exit(
        f"Memoir is not installed in this Python ({_sys.executable}): `make setup`, then .venv/bin/python -m …"
    )
