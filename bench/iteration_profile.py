"""Where an iteration spends its time, as one picture: docs/speed/iteration.png. Command:

    python bench/iteration_profile.py [--device cuda] [--csv FILE]

SegViT-CL with ViT-B/16 at 512 px, batch 2: the base step, a later step (encoder and old heads frozen), and that step on
stored features. Generated 512 px scenes come through the loader of a run. Parts are timed in place; each bar is the
iteration of median length. The picture shows every bench/results/<hardware>-iteration.csv.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from frozen import BATCH, SIZE, Learner, learner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from speed import RESULTS, Row, conditions, main, read_csv

from cssbench.config import AugmentConfig, TrainConfig
from cssbench.data.step_dataset import BatchStream, StepDataset, make_loader
from cssbench.data.synthetic import Synthetic
from cssbench.data.transforms import TrainTransform
from cssbench.engine import make_fabric
from cssbench.features import FeatureStore
from cssbench.frozen import EncodedBatches, StoredViews
from cssbench.profile import cut_steps
from cssbench.scenario import Scenario

PICTURE = RESULTS.parents[1] / "docs" / "speed" / "iteration.png"
REPEATS, IMAGES, WORKERS = 3, 24, {"cpu": 0, "cuda": 4}
PARTS = {  # and colours: Okabe & Ito 2008
    "data": "#E69F00",
    "encoder forward": "#0072B2",
    "heads forward": "#56B4E9",
    "loss": "#009E73",
    "backward": "#D55E00",
    "optimiser": "#CC79A7",
    "other": "#9AA0A6",
}
DARK = {"encoder forward", "backward"}


class Clock:
    """Seconds by part. Parts do not overlap; on a GPU each begins and ends with an idle device."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] += self.now() - start


@contextmanager
def watched(made: Learner, clock: Clock) -> Iterator[None]:
    """While it lasts, the forward passes of encoder and heads, and the method's loss, count as theirs."""
    started: list[float] = []

    def leave(name: str) -> None:
        clock.seconds[name] += clock.now() - started.pop()

    heads = [("heads forward", head) for head in made.ctx.model.heads]
    loss = made.method.loss

    def timed_loss(*arguments: Any) -> Any:
        with clock.part("loss"):
            return loss(*arguments)

    with ExitStack() as undo:
        for name, module in [("encoder forward", made.ctx.model.backbone), *heads]:
            undo.callback(module.register_forward_pre_hook(lambda *_: started.append(clock.now())).remove)
            undo.callback(module.register_forward_hook(lambda *_, name=name: leave(name)).remove)
        made.method.loss = timed_loss  # type: ignore[method-assign]
        undo.callback(delattr, made.method, "loss")
        yield


def iteration(made: Learner, stream: Iterator[dict[str, Any]]) -> dict[str, float]:
    """Seconds by part of one iteration; "other" is what no part has."""
    clock = Clock()
    start = clock.now()
    with clock.part("data"):
        loaded = next(stream)
    with watched(made, clock):
        total, check = made.forward(loaded)
    with clock.part("backward"):
        made.fabric.backward(total)
    with clock.part("optimiser"):
        made.step(check)
    whole = clock.now() - start
    return clock.seconds | {"other": whole - sum(clock.seconds.values())}


def median_iteration(made: Learner, stream: Iterator[dict[str, Any]], repeats: int) -> dict[str, float]:
    """The iteration of median length among `repeats` (odd), after one that does not count."""
    found = [iteration(made, stream) for _ in range(1 + repeats)][1:]
    lengths = [sum(parts.values()) for parts in found]
    return found[lengths.index(statistics.median(lengths))]


def scenes(source: Synthetic, made: Learner, steps: Scenario, side: int, views: int | None = None) -> StepDataset:
    """The images of the learner's step."""
    step, model = made.ctx.step, made.ctx.model
    stems = [stem for stem in source.stems("train") if set(step.new) & set(source.label("train", stem).flat)]
    transform = TrainTransform(AugmentConfig(crop=side), model.pixel_mean, model.pixel_std)
    return StepDataset(source, "train", stems, steps.train_table(step), transform, seed=0, views=views)


def measure(
    device: str, options: dict[str, Any] | None = None, side: int = SIZE, repeats: int = REPEATS
) -> Iterator[Row]:
    fabric = make_fabric(TrainConfig(iterations=1, accelerator=device))  # type: ignore[arg-type]
    cut, workers, length = cut_steps("100-10", 150), WORKERS[device], 1 + repeats
    steps = Scenario("bench", "synthetic", groups=tuple(step.new for step in cut))
    with tempfile.TemporaryDirectory() as folder, FeatureStore(Path(folder, "features"), "bench", 10.0) as store:
        source = Synthetic(folder, classes=150, size=side, train=IMAGES, val=1)

        def rows(name: str, made: Learner, stream: Any) -> Iterator[Row]:
            parts = median_iteration(made, iter(stream), repeats)
            for part, seconds in parts.items():
                yield {"iteration": name, "part": part, "ms": f"{1000 * seconds:.4g}", "repeats": repeats,
                       "size": f"SegViT-CL, ViT-B/16, {side} px, batch {BATCH}", **conditions(device)}  # fmt: skip

        base = learner(fabric, cut, 0, options)
        data = scenes(source, base, steps, side)
        yield from rows("base step", base, make_loader(data, BatchStream(len(data), 0, BATCH, length), workers))
        later = learner(fabric, cut, 1, options)
        data = scenes(source, later, steps, side, views=1)
        yield from rows("t > 0, frozen", later, make_loader(data, BatchStream(len(data), 0, BATCH, length), workers))
        stored = StoredViews(data, store.folder, torch.bfloat16)

        def batches(iterations: int) -> EncodedBatches:
            loader = make_loader(stored, BatchStream(len(data), 0, BATCH, iterations), workers, list)
            return EncodedBatches(loader, later.ctx.model, store, fabric, torch.bfloat16, len(data))

        for _ in batches(-(-len(data) // BATCH)):  # every view once: encoded and kept
            pass
        yield from rows("t > 0, stored features", later, batches(length))


def draw(results: Path = RESULTS, picture: Path = PICTURE) -> None:
    """The picture of every table of this kind in `results`: a panel for each machine, bars in seconds."""
    tables = [read_csv(path) for path in sorted(results.glob("*-iteration.csv"))]
    figure = Figure(figsize=(9, 0.6 + 2.5 * len(tables)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for panel, rows in zip(panels, tables, strict=True):
        draw_panel(panel, rows)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9,
                  columnspacing=1.2, handlelength=1.2)  # fmt: skip
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=150, metadata={"Software": None})


def draw_panel(panel: Any, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(str(row["iteration"]) for row in rows))
    seconds = {(str(row["iteration"]), str(row["part"])): float(str(row["ms"])) / 1000 for row in rows}
    ends = dict.fromkeys(names, 0.0)
    longest = max(sum(seconds[name, part] for part in PARTS) for name in names)
    for part, colour in PARTS.items():
        widths = [seconds[name, part] for name in names]
        panel.barh(names, widths, left=list(ends.values()), color=colour, label=part, edgecolor="white", linewidth=0.6)
        for place, (name, width) in enumerate(zip(names, widths, strict=True)):
            if width > 0.06 * longest:
                ink = "white" if part in DARK else "black"
                middle = ends[name] + width / 2
                panel.text(middle, place, in_seconds(width), ha="center", va="center", fontsize=9, color=ink)
            ends[name] += width
    whole = ends[names[0]]
    for place, name in enumerate(names):
        share = f"  ({ends[name] / whole:.2f} of the first)" if place else ""
        panel.text(ends[name] + 0.01 * longest, place, f"{in_seconds(ends[name])}{share}", va="center", fontsize=10,
                   weight="bold")  # fmt: skip
    panel.set_xlim(0, 1.1 * longest)
    panel.set_xlabel("seconds of one iteration")
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    torch_version = str(rows[0]["versions"]).split(",")[0]
    panel.set_title(f"{rows[0]['size']}: {rows[0]['machine']}, {torch_version}", fontsize=10, loc="left")


def in_seconds(seconds: float) -> str:
    """Two decimals below ten seconds, but milliseconds below a tenth."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


if __name__ == "__main__" and main(__doc__, measure, "iteration").parent == RESULTS:
    draw()
