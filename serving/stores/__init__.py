"""Users and items as the stores hold them, and new events into them. Imports `api`."""
