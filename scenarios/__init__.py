"""Scenarios as data: one TOML each, the file name is the id."""
