"""Fast paths beside their plain twins."""
