"""How a job runs, whatever it computes: plans, parts, manifests, options, partitions, sinks. Imports `feature_repo`."""
