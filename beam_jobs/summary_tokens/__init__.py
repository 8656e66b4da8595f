"""The job that makes summary tokens of whole histories. Imports `engine`, `feature_repo` and, alone in this room,
`modeling.bundle`.
"""
