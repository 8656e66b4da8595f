"""The models of the five papers' tables, compact, on the same inputs, heads and training: what ours
are compared with.
"""
