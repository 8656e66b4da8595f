"""The bundle that a process ranks with: loaded, tried, swapped in, rolled back. Imports `ranking`."""
