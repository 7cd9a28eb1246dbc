"""Models by name: TOML files of a model and its options, as under [model] in a recipe. See docs/models.md."""
