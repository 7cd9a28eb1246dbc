"""The conformance kit: does a method keep the rules that make its numbers comparable? For authors and our own suite.

In a test of your package:

    from cssbench.testing import assert_conforms
    from my_package import MyMethod

    def test_my_method():
        assert_conforms(MyMethod)

On the command line: `cssbench check my-method`, or `cssbench check my_package:MyMethod` before it has an entry point.

The method runs three steps of training on generated scenes, on the CPU, several times: as it is, resumed after each
step, and with every label and image changed that it must not look at. What cannot be seen so: files read past the
dataset, other devices, the quality of what is learned.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cssbench.method import Method
from cssbench.testing.invariants import INVARIANTS, Finding, Subject, examine
from cssbench.testing.rig import Refused, Rig

__all__ = ["INVARIANTS", "Finding", "Refused", "assert_conforms", "conformance"]


def conformance(
    method: type[Method], options: dict[str, Any] | None = None, model: str = "vit-linear", **model_options: Any
) -> list[Finding]:
    """A finding per invariant, in their order.

    options: of the method, as under [method] in a recipe. model: any installed model; "vit-linear", "segvit" and
    "deeplabv3" come in tiny sizes, which `model_options` extend. Raises Refused when the method says that it does not
    work with that model (a ConfigError before the first step).
    """
    with tempfile.TemporaryDirectory(prefix="cssbench-check-") as folder:
        return examine(Subject(method, options or {}, Rig(Path(folder), model, model_options)))


def assert_conforms(method: type[Method], options: dict[str, Any] | None = None, model: str = "vit-linear") -> None:
    """Raises AssertionError that names every violated invariant and says why."""
    failed = [f"{one.name}: {one.reason}" for one in conformance(method, options, model) if not one.passed]
    assert not failed, f"{method.__name__} on {model} violates\n  " + "\n  ".join(failed)
