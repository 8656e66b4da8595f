"""Next-item models on whole sequences: data, losses, runs, leave-one-out metrics. Imports `training`."""
