"""The conformance table: every installed method on every built-in model. Command:

python bench/conformance.py --out docs/conformance.md
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from cssbench import registry
from cssbench.provenance import code_state
from cssbench.testing import INVARIANTS, Finding, Refused, conformance

MODELS = ("vit-linear", "setr-naive", "segmenter", "deeplabv3", "setr-dtop", "segvit", "shrunk", "dtop")


def examine() -> dict[tuple[str, str], list[Finding] | str]:
    """(method, model) -> findings, or the words with which the method refuses that model. One process per core."""
    pairs = list(product(registry.parts("methods"), MODELS))
    found: dict[tuple[str, str], list[Finding] | str] = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for pair, result in zip(pairs, pool.map(_examine, pairs), strict=True):
            found[pair] = result
            print(*pair, _cell(result), flush=True)
    return found


def _examine(pair: tuple[str, str]) -> list[Finding] | str:
    try:
        return conformance(registry.load("methods", pair[0]), model=pair[1])
    except Refused as error:
        return str(error)


def _cell(result: list[Finding] | str) -> str:
    if isinstance(result, str):
        return "refused"
    passed = sum(one.passed is True for one in result)
    return f"{passed} of {len(result)}"


def page(found: dict[tuple[str, str], list[Finding] | str]) -> str:
    commit = code_state(Path(__file__).parents[1] / "cssbench")["commit"] or "unknown"
    lines = [
        "# Conformance of the installed methods",
        "",
        f"Written by `python bench/conformance.py --out docs/conformance.md` at commit {commit[:12]}. "
        "`cssbench check METHOD` prints one method in full; how to use the kit: [add-a-method.md](add-a-method.md).",
        "",
        "| method | from | " + " | ".join(f"on `{model}`" for model in MODELS) + " |",
        "|---|---|" + "---|" * len(MODELS),
    ]
    for name, part in registry.parts("methods").items():
        cells = " | ".join(_cell(found[name, model]) for model in MODELS)
        lines.append(f"| `{name}` | {part.distribution} {version(part.distribution)} | {cells} |")
    notes = [f"- `{name}` on `{model}`: {result}" for (name, model), result in found.items() if isinstance(result, str)]
    broken = [
        f"- `{name}` on `{model}`, {one.name}: {one.reason}"
        for (name, model), result in found.items()
        if not isinstance(result, str)
        for one in result
        if one.passed is not True
    ]
    lines += ["", "Refused, by the method itself:", "", *notes] if notes else []
    lines += ["", "Broken promises:", "", *broken] if broken else ["", "No promise is broken."]
    lines += ["", "## The promises", "", "| promise | what it says |", "|---|---|"]
    lines += [f"| {name} | {promise} |" for name, (promise, _) in INVARIANTS.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = page(examine())
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
