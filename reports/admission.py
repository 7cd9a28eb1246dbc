"""Which runs may enter tables, and what may share one. What must not is refused, or printed into the captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cssbench import compare, validate
from cssbench import protocol as protocols
from cssbench.errors import RunError
from cssbench.reports.scored import Scored, by_setting, labels, score, unique
from cssbench.results import RunFolder

# Clauses of `compare.differences` about what scenarios of one data set differ in.
SCENARIO = ("classes per step", compare.IMAGES)


def score_all(
    runs: Iterable[RunFolder], protocol_ids: Sequence[str], allow_mixed: bool = False
) -> dict[str, list[Scored]]:
    """Protocol id -> `scored.score`, for runs that may stand in tables.

    Raises RunError when no run can be scored under any of the protocols, and, unless `allow_mixed`, when a run is
    debug-limited or edited, or runs that would share a table differ in backbone, inference or the like. With
    `allow_mixed`, the captions say so. Damaged matrices are refused always.
    """
    runs = unique(runs)
    known = {run.path: flaws(run) for run in runs}
    if not allow_mixed:
        _refuse_flaws(known)
    found = {name: score(runs, protocols.get(name), known) for name in protocol_ids}
    if not any(found.values()):
        wanted = ", ".join(f"{name} reads {protocols.get(name).key}" for name in protocol_ids) or "no protocol given"
        raise RunError(
            f"None of the runs kept the matrices that the protocols need ({wanted}). "
            f"Name another protocol, or evaluate with another `evaluate.geometries`."
        )
    if not allow_mixed:
        _refuse_mixes(found)
    return found


def flaws(run: RunFolder) -> tuple[str, ...]:
    """What `cssbench validate` has against a run, but that it is unfinished: its rows are labelled so."""
    return tuple(what for what in validate.problems(run, weights=False) if not what.startswith(validate.UNFINISHED))


def _refuse_flaws(known: dict[Path, tuple[str, ...]]) -> None:
    for path, found in known.items():
        if found:
            raise RunError(
                f"{path} must not stand in a table: {'; '.join(found)}. Leave it out, or print it with this in the "
                f"captions by --allow-mixed; `cssbench validate {path}` checks it again."
            )


def _refuse_mixes(found: dict[str, list[Scored]]) -> None:
    for name, ones in found.items():
        for members in [*by_setting(ones).values(), *by_comparability(ones).values()]:
            if mixed := mix(members):
                raise RunError(
                    f"These runs must not stand in one table of {name}. They differ in {'; and in '.join(mixed)}. "
                    f"Report them one by one, or print them together, with the mix in the captions, by --allow-mixed."
                )


def mix(members: Sequence[Scored]) -> list[str]:
    """What makes the rows of one table incomparable, a clause each (`compare.differences`); runs under their labels.

    Scenarios of a table over several may differ in their steps. What an imported log was made from is not known, and
    its rows say that they are imported.
    """
    names = labels([one.run for one in members])
    runs = list({one.run.path: one.run for one in members if not one.imported}.values())
    if not runs:
        return []
    found = compare.differences(runs, members[0].protocol)
    if len({one.setting for one in members}) > 1:
        found = [clause for clause in found if not clause.startswith(SCENARIO)]
    if len({one.setting.order for one in members}) > 1:  # a table over class orders
        found = [clause for clause in found if not clause.startswith("class order")]
    for path in sorted(names, key=lambda path: -len(str(path))):
        found = [clause.replace(str(path), names[path]) for clause in found]
    return found


def by_comparability(scored: Sequence[Scored]) -> dict[tuple[Any, ...], list[Scored]]:
    """Runs of several scenarios that one table may hold: the same data, images, mode and class order."""
    found: dict[tuple[Any, ...], list[Scored]] = {}
    for one in scored:
        found.setdefault(one.setting.shared, []).append(one)
    return found
