"""The README.md of an exported model, in the form of Hugging Face: YAML front matter, then what one must know of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cssbench import scoring
from cssbench.metrics import continual
from cssbench.protocol import Protocol, protocols
from cssbench.results import RunFolder, StepRecord

MEANS = ("base", "incremental", "all", "avg")
TEXT = """\
# {title}

{model} of {parameters:,} parameters, trained by method `{method}` on scenario `{scenario}` ({mode}; data set
`{dataset}`), after step {step} of {steps} (from 0): it knows {known} of {total} classes.{note}

## Use

```python
# in this folder; needs torch, torchvision, timm and safetensors, not cssbench
from PIL import Image
import numpy as np
from modeling import load
model = load()
ids = model.predict(np.array(Image.open("photo.jpg").convert("RGB")))  # (H, W) uint8 class ids
```

`model(images)` gives scores (B, C, H, W) of inputs normalised with `pixel_mean` and `pixel_std` of `config.json`, whose
`groups` name the channels in order{background}. `cssbench predict FOLDER IMAGES... --out DIR` writes coloured
masks. Nothing here is pickled; `modeling.py` is the only code. Made with {packages}.

## Scores

mIoU in %, IoU = TP / (truth + predicted - TP) from one matrix of {images} images of split `{split}`. Rows are
conventions of counting, not comparable with each other: `cssbench protocol show ID` says each. avg is the mean of
"all" over steps 0 to {step}.

{table}

## Labels

{labels}

{classes}

## Provenance

{provenance}

## Limits

{limits}
"""


def card(run: RunFolder, record: StepRecord, about: dict[str, Any], parameters: int) -> str:
    """The text for the model after the step of `record`; about: the content of its config.json."""
    step, steps = record.index, run.num_steps
    scores = {p.id: _scores(run, record, p) for p in protocols().values() if scoring.can_score(run, p)}
    settings, scene = run.config, run.scenario
    title = f"{about['model']}, {settings.method.name}, {about['scenario']}, step {step}"
    text = TEXT.format(
        title=title,
        model=f"`{about['model']}`",
        parameters=parameters,
        method=settings.method.name,
        scenario=about["scenario"],
        mode=scene["mode"],
        dataset=about["dataset"],
        step=step,
        steps=steps - 1,
        known=len(about["classes"]),
        total=sum(len(group) for group in run.groups),
        note=f" {settings.note[:1].upper()}{settings.note[1:]}." if settings.note else "",
        background=", channel 0 being background" if about["has_background"] else "",
        packages=", ".join(f"{name} {version}" for name, version in about["packages"].items()),
        images=record.content.get("evaluated_images", "?"),
        split=settings.evaluate.split,
        table=_table(("protocol", *MEANS), [(name, *map(_percent, row.values())) for name, row in scores.items()]),
        labels=_labels(about),
        classes=_table(("id", "class", "step", "colour"), list(_classes(about))),
        provenance=_provenance(run, record),
        limits="\n".join(f"- {limit}" for limit in _limits(run, record, about)),
    )
    return _front_matter(about, title, settings.evaluate.split, scores) + text


def _scores(run: RunFolder, record: StepRecord, protocol: Protocol) -> dict[str, float | None]:
    found = scoring.run_scores(run, protocol)[: record.index + 1]
    return {name: found[-1][name] for name in MEANS[:3]} | {"avg": continual.average(found)}


def _front_matter(about: dict[str, Any], title: str, split: str, scores: dict[str, dict[str, float | None]]) -> str:
    """YAML; texts are written as JSON, which YAML contains."""
    lines = ["---", "library_name: timm", "pipeline_tag: image-segmentation", "tags:"]
    lines += [f"- {tag}" for tag in ("semantic-segmentation", "continual-learning", "cssbench")]
    lines += ["datasets:", f"- {json.dumps(about['dataset'])}", "metrics:", "- mean_iou", "model-index:"]
    lines += [f"- name: {json.dumps(title)}", "  results:", "  - task:", "      type: image-segmentation"]
    lines += [
        "    dataset:",
        f"      name: {json.dumps(about['dataset'])}",
        f"      type: {json.dumps(about['dataset'])}",
    ]
    lines += [f"      split: {json.dumps(split)}", "    metrics:"]
    for protocol, means in scores.items():
        for name, value in means.items():
            if value is not None:
                shown = f"{name} mIoU, {protocol}"
                lines += ["    - type: mean_iou", f"      name: {json.dumps(shown)}", f"      value: {100 * value:.2f}"]
    return "\n".join([*lines, "---", "", ""])


def _labels(about: dict[str, Any]) -> str:
    if about["background_class"]:
        zero = "0 is background, a class of the data that is scored"
    else:
        zero = "0 is background: what is none of these classes; on this data it is also void, and no class"
    rule = "the best class everywhere, never 0" if about["rule"] == "foreground" else "0 where background is likelier"
    return (
        f"Class ids are the data set's. {zero}. `predict` answers with {rule}; `predict(image, rule=...)` takes either."
    )


def _classes(about: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for step, group in enumerate(about["groups"]):
        for c in group:
            yield str(c), about["classes"][str(c)], str(step), "#{:02x}{:02x}{:02x}".format(*about["palette"][str(c)])


def _provenance(run: RunFolder, record: StepRecord) -> str:
    known = run.provenance
    commit = f"{known['commit']}{' with changes' if known.get('dirty') else ''}" if known.get("commit") else "unknown"
    data = known["data"] if isinstance(known.get("data"), dict) else {}
    trained = f"{record.content.get('images')}, {record.content.get('iterations')}"
    identity = (data.get("identity") or {}).items()
    rows = [
        ("command", f"`{' '.join(map(str, known.get('command') or ['unknown']))}`"),
        ("started", known.get("started", "unknown")),
        ("cssbench", f"{known.get('version', 'unknown')}, commit {commit}"),
        ("seed", run.config.seed),
        ("hardware", _hardware(known.get("hardware"))),
        *((f"data of {split}, SHA-256 of names and sizes", digest) for split, digest in identity),
        ("training images and iterations of this step", trained),
        ("SHA-256 of model.safetensors", record.content["sha256"].get("model.safetensors")),
        ("digest of the run", run.digest),
    ]
    return _table(("what", ""), [(str(name), str(value)) for name, value in rows])


def _hardware(known: Any) -> str:
    if not isinstance(known, dict):
        return "unknown"
    return ", ".join([*known.get("gpu", []), f"{known.get('cpu', 'unknown CPU')} ({known.get('cores', '?')} cores)"])


def _limits(run: RunFolder, record: StepRecord, about: dict[str, Any]) -> Iterator[str]:
    yield "A model of a benchmark, not of a product: one seed, the classes above and nothing else."
    if record.index:
        yield "It learned in steps, and forgets: classes of early steps may be worse than the means tell."
    if record.index < run.num_steps - 1:
        yield f"Classes of later steps are unknown to it: this is step {record.index} of {run.num_steps - 1}."
    if not about["has_background"]:
        yield (
            "It has no output for background: with rule `all` a pixel is background where no score reaches "
            f"{about['evaluate']['background_threshold']}."
        )
    if run.provenance.get("debug_limited"):
        yield "It was evaluated on the first images only (evaluate.limit): the scores must not stand in any table."
    if about["precision"] != "32-true":
        yield f"It was trained and evaluated in {about['precision']}; on another device outputs differ by rounding."
    yield "Licence: not stated here. The terms of the training images and of pre-trained weights apply."


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(heads), line(("---",) * len(heads)), *map(line, rows)])
