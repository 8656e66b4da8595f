"""Benchmarks of this room: `python -m serving.benchmarks.<name>`."""
