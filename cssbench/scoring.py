"""From a finished step to scores: the one door through which commands and reports read numbers. No torch, no data.

A run of ours is scored from its stored confusion matrices, under any protocol that reads a matrix it kept. A run
imported from somebody's log (`provenance.json` has `imported`) has no matrices: each of its records holds
`imported = {"protocol": id, "ious": {"<class id>": float in [0, 1], or null where the log has none}}`, and only that
protocol can be told from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cssbench.errors import RunError
from cssbench.protocol import DEFAULTS, Protocol, get
from cssbench.results import RunFolder, StepRecord

Groups = Sequence[Sequence[int]]
Scores = dict[str, float | None]


def is_imported(run: RunFolder) -> bool:
    """Whether the run was read from a log and has no matrices."""
    return "imported" in run.provenance


def has_background_class(run: RunFolder) -> bool:
    """Whether raw label 0 of the run's dataset is background, a class that is scored, and not void."""
    return bool(run.scenario.get("background_class", False))


def can_score(run: RunFolder, protocol: Protocol) -> bool:
    """Whether `why_not` has nothing to say and a step is finished. Damaged files raise RunError."""
    return bool(run.records()) and why_not(run, protocol) is None


def why_not(run: RunFolder, protocol: Protocol) -> str | None:
    """Why `protocol` cannot score `run`, in a clause; None where every finished step holds what it reads."""
    records = run.records()
    if is_imported(run):
        differs = any(imported_ious(record)[0] != protocol.id for record in records)
        return "an imported log supports another" if differs else None
    if not protocol.can_score(has_background_class(run)):
        return f"background, which that protocol never predicts, is a class of {run.scenario['dataset']}"
    return None if all(protocol.key in record.matrices for record in records) else f"it did not keep {protocol.key}"


def default_protocol(runs: Sequence[RunFolder]) -> Protocol:
    """The first of the suite's default protocols that fits the data: another where background is a class of it."""
    background_class = any(has_background_class(run) for run in runs)
    return next(protocol for protocol in map(get, DEFAULTS) if protocol.can_score(background_class))


def step_ious(run: RunFolder, record: StepRecord, protocol: Protocol, groups: Groups | None = None) -> dict[int, float]:
    """`Protocol.ious` of a finished step: class id -> IoU in [0, 1] of the classes seen by then.

    groups: the class groups to score by; default the run's own. An oracle (a run of one step) has seen all of them.
    Raises RunError when the step did not keep what `protocol` reads, or an imported log supports another protocol only.
    """
    groups = run.groups if groups is None else groups
    seen = [c for group in groups[: _reached(run, record, groups) + 1] for c in group]
    if not is_imported(run):
        background_class = has_background_class(run)
        if not protocol.can_score(background_class):
            raise RunError(
                f"{protocol.id} cannot score {run.path}: {why_not(run, protocol)}. Choose a protocol whose argmax is "
                f"over all outputs, such as --protocol plop@1."
            )
        return protocol.ious(matrix(record, protocol), seen, background_class)
    supported, ious = imported_ious(record)
    if supported != protocol.id:
        raise RunError(
            f"{run.path} was imported from a log, which supports the protocol {supported} only: {protocol.id} needs "
            f"confusion matrices. Score it with --protocol {supported}, or leave it out."
        )
    return {c: ious[c] for c in ([0] if protocol.background_in_mean else []) + seen if c in ious}


def step_scores(run: RunFolder, record: StepRecord, protocol: Protocol, groups: Groups | None = None) -> Scores:
    """`Protocol.scores` of a finished step: `base`, `incremental`, `all`, `group<t>`, in [0, 1]. As `step_ious`."""
    groups = run.groups if groups is None else groups
    return protocol.means(step_ious(run, record, protocol, groups), groups, _reached(run, record, groups))


def run_scores(run: RunFolder, protocol: Protocol, groups: Groups | None = None) -> list[Scores]:
    """`step_scores` of every finished step, in order."""
    return [step_scores(run, record, protocol, groups) for record in run.records()]


def alone_scores(run: RunFolder, record: StepRecord, protocol: Protocol) -> list[float | None]:
    """For `continual.lost_parts`: mIoU of each earlier group g from the outputs of steps 0..g alone, scored as at step
    g. None where no such matrix was kept (every step but the last, imported runs)."""
    found: list[float | None] = []
    for group in range(record.index):
        there = {} if is_imported(run) else record.matrices
        one = there.get(f"{protocol.key}.upto{group}")
        scored = None if one is None else protocol.scores(one, run.groups, group, has_background_class(run))
        found.append(None if scored is None else scored[f"group{group}"])
    return found


def matrix(record: StepRecord, protocol: Protocol) -> np.ndarray:
    """The matrix that `protocol` reads. Raises RunError when the run did not keep it."""
    found = record.matrices
    if protocol.key not in found:
        kept = sorted(key for key in found if ".upto" not in key)
        raise RunError(
            f"{record.folder} kept no matrix {protocol.key!r}, which {protocol.id} reads; it has "
            f"{', '.join(kept) or 'none'}. Choose a protocol of those, or run again with evaluate.geometries = "
            f'["full", "crop"].'
        )
    return found[protocol.key]


def _reached(run: RunFolder, record: StepRecord, groups: Groups) -> int:
    """The last group that the model of `record` has learned: an oracle learns all in its only step."""
    return len(groups) - 1 if run.num_steps == 1 else record.index


def imported_ious(record: StepRecord) -> tuple[str, dict[int, float]]:
    """(protocol id, IoU per class id) of an imported step. Raises RunError when they are not as the import writes."""
    content: Any = record.content.get("imported")
    try:
        named, listed = content["protocol"], content["ious"]
        ious = {int(c): None if v is None else float(v) for c, v in listed.items()}
        sound = isinstance(named, str) and all(v is None or 0 <= v <= 1 for v in ious.values())
    except (TypeError, KeyError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise RunError(
            f"{record.folder / 'record.json'} is damaged: `imported` must hold a protocol id and an IoU between 0 and "
            f"1, or null, per class id. Import the log again with `cssbench import`."
        )
    return named, {c: v for c, v in ious.items() if v is not None}
