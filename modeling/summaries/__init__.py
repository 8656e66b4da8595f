"""Summary tokens of histories: which they are, and how a stage 1 makes them outside a request."""
