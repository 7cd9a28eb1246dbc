"""`train.compile`: what is compiled, how often, what it leaves behind, and training where nothing can compile."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from tiny_segvit import SCENARIO, context, make_model
from torch import Tensor, nn

from cssbench import compiling
from cssbench.baselines.finetune import FineTune
from cssbench.compiling import Backend, compiled
from cssbench.config import OptimConfig, TrainConfig
from cssbench.engine import make_fabric
from cssbench.models.aspp import DeepLabV3
from cssbench.models.segmenter import Segmenter, freeze_copy
from cssbench.trainer import fit


class Counting(Backend):
    """Graphs as torch traced them, run one by one; the shapes of their inputs."""

    def __init__(self) -> None:
        super().__init__("eager")
        self.graphs: list[list[tuple[int, ...]]] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        self.graphs.append([tuple(x.shape) for x in inputs if isinstance(x, Tensor)])
        return super().__call__(graph, inputs)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Counting:
    torch._dynamo.reset()
    made = Counting()
    monkeypatch.setattr(compiling, "BACKEND", made)
    return made


def learn(model: Segmenter, step: int, previous: Segmenter | None = None, **train: Any) -> dict[str, Tensor]:
    """Two iterations of one step; the weights afterwards."""
    torch.manual_seed(step)
    ctx = context(model, SCENARIO.steps[step], previous)
    settings = TrainConfig(iterations=2, batch_size=4, accelerator="cpu", **train)
    fit(make_fabric(settings), ctx, FineTune(), list(ctx.train_loader), OptimConfig(lr=1e-3), settings, 2)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def grown(steps: int) -> Segmenter:
    model = make_model()
    for step in SCENARIO.steps[:steps]:
        model.grow(step)
    return model


def test_growth_compiles_nothing_anew(backend: Counting):
    """Steps of 3, 2 and 1 classes; the blocks of all steps are the same."""
    model = grown(1)
    learn(model, 0, compile=True)
    first = len(backend.graphs)
    assert first > 0
    for step in (1, 2):
        model.grow(SCENARIO.steps[step])
        learn(model, step, compile=True)
    assert len(backend.graphs) == first


def test_the_same_numbers(backend: Counting):
    """Including drop path, whose random numbers are drawn as without compilation."""
    plain, fast = learn(grown(1), 0), learn(grown(1), 0, compile=True)
    assert backend.graphs
    assert plain.keys() == fast.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(fast[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_nothing_of_it_is_left(backend: Counting):
    """Afterwards the model runs eager, at other sizes too; copies and names of weights are those of a plain model."""
    model = grown(1)
    before = set(model.state_dict())
    learn(model, 0, compile=True)
    count = len(backend.graphs)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 48, 16))
        freeze_copy(model)(torch.zeros(1, 3, 16, 48))
    assert len(backend.graphs) == count
    assert set(model.state_dict()) == before


def test_the_previous_model_is_compiled_too(backend: Counting):
    model = grown(2)
    previous = freeze_copy(model)
    with compiled([model, previous, None]):
        parts = [part for made in (model, previous) for part in made.compiled_parts()]
        assert len(parts) == 4
        assert all(part._compiled_call_impl is not None for part in parts)
    assert all(part._compiled_call_impl is None for part in parts)


def test_not_unless_asked_for(backend: Counting):
    learn(grown(1), 0)
    assert backend.graphs == []


def test_without_a_compiler_training_goes_on_and_says_so_once(backend: Counting, monkeypatch, capsys):
    def missing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("\nno C++ compiler found\nlong trace")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: missing)
    fast = learn(grown(1), 0, compile=True)
    monkeypatch.undo()
    assert len(backend.graphs) > 1
    said = capsys.readouterr().err
    assert said.count("train.compile") == 1
    assert "(no C++ compiler found)" in said
    for name, tensor in learn(grown(1), 0).items():
        torch.testing.assert_close(fast[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_models_name_their_parts():
    model: Any = grown(3)
    assert model.compiled_parts() == list(model.backbone.blocks)
    deep: Any = DeepLabV3(DeepLabV3.Config.model_validate({"backbone": {"name": "resnet10t"}}))
    assert deep.compiled_parts() == [getattr(deep.backbone.resnet, f"layer{i}") for i in range(1, 5)]

    class Bare(Segmenter):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 2)

    assert Bare().compiled_parts() == []


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_with_the_real_compiler(monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", Backend("inductor"))
    fast = learn(grown(1), 0, compile=True)
    assert not compiling.BACKEND.failed
    for name, tensor in learn(grown(1), 0).items():
        torch.testing.assert_close(fast[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
