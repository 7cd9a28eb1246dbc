"""Suites: tables of the literature as runs, one TOML each."""
