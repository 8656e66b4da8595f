"""Stored columns as numbers, and numbers as batches: the same for training and serving. Imports `feature_repo`."""
