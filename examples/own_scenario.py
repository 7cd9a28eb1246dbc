"""A scenario of your own: the last classes first, three steps; how many images each has, and a run on it.

    python examples/own_scenario.py [FOLDER]

FOLDER (default: own-scenario) gets generated scenes, the scenario's TOML and a run of a minute.
"""

import sys
from pathlib import Path

from cssbench import scenario
from cssbench.cli.run import start_run
from cssbench.data import presence
from cssbench.data.registry import make_dataset

SCENARIO = """\
description = "Twelve kinds of scenery, the last first: six, then four, then two"
dataset = "synthetic"
classes = 12
base = 6
increment = [4, 2]
mode = "overlapped"
order = [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
"""


def own_scenario(folder: Path, *settings: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "last-first.toml"
    file.write_text(SCENARIO)

    scenes = make_dataset("synthetic", str(folder), {"classes": 12, "train": 200, "val": 40})
    for mode in ("overlapped", "partitioned"):  # the file's, and another without touching it
        scene = scenario.load(str(file), mode=mode)
        images = scene.images(presence.build(scenes, "train").table)
        for step, chosen in zip(scene.steps, images, strict=True):
            names = ", ".join(scenes.classes[c - 1] for c in step.new)
            print(f"{mode}, step {step.index}: {len(chosen)} images for {names}")

    options = ["data.options={classes=12,train=200,val=40}", "train.iterations=[60,30]", *settings]
    start_run("demo-segvit-cl", folder / "run", folder, [f"scenario.name='{file}'", *options])


if __name__ == "__main__":
    own_scenario(Path(sys.argv[1] if len(sys.argv) > 1 else "own-scenario"))
