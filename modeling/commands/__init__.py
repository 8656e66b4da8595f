"""`python -m modeling`, once its options are read. Imports everything of this room."""
