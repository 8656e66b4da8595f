"""HOW rows are computed: Beam jobs from raw rows to events, histories, item statistics and training
examples.

Imports `feature_repo` only. Elements are Arrow batches, not single events; a run is visible when
its manifest is.
"""

import feature_repo  # noqa: F401  # which says where the environment is not installed
