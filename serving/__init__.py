"""WHEN a user asks: one request in, a ranked list out, by exactly the code that trained.

Imports `modeling` and `feature_repo`; nothing imports this room.
"""

import feature_repo  # noqa: F401  # which says where the environment is not installed
