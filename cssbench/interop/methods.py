"""The namespaces of methods that cssbench declares. Imports neither torch nor what the methods come from."""

from __future__ import annotations

from typing import Any


def avalanche(member: str) -> Any:
    """`avalanche:<member>`: a plug-in of Avalanche as a method, see `cssbench.interop.avalanche.methods`.

    Raises UnknownNameError, and ConfigError where Avalanche is not installed or the plug-in cannot work here.
    """
    from cssbench.interop.avalanche.methods import method_class

    return method_class(member)
