"""A figure of your own: what each method keeps of the base classes against what it learns, step by step.

    python examples/custom_figure.py [FOLDER [PICTURE]]

FOLDER (default: reports/results/camvid-6-1/runs of the checkout) has run folders anywhere below it.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import cssbench

COMMITTED = Path(__file__).parents[1] / "reports" / "results" / "camvid-6-1" / "runs"


def custom_figure(folder: Path, picture: Path, protocol: str = "mmseg150@1") -> None:
    scores = cssbench.load_runs(folder, [protocol])
    wide = scores.pivot_table(index=["oracle", "run", "method", "model", "step"], columns="group", values="miou")

    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    for number, ((oracle, _, method, model), run) in enumerate(wide.groupby(level=[0, 1, 2, 3])):
        if oracle:  # it has no base and incremental classes of its own
            continue
        later = run[run.index.get_level_values("step") > 0]
        style = {"color": f"C{number % 10}", "marker": "os^Dv"[number // 10 % 5], "markersize": 3}
        axes.plot(100 * later.incremental, 100 * later.base, label=f"{method}, {model}", **style)
        axes.plot(100 * later.incremental.iloc[-1:], 100 * later.base.iloc[-1:], **style | {"markersize": 8})
    axes.set_xlabel(f"incremental classes, mIoU in % ({protocol})")
    axes.set_ylabel("base classes, mIoU in %")
    axes.set_title("Steps t > 0; the large mark is the last step", fontsize=10)
    axes.legend(fontsize=6)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    print(picture)


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else COMMITTED
    custom_figure(where, Path(sys.argv[2] if len(sys.argv) > 2 else "own-figure.png"))
