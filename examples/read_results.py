"""Results as a pandas DataFrame: tables of your own from run folders, without images, GPU or torch.

    python examples/read_results.py [FOLDER]

FOLDER (default: reports/results/camvid-6-1/runs of the checkout) has run folders anywhere below it.
"""

import sys
from pathlib import Path

import pandas as pd

import cssbench

COMMITTED = Path(__file__).parents[1] / "reports" / "results" / "camvid-6-1" / "runs"


def read_results(folder: Path) -> pd.DataFrame:
    scores = cssbench.load_runs(folder)  # a row per run, step, protocol and group of classes
    learners = scores[~scores.oracle & scores.finished]

    last = learners[learners.step == learners.groupby("run").step.transform("max")]
    means = last[last.group.isin(["base", "incremental", "all"])]
    table = means.pivot_table(index=["method", "model"], columns=["protocol", "group"], values="miou")
    print(100 * table.round(4))

    base = learners[(learners.group == "base") & (learners.protocol == "mmseg150@1")]
    curve = base.pivot_table(index=["method", "model"], columns="step", values="miou")
    forgetting = curve.drop(columns=curve.columns[-1]).max(axis=1) - curve[curve.columns[-1]]
    print("\nforgetting of the base classes, points: best earlier step minus last\n")
    print((100 * forgetting).sort_values().round(2))
    return table


if __name__ == "__main__":
    read_results(Path(sys.argv[1]) if len(sys.argv) > 1 else COMMITTED)
