"""What a trained ranker is worth: metrics beside baselines, what its answers rest on, the report. Imports `training`."""
