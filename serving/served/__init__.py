"""The log of what was served, audited against the tables, and turned into impressions. Imports `ranking`."""
