"""WHAT a feature is: the contract, datasets, expectations, stored formats and Feast definitions.

Imports no other room. `schema`, `datasets`, `transforms`, `history`, `tables`, `settings` and
`catalogue` are for all rooms and import neither Feast nor torch nor Beam.
"""
