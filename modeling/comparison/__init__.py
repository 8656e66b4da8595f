"""Recipes side by side, over seeds, with paired intervals. Imports `evaluation` and `next_item`."""
