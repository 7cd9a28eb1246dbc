"""Bridges to other libraries of continual learning, each an extra: Continuum and Avalanche. Nothing here is imported
unless it is asked for."""
