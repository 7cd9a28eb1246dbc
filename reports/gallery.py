"""A gallery for the documentation: one Markdown page and the PNG of every figure that it shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from cssbench.reports import conventions, figures, forms
from cssbench.reports.admission import score_all
from cssbench.reports.formats import markdown, markdown_escape
from cssbench.reports.samples import samples
from cssbench.reports.scored import Scored, by_setting, caveats, labels, unique
from cssbench.reports.stops import stop_samples
from cssbench.reports.tokens import tokens_table
from cssbench.results import RunFolder, write_bytes

TITLES = {
    "miou": "mIoU over the steps",
    "old_new": "Old against new classes",
    "cost": "Accuracy against cost",
    "tokens": "Accuracy against GFLOPs",
    "forgetting": "Forgetting of each group",
    "heat": "Classes over the steps",
    "class_forgetting": "What each class lost",
    "masks": "Predictions and their errors",
    "stops": "Where tokens stopped",
}


def write(runs: list[RunFolder], out_dir: Path, protocol_ids: list[str], *, allow_mixed: bool = False) -> list[Path]:
    """The entry point `gallery`: `gallery.md` and `gallery/*.png`, the figures under the first protocol that scores
    each setting; returns the files, page first. Raises RunError as `html.write`."""
    out_dir, runs = Path(out_dir), unique(runs)
    scored = score_all(runs, protocol_ids, allow_mixed)
    shown: dict[object, list[Scored]] = {}
    for ones in scored.values():
        for setting, members in by_setting(ones).items():
            shown.setdefault(setting, members)
    names = labels(runs)
    lines = ["# Gallery", "", "Made from these runs by `cssbench report --kind gallery`:", ""]
    for run in runs:
        against = "; ".join(caveats(run))
        known = f"{names[run.path]}: {run.config.method.name} on {run.scenario['name']}, {run.scenario['mode']}"
        lines.append(f"- {markdown_escape(known)}{f' ({markdown_escape(against)})' if against else ''}")
    pictures: list[Path] = []
    with TemporaryDirectory() as folder:
        for number, members in enumerate(shown.values(), 1):
            lines += _chapter(members, Path(folder), out_dir / "gallery", f"{number}", pictures)
    page = out_dir / "gallery.md"
    write_bytes(page, "\n".join([*lines, ""]).encode())
    return [page, *pictures]


def _chapter(members: Sequence[Scored], drawn: Path, kept: Path, number: str, pictures: list[Path]) -> Iterator[str]:
    """The lines of one setting; its PNGs go from `drawn` to `kept` and into `pictures`."""
    first = members[0]
    yield from ("", f"## {markdown_escape(first.setting.title)}", "", markdown(forms.summary_table(members)))
    if groups := forms.first_last_table(members):
        yield markdown(groups)
    if tokens := tokens_table(members):
        yield markdown(tokens)
    plots = figures.setting_figures(members, drawn, f"{number}.{first.setting.scenario}")
    sampled = samples(members)
    plots += figures.sample_figures(sampled, drawn, f"{number}.{first.setting.scenario}")
    plots += figures.stop_figures(stop_samples(sampled), drawn, f"{number}.{first.setting.scenario}")
    for kind, title in TITLES.items():
        mine = [plot for plot in plots if plot.kind == kind]
        if mine:
            yield from ("", f"### {title}", "")
        for plot in mine:
            path = kept / plot.png.name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plot.png, path)
            pictures.append(path)
            yield from (f"![{markdown_escape(title)}](gallery/{path.name})", "", markdown_escape(plot.caption), "")
    learner = next((one for one in members if not one.oracle and one.finished), None)
    if learner and (table := conventions.protocol_table(learner)):
        yield from ("", "### One run under every protocol", "", markdown(table))
