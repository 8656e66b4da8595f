"""HOW rows become scores: point-in-time training sets, models behind one interface, training,
evaluation, bundles.

Imports `feature_repo` only; never Beam, never `serving`.
"""

import feature_repo  # noqa: F401  # which says where the environment is not installed
