"""Gradient-boosted trees as rankers: fitted by LightGBM, scored here, alone or blended with a network. Imports
`models`.
"""
