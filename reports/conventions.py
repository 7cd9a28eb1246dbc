"""One run under every protocol, and which rule makes which difference: what "mIoU" means without its protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pandas as pd

from cssbench import protocol as protocols
from cssbench import scoring
from cssbench.metrics import continual
from cssbench.protocol import Protocol
from cssbench.reports import frames
from cssbench.reports.formats import Table, percent
from cssbench.reports.forms import assemble, warning
from cssbench.reports.scored import Scored

REFERENCE = "mmseg150@1"
WORDS = {
    "geometry": {"full": "full-size images", "crop": "centre crop"},
    "rule": {"all": "argmax over all outputs, background too", "foreground": "argmax over the classes alone"},
    "void": {
        "ignore": "void ignored",
        "background": "void is background",
        "false-positive": "void makes false positives",
    },
    "future": {"ignore": "classes not yet learned ignored", "background": "classes not yet learned are background"},
    "background": {
        "none": "background in no mean",
        "all": "background in the mean of all",
        "base": "background is a base class",
    },
    "absent": {"drop": "classes without truth left out", "zero": "classes without truth count as 0"},
    "all_mean": {
        "classes": "all over classes",
        "nonzero": "all over classes above 0",
        "weighted": "all weighted by group sizes",
    },
}
HOW = (
    "In brackets: what a rule changes in all, in points, when the rules are applied one after another in the order "
    "given, beginning with {}; they add up to the difference. After the last step no class is left to be learned, so "
    "that the rule for classes not yet learned moves avg alone. cssbench protocol show ID says each rule in full."
)


def protocol_table(one: Scored) -> Table | None:
    """A run under every installed protocol that it can be scored by; None where that is one alone."""
    found = {p.id: p for p in protocols.protocols().values() if scoring.can_score(one.run, p)}
    if len(found) < 2:
        return None
    reference = found.get(REFERENCE) or next(iter(found.values()))
    scores = {p.id: _scores(one, p) for p in found.values()}
    columns: dict[tuple[str, str], Iterable[str]] = {("", "protocol"): list(scores)}
    columns |= {("mIoU, %", name): [percent(each[name]) for each in scores.values()] for name in frames.SUMMARY}
    columns["", "classes"] = [str(_classes(one, p)) for p in found.values()]
    columns["", "why"] = [_why(one, reference, p) for p in found.values()]
    caption = (
        f"The same run under every protocol: {one.shown_as}, {one.setting.title}. These rows are one and the same "
        f"result and not comparable with each other. {one.setting.facts}.{warning([one])}"
    )
    notes = [HOW.format(reference.id), "classes: entries of the mean of all classes after the last step."]
    kinds = ["mean" if p == reference else "" for p in found.values()]
    made = assemble(caption, columns, 1, kinds, list(frames.SUMMARY), notes)
    return replace(made, aside=("classes",))


def protocols_frame(scored: Sequence[Scored]) -> pd.DataFrame:
    """One row per run and protocol: base, incremental, all, avg, and the number of classes in the mean of all."""
    rows = []
    for one in {(one.label, one.setting): one for one in scored}.values():
        for protocol in protocols.protocols().values():
            if scoring.can_score(one.run, protocol):
                scores = _scores(one, protocol)
                row = {key: value for key, value in frames.who(one).items() if key != "protocol"}
                row |= {"protocol": protocol.id} | {name: scores[name] for name in frames.SUMMARY}
                rows.append(row | {"classes": _classes(one, protocol)})
    return frames.to_frame(rows, frames.SUMMARY)


def _scores(one: Scored, protocol: Protocol) -> dict[str, float | None]:
    steps = scoring.run_scores(one.run, protocol, one.setting.groups)
    return steps[-1] | {"avg": None if one.oracle else continual.average(steps)}


def _classes(one: Scored, protocol: Protocol) -> int:
    ious = scoring.step_ious(one.run, one.run.records()[-1], protocol, one.setting.groups)
    return sum(value > 0 for value in ious.values()) if protocol.all_mean == "nonzero" else len(ious)


def _why(one: Scored, reference: Protocol, protocol: Protocol) -> str:
    """The rules in which `protocol` is not as `reference`, each with what it changes in `all`."""
    if protocol == reference:
        return f"the reference: {protocol.summary}"
    record, groups = one.run.records()[-1], one.setting.groups
    before, parts, current = None, [], reference
    if not one.imported:
        before = scoring.step_scores(one.run, record, reference, groups)["all"]
    for rule, words in WORDS.items():
        value = getattr(protocol, rule)
        if getattr(current, rule) == value or (rule == "void" and scoring.has_background_class(one.run)):
            continue  # the second: nothing is void there
        current = replace(current, **{rule: value})
        after = None
        if not one.imported and current.key in record.matrices:
            after = scoring.step_scores(one.run, record, current, groups)["all"]
        change = "" if before is None or after is None else f" ({_signed(after - before)})"
        before = after
        parts.append(f"{words[value]}{change}")
    return "; ".join(parts)


def _signed(value: float) -> str:
    shown = percent(value)
    return shown if shown.startswith("−") else f"+{shown}"
