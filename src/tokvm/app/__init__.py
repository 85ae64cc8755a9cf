"""From configuration to a concrete source, target and runner, wired together."""
