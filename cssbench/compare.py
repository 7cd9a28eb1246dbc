"""May these runs stand in one table? If not, why not; if so, the table. No torch, no data.

Runs may differ in what is compared (method, seed, training recipe), never in what makes numbers comparable: the
protocol that can score them, data, evaluated images, inference, backbone, and, between learners, mode, classes of each
step and training images of each step. A head belongs to its method. A run that learned all classes in one step is an
*oracle*: it must agree with the learners in everything but mode and steps, and a run's own oracle has its whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cssbench import scoring
from cssbench.errors import RunError
from cssbench.metrics import continual
from cssbench.protocol import Protocol
from cssbench.results import RunFolder
from cssbench.validate import require_valid

MEANS = ("base", "incremental", "all")
UNSET = "not recorded"
IMAGES = "training images of step"


@dataclass(frozen=True)
class Row:
    """One run in the table. scores: base, incremental, all, avg after the last step. drops: mean -> (absolute,
    relative) drop to the run's own oracle. intransigence: of the last group, the one whose reference model is that
    oracle. None where not measurable."""

    run: RunFolder
    scores: dict[str, float | None]
    oracle: RunFolder | None
    drops: dict[str, tuple[float | None, float | None]]
    intransigence: float | None


def is_oracle(run: RunFolder) -> bool:
    return run.num_steps == 1


def differences(runs: Sequence[RunFolder], protocol: Protocol | None = None) -> list[str]:
    """What keeps `runs` out of one table: a clause per fact and run, with both values; empty when nothing does.

    Each is compared with the first learner (the first run where all are oracles). protocol: also whether it can score
    every run, and only the inference settings that its matrix depends on; None compares those of both geometries.
    """
    if not runs:
        return []
    first = next((run for run in runs if not is_oracle(run)), runs[0])
    found = []
    for run in runs:
        if protocol is not None and not scoring.can_score(run, protocol):
            lacks = scoring.why_not(run, protocol) or "no step is finished"
            found.append(f"protocol: {protocol.id} cannot score {run.path} ({lacks})")
        if run is not first:
            found += _between(first, run, protocol)
    return found


def table(runs: Sequence[RunFolder], protocol: Protocol, allow_mixed: bool = False) -> tuple[list[Row], list[str]]:
    """(rows, differences). Raises RunError when a run is invalid, or when the runs differ and `allow_mixed` is off.

    A run that `protocol` cannot score has None for every score. No run gets a drop to an oracle that differs from it.
    """
    require_valid(runs)
    found = differences(runs, protocol)
    if found and not allow_mixed:
        raise RunError(
            f"These runs must not stand in one table. They differ in {'; and in '.join(found)}. Compare runs that "
            f"agree, or print them together, with the mix in the caption, by --allow-mixed."
        )
    first = next((run for run in runs if not is_oracle(run)), runs[0])
    return [_row(run, first, runs, protocol) for run in runs], found


def own_oracle(run: RunFolder, among: Sequence[RunFolder], protocol: Protocol) -> RunFolder | None:
    """The oracle of the same model without any difference to `run`; of several that of the same method, then seed."""
    if is_oracle(run):
        return None
    alike = [one for one in among if is_oracle(one) and one.config.model == run.config.model]
    fitting = [one for one in alike if not differences([run, one], protocol)]

    def likeness(oracle: RunFolder) -> tuple[bool, bool]:
        return oracle.config.method == run.config.method, oracle.config.seed == run.config.seed

    return max(fitting, key=likeness, default=None)


def _row(run: RunFolder, first: RunFolder, among: Sequence[RunFolder], protocol: Protocol) -> Row:
    if not scoring.can_score(run, protocol):
        return Row(run, dict.fromkeys((*MEANS, "avg")), None, dict.fromkeys(MEANS, (None, None)), None)
    groups = first.groups if is_oracle(run) and _classes(run) == _classes(first) else run.groups
    steps = scoring.run_scores(run, protocol, groups)
    scores = {name: steps[-1][name] for name in MEANS}
    oracle = own_oracle(run, among, protocol)
    best = scoring.run_scores(oracle, protocol, run.groups)[-1] if oracle else {}
    drops = {name: continual.drop_to_oracle(scores[name], best.get(name)) for name in MEANS}
    avg = None if is_oracle(run) else continual.average(steps)
    newest = [None] * (len(steps) - 1) + [best.get(f"group{len(steps) - 1}")]
    return Row(
        run, scores | {"avg": avg}, oracle, drops, continual.intransigence(continual.group_table(steps), newest)[-1]
    )


def _between(first: RunFolder, run: RunFolder, protocol: Protocol | None) -> Iterator[str]:
    """Clauses 'fact: value in first, value in run'."""
    its = f"its oracle {run.path}" if is_oracle(run) and not is_oracle(first) else str(run.path)
    kinds = [_common, _backbone, *([_learner] if is_oracle(first) == is_oracle(run) else [])]
    for facts_of in kinds:
        mine, other = facts_of(first, protocol), facts_of(run, protocol)
        differing = [name for name in mine | other if mine.get(name, UNSET) != other.get(name, UNSET)]
        # One setting of the backbone stands for all, as one step's images do; those follow from mode and classes.
        alike = differing if facts_of is _backbone else [name for name in differing if name.startswith(IMAGES)]
        shown = [name for name in differing if name not in alike] or alike[:1]
        for name in shown:
            more = f" (and in {len(alike) - 1} more like it)" if name in alike[:-1] else ""
            values = [_shown(facts.get(name, UNSET)) for facts in (mine, other)]
            yield f"{name}: {values[0]} in {first.path}, {values[1]} in {its}{more}"


def _common(run: RunFolder, protocol: Protocol | None) -> dict[str, Any]:
    """What a learner and its oracle share."""
    data, config = _dict(run.provenance.get("data")), run.config.evaluate
    facts: dict[str, Any] = {"dataset": run.scenario["dataset"], "classes": _classes(run)}
    facts |= {f"data fingerprint of {split}": digest for split, digest in sorted(_dict(data.get("identity")).items())}
    facts |= {
        "evaluated split": config.split,
        "evaluated images": (data.get("evaluated_images"), data.get("evaluated_sha256")),
    }
    facts |= {"void pixels in training": run.scenario.get("void", "background")}
    if protocol is None or protocol.geometry == "full":
        slide = f" {config.window}/{config.stride} px" if config.inference == "slide" else ""
        size = f"short side {config.short_side or 'as stored'}, long side {config.long_side or 'any'}"
        facts["full-size inference"] = f"{config.inference}{slide}, {size}"
    if protocol is None or protocol.geometry == "crop":
        facts["centre crop"] = config.crop
    if protocol is None or protocol.rule == "all":
        facts["background threshold"] = config.background_threshold
    return facts


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _backbone(run: RunFolder, _: Protocol | None) -> dict[str, Any]:
    """The settings of the backbone, of `layers` the last block alone: which others a decoder reads is its own affair.
    Of a model without such a section, of the whole model."""
    model = run.config.model
    if isinstance(backbone := model.options.get("backbone"), dict):
        layers = backbone.get("layers")
        last = {"last of layers": layers[-1]} if isinstance(layers, list) and layers else {}
        return dict(_flat("model.backbone", {k: v for k, v in backbone.items() if not (last and k == "layers")} | last))
    return dict(_flat("model", {"name": model.name, **model.options}))


def _learner(run: RunFolder, _: Protocol | None) -> dict[str, Any]:
    """What learners share with each other."""
    facts = {"mode": run.scenario["mode"], "classes per step": "-".join(str(len(group)) for group in run.groups)}
    facts |= {"class order": [c for group in run.groups for c in group]}
    return facts | {f"{IMAGES} {t}": step.get("sha256", UNSET) for t, step in enumerate(run.scenario["steps"])}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _flat(f"{name}.{key}", item)


def _classes(run: RunFolder) -> list[int]:
    return sorted(c for group in run.groups for c in group)


def _shown(value: Any) -> str:
    """As text; digests and long lists by their beginning."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"{value[0]} images {_shown(value[1])}" if value[1] else "not recorded"
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}..."
    if isinstance(value, list) and len(value) > 12:
        digest = hashlib.sha256(repr(value).encode()).hexdigest()
        return f"[{', '.join(map(_shown, value[:6]))}, ...] ({len(value)} entries, digest {digest[:8]})"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else str(value)
