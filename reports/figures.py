"""Every figure of a report: which are drawn of which runs, and what their captions say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from cssbench.metrics import continual
from cssbench.reports import charts, plots
from cssbench.reports.admission import mix
from cssbench.reports.entries import Entry, entries
from cssbench.reports.formats import file_part, file_parts
from cssbench.reports.plots import Plot, Theme
from cssbench.reports.samples import Sample
from cssbench.reports.scored import Scored, training
from cssbench.reports.stops import StopSample, stops_figure
from cssbench.reports.tokens import sweeps, tokens_figure

BAND = " Bands, or the lines on bars: one standard deviation over n runs."
MASKS = 3
CLASS_FORGETTING = "best IoU of a class at an earlier step - IoU after the last"


def setting_figures(scored: Sequence[Scored], folder: Path, name: str) -> list[Plot]:
    """Draw the figures of one setting under one protocol into `folder` as `<kind>.<name>.{svg,pdf,png}`.

    Kinds: miou, forgetting, old_new, cost, tokens; and of each entry heat and class_forgetting, with its label in the
    name.
    """
    found = entries(scored)
    learners = [entry for entry in found if not entry.oracle]
    forgetful = [entry for entry in learners if entry.first.done > 1]
    finished = [entry for entry in found if entry.finished]
    where = f"{scored[0].setting.title}, protocol {scored[0].protocol.id}"
    mixed = mix(scored)
    where += f". MIXED, not comparable with each other: {'; '.join(mixed)}" if mixed else ""
    band = BAND if any(entry.n > 1 for entry in learners) else ""
    drawn, parts = [], file_parts(entry.label for entry in learners)

    def add(kind: str, draw: Callable[[Theme], Figure], caption: str, label: str | None = None) -> None:
        stem = folder / f"{kind}.{file_part(name)}{f'.{parts[label]}' if label is not None else ''}"
        drawn.append(plots.plot(kind, draw, stem, f"{caption} {where}.", label))

    if learners:
        caption = f"mIoU after each step of all classes seen so far, and of the base classes.{band}"
        add("miou", partial(plots.miou_figure, found), caption)
    if forgetful:
        caption = f"Forgetting of each group: {continual.FORMULAS['forgetting']}.{band}"
        add("forgetting", partial(plots.forgetting_figure, forgetful), caption)
    if sum(len(entry.members) for entry in finished) > 1 and any(not entry.oracle for entry in finished):
        if any(one.scores[-1]["incremental"] is not None for entry in finished for one in entry.members):
            lines = _equal_all(scored[0])
            caption = f"Base against incremental classes after the last step, one mark per run; oracles hollow.{lines}"
            add("old_new", partial(charts.old_new_figure, finished), caption)
        caption = f"mIoU of all classes against cost, one mark per run; oracles hollow.{_hardware(finished)}"
        add("cost", partial(charts.cost_figure, finished), caption)
    if found_sweeps := sweeps(scored):
        caption = "mIoU of all classes after the last step against the cost of a forward pass. A line joins entries "
        caption += "that differ in one option alone, whose values stand at the marks."
        add("tokens", partial(tokens_figure, found_sweeps), caption)
    for entry in learners:
        caption = f"IoU of each class after each step: {plots.with_n(entry)}. Beside a class: the step that taught it. "
        caption += "Empty: not learned yet; crossed: no pixel of it in the truth."
        add("heat", partial(charts.heat_figure, entry), caption, entry.label)
        if entry.forgetting():
            caption = f"Forgetting of each class, {plots.with_n(entry)}: {CLASS_FORGETTING}. Beside a class: its step."
            add("class_forgetting", partial(charts.class_forgetting_figure, entry), caption, entry.label)
    return drawn


def _equal_all(one: Scored) -> str:
    weights = charts.all_weights(one.protocol, one.setting.groups)
    if weights is None:
        return ""
    return f" Dotted: equal mIoU of all classes, ({weights[0]} base + {weights[1]} incremental) / {sum(weights)}."


def _hardware(found: Sequence[Entry]) -> str:
    """Times are comparable on equal hardware alone."""
    machines = {str(training(one.run).get("hardware")) for entry in found for one in entry.members}
    return " Trained on different machines: times are not comparable." if len(machines) > 1 else ""


def sample_figures(samples: Sequence[Sample], folder: Path, name: str) -> list[Plot]:
    """`masks.<name>.<image>.{svg,pdf,png}` of the first `MASKS` sample images."""
    samples = samples[:MASKS]
    parts = file_parts(sample.stem for sample in samples)
    return [
        plots.plot(
            "masks",
            partial(charts.mask_figure, sample),
            folder / f"masks.{file_part(name)}.{parts[sample.stem]}",
            f"{sample.stem}: image, truth, and for each run the prediction after each step above its error map.",
            sample.stem,
        )
        for sample in samples
    ]


def stop_figures(found: Sequence[StopSample], folder: Path, name: str) -> list[Plot]:
    """`stops.<name>.<image>.{svg,pdf,png}` of the first `MASKS` sample images on which tokens were dropped."""
    found = found[:MASKS]
    parts = file_parts(one.sample.stem for one in found)
    return [
        plots.plot(
            "stops",
            partial(stops_figure, one),
            folder / f"stops.{file_part(name)}.{parts[one.sample.stem]}",
            f"{one.sample.stem}: where tokens stopped. Depth: encoder blocks that a token went through. After n "
            f"blocks: tokens that have stopped by then are bright, those that go on dark.",
            one.sample.stem,
        )
        for one in found
    ]
