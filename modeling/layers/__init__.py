"""Only what two models share."""
