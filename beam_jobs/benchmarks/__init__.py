"""`python -m beam_jobs.benchmarks.<name>`: jobs beside what they cannot do without."""
