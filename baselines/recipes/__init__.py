"""Recipes: the settings of real runs, one TOML each."""
