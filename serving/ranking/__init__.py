"""One ranking call as named steps, explanations and what-if histories. Imports `api` and `stores`."""
