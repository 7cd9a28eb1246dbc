"""A method of your own in one file: what the old model said stays, weighted by how sure it was. Checked, then run.

    python examples/own_method.py [FOLDER]

To keep it, make a package of it (docs/add-a-method.md); a name in recipes and lists is all that adds.
"""

import sys
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from cssbench import config, provenance, recipes
from cssbench.api import Batch, Method, Section, StepContext
from cssbench.experiment import build_experiment, resolve
from cssbench.task_loop import run
from cssbench.testing import conformance


class SureKeeper(Method):
    """Cross-entropy on the new labels, and the old model's outputs kept where it was sure of them."""

    class Config(Section):
        weight: float = Field(10.0, ge=0, description="of the term that keeps old outputs")

    plain_base = True  # step 0 is plain training

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        terms = ctx.model.loss(batch.output, batch.labels)
        if batch.previous is None:  # step 0
            return terms
        old = batch.previous.pixel_logits.softmax(dim=1)  # (B, K, H, W), background first, no gradient
        logits, k = batch.output.pixel_logits, old.shape[1]
        background = torch.cat([logits[:, :1], logits[:, k:]], 1).logsumexp(1, keepdim=True)  # new classes were it
        new = torch.cat([background, logits[:, 1:k]], 1) - logits.logsumexp(1, keepdim=True)
        surprise = -(old * new).sum(dim=1)  # (B, H, W)
        return terms | {"keep": self.config.weight * (old.amax(dim=1) * surprise).mean()}


def own_method(folder: Path, *settings: str) -> None:
    kept = conformance(SureKeeper, model="vit-linear")
    print(f"{sum(one.passed is True for one in kept)} of {len(kept)} promises kept")

    changes = ["train.iterations=[100,50]", "data.options={train=400,val=60}", f"data.root='{folder}'", *settings]
    recipe = recipes.override(recipes.read_recipe("synthetic-10-5-finetune-linear"), changes)
    chosen = resolve(config.validate(recipe, "own_method.py"))
    made = build_experiment(chosen, folder / "run", provenance.this_command(), SureKeeper(SureKeeper.Config()))
    made.folder.create()
    run(made)


if __name__ == "__main__":
    own_method(Path(sys.argv[1] if len(sys.argv) > 1 else "own-method"))
