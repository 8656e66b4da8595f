"""The training set: examples joined point-in-time, encoded into shards, with baselines that need no training. Imports
`inputs`.
"""
