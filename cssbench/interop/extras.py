"""One error where an extra is missing."""

from __future__ import annotations

from importlib.util import find_spec

from cssbench.errors import ConfigError


def require(*modules: str, extra: str, what: str) -> None:
    """Raises ConfigError, naming the extra of cssbench, unless all top-level modules are installed."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ConfigError(
            f"{what} needs the package {missing[0]!r}, which is not installed. Install it with "
            f'`pip install "cssbench[{extra}]"`.'
        )
