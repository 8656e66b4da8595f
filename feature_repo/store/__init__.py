"""All that touches Feast: the offline store, the online store, its rows, tokens, users and erasure. Imports `contract`,
`home` and `history`.
"""

# Before Feast, whose import sets PROMETHEUS_MULTIPROC_DIR (0.67): a client that is imported after it counts for all
# registries of the process together, and a server's counters would be everybody's.
import prometheus_client  # noqa: F401
