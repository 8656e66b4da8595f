"""The jobs that turn raw rows into tables and send them online. Imports `engine` and `feature_repo`."""
