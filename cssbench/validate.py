"""Whether a run may stand in a table: finished, whole, unedited, and its counts possible. No torch, no data.

What is checked, and cannot be right by accident: every file of a step against the SHA-256 in its record, the record
against its own digest, the run's recipe, scenario and provenance against the digests in every record; that every step
is there; that nothing was evaluated on the first few images only; and the confusion matrices against each other.
Weights (`*.safetensors`, `*.pt`) may be left out of a folder that is passed on; where they lie, they must match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cssbench import scoring
from cssbench.errors import RunError
from cssbench.results import SCHEMA, RunFolder, StepRecord, content_digest, safe_name, sha256

WEIGHTS = (".safetensors", ".pt")
UNFINISHED, LIMITED = "unfinished", "debug-limited"  # how these problems begin


def problems(run: RunFolder, weights: bool = True) -> list[str]:
    """Why the numbers of `run` must not enter a table, one clause each; empty when nothing speaks against them.

    weights: also hash weight files, which takes about a second per GB.
    """
    found = list(_limited(run))
    try:
        records = run.records()
    except RunError as error:
        return [*found, str(error).rstrip(".")]
    found += _unfinished(run, records)
    edited: dict[str, list[str]] = {}
    for record in records:
        try:
            for what in _edited(run, record, weights):
                edited.setdefault(what, []).append(str(record.index))
        except RunError as error:  # a file name that leads out of the folder
            edited.setdefault(f"record.json was edited: {str(error).rstrip('.')}", []).append(str(record.index))
    found += [f"step{'s' * (len(steps) > 1)} {', '.join(steps)}: {what}" for what, steps in edited.items()]
    if not edited:  # the counts of an edited run need no second opinion
        found += _imported(run, records) if scoring.is_imported(run) else _impossible(run, records)
        found += _unreadable(records)
    return found


def require_valid(runs: Iterable[RunFolder]) -> None:
    """Raises RunError naming the first run that has `problems`, and all of them."""
    for run in runs:
        found = problems(run, weights=False)
        if found:
            raise RunError(
                f"{run.path} must not stand in a table: {'; '.join(found)}. Leave it out, or finish or repeat the run; "
                f"`cssbench validate {run.path}` checks it again."
            )


def _limited(run: RunFolder) -> Iterator[str]:
    if run.provenance.get("debug_limited") or run.config.evaluate.limit is not None:
        limit = run.config.evaluate.limit
        yield f"{LIMITED}: evaluated on {f'the first {limit}' if limit else 'a part of the'} images only"


def _unfinished(run: RunFolder, records: Sequence[StepRecord]) -> Iterator[str]:
    if len(records) < run.num_steps:
        yield f"{UNFINISHED} or truncated: {len(records)} of {run.num_steps} steps have a record"
    classes = [c for group in run.groups for c in group]
    if len(set(classes)) < len(classes):
        yield "scenario.json gives a class to two steps"


def _edited(run: RunFolder, record: StepRecord, weights: bool) -> Iterator[str]:
    content = record.content
    if content.get("schema") != SCHEMA or content.get("step") != record.index:
        yield (
            f"record.json is of schema {content.get('schema')} and step {content.get('step')}, not of schema {SCHEMA} "
            f"and step {record.index}"
        )
    if "digest" not in content:
        yield "record.json has no digest, so that an edit of it could not be told"
    elif content["digest"] != content_digest(content):
        yield "record.json was edited: it does not match its own digest"
    of_run = content.get("run_sha256")
    for name, recorded in of_run.items() if isinstance(of_run, dict) else ():
        path = run.path / safe_name(name)
        if not path.is_file() or sha256(path) != recorded:
            yield f"{name} was edited: it does not match the checksum in record.json"
    for name, recorded in content["sha256"].items():
        path = record.folder / safe_name(name)
        if name.endswith(WEIGHTS) and not (weights and path.exists()):
            continue
        if not path.is_file():
            yield f"{name} is missing"
        elif sha256(path) != recorded:
            yield f"{name} was edited or truncated: it does not match its checksum"


def _unreadable(records: Sequence[StepRecord]) -> Iterator[str]:
    for record in records:
        for name in ("tokens", "gflops"):
            try:
                getattr(record, name)
            except RunError as error:
                yield str(error).rstrip(".")


def _imported(run: RunFolder, records: Sequence[StepRecord]) -> Iterator[str]:
    for record in records:
        try:
            scoring.imported_ious(record)
        except RunError as error:
            yield f"step {record.index}: {str(error).rstrip('.')}"


def _impossible(run: RunFolder, records: Sequence[StepRecord]) -> Iterator[str]:
    """What no evaluation of this scenario can have counted."""
    truths: dict[tuple[int, str], np.ndarray] = {}  # (step, geometry) -> pixels of each class in the truth
    side = 1 + max(len(run.scenario.get("classes") or []), *(c for group in run.groups for c in group))
    for record in records:
        try:
            matrices = record.matrices
        except RunError as error:
            yield str(error).rstrip(".")
            continue
        if not matrices:
            yield f"step {record.index}: matrices.npz holds no matrix"
        for key, matrix in sorted(matrices.items()):
            geometry, _, rest = key.partition(".")
            rule, _, upto = rest.partition(".upto")
            reached = int(upto) if upto.isdigit() else record.index
            for what in _impossible_matrix(run, matrix, side, rule, reached):
                yield f"step {record.index}: matrix {key} {what}"
                break
            else:
                truth = truths.setdefault((reached, geometry), matrix.sum(axis=1))
                if not np.array_equal(truth, matrix.sum(axis=1)):
                    yield f"step {record.index}: matrix {key} counts other truth pixels than another of its images"
        yield from _too_many(run, record)
    yield from _shrinking(truths)


def _impossible_matrix(run: RunFolder, matrix: np.ndarray, side: int, rule: str, reached: int) -> Iterator[str]:
    if matrix.dtype != np.int64 or matrix.shape != (side, side):
        yield f"is {matrix.dtype} {matrix.shape}, not int64 {(side, side)}"
        return
    if (matrix < 0).any():
        yield "has negative counts"
    if not matrix.any():
        yield "is empty"
    seen = [c for group in run.groups[: reached + 1] for c in group]
    unseen = np.setdiff1d(np.arange(1, side), seen)
    if matrix[:, unseen].any():
        yield f"predicts class {unseen[matrix[:, unseen].any(axis=0)][0]}, which the model had not learned"
    if rule == "foreground" and matrix[:, 0].any():
        yield "predicts background, which the rule `foreground` has not"


def _too_many(run: RunFolder, record: StepRecord) -> Iterator[str]:
    """A centre crop has crop x crop pixels per image, those labelled 255 not counted."""
    images, most = record.content.get("evaluated_images"), run.config.evaluate.crop**2
    for key, matrix in record.matrices.items():
        if key.startswith("crop.") and isinstance(images, int) and int(matrix.sum()) > images * most:
            yield f"step {record.index}: matrix {key} counts {int(matrix.sum())} pixels, more than {images} crops hold"


def _shrinking(truths: dict[tuple[int, str], np.ndarray]) -> Iterator[str]:
    """A later step evaluates the images of the earlier ones, and more."""
    for (step, geometry), truth in sorted(truths.items()):
        before = truths.get((step - 1, geometry))
        if before is not None and (truth < before).any():
            yield f"step {step}: geometry {geometry} has fewer truth pixels of a class than step {step - 1}"
