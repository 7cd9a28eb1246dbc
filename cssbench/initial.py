"""`train.initial`: step 0 starts from what another run knew after its step 0, the rest as in any run.

It is how a published base model is fine-tuned, and DToP@Finetune made. The other run has the same model and base
classes, in the same order; its options may differ as long as every tensor fits. A finished step 0 needs it no more.
"""

from __future__ import annotations

from typing import Any

from cssbench import checkpoint
from cssbench.errors import ConfigError, RunError
from cssbench.experiment import Experiment
from cssbench.results import RunFolder, content_digest


def start_from_initial(made: Experiment) -> dict[str, Any]:
    """Load the weights into the model, grown to step 0. -> {"initial": {"path", "digest"}} for the step's record, the
    digest that of the record they belong to; {} where `train.initial` is not set.

    Raises ConfigError when the run is missing, damaged or another model, or has learned other classes.
    """
    path = made.config.train.initial
    if path is None:
        return {}
    try:
        run = RunFolder.read(path)
        record, weights = run.weights(0)
        _check(made, run)
        checkpoint.load_weights(weights, made.model)
    except RunError as error:
        raise ConfigError(f"train.initial = {path!r} cannot be started from. {error}") from error
    return {"initial": {"path": path, "digest": content_digest(record.content)}}


def _check(made: Experiment, run: RunFolder) -> None:
    scene = made.scenario
    mine = {
        "model": made.config.model.name,
        "dataset": scene.dataset,
        "classes of step 0": list(scene.steps[0].new),
    }
    its = {
        "model": run.config.model.name,
        "dataset": run.scenario["dataset"],
        "classes of step 0": run.groups[0],
    }
    wrong = [f"{name} {its[name]}, not {mine[name]}" for name in mine if mine[name] != its[name]]
    if wrong:
        raise RunError(f"It has {'; '.join(wrong)}. Name a run of this model and these base classes.")
