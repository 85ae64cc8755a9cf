"""One module per step of a migration."""
