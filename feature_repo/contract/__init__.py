"""The contract of a dataset: what it declares, the tables that follow from it, and their limits. Imports only `errors` and
`atomic` beside itself.
"""
