"""The loop that trains, and a ranking recipe's run from identity to weights. Imports `inputs`, `models`, `recipes` and
`training_set`.
"""
