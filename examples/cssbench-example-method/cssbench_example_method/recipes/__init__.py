"""Recipes: one TOML each."""
