"""Losses as pure functions: tensors in, tensors out, no state. Shared by all methods, public to plug-in authors."""
