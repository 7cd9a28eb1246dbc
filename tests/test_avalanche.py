"""Avalanche: our loop in its strategy to the same weights, its plug-ins in our loop, its own strategies on our data."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import LINEAR, build, make_recipe, start

pytest.importorskip("avalanche")
pytestmark = [pytest.mark.usefixtures("_one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

from avalanche.training.plugins import EvaluationPlugin, EWCPlugin  # noqa: E402
from avalanche.training.supervised import Naive  # noqa: E402

from cssbench import checkpoint, config, registry, scoring  # noqa: E402
from cssbench.api import Batch, ConfigError  # noqa: E402
from cssbench.contract import build_method, method_class  # noqa: E402
from cssbench.errors import UnknownNameError  # noqa: E402
from cssbench.experiment import Experiment  # noqa: E402
from cssbench.interop.avalanche import (  # noqa: E402
    CSSStrategy,
    GrowingModel,
    MeanIoU,
    OwnLoss,
    RunLogger,
    to_avalanche,
)
from cssbench.interop.avalanche.methods import REFUSED, rows  # noqa: E402
from cssbench.interop.avalanche.model import as_logits  # noqa: E402
from cssbench.interop.avalanche.strategy import data_seed  # noqa: E402
from cssbench.interop.views import StepView  # noqa: E402
from cssbench.logs import LoggedRun, Logger, RunLog  # noqa: E402
from cssbench.protocol import get  # noqa: E402
from cssbench.results import RunFolder  # noqa: E402
from cssbench.testing import assert_conforms  # noqa: E402


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = make_recipe(tmp_path_factory.mktemp("avalanche"), LINEAR)
    made["train"] |= {"iterations": [3, 2], "batch_size": 4, "accumulate": 2}
    made["evaluate"] |= {"flops_images": 0, "geometries": ["crop"], "samples": 0}
    made["log"] = {"loggers": []}
    return made


def benchmark_of(made: Experiment) -> Any:
    seed = data_seed(made.config.seed)
    return to_avalanche(made.scenario, made.data, made.model, made.config.augment, seed=seed)


def strategy_of(made: Experiment, **more: Any) -> CSSStrategy:
    """The run of `made` as a strategy."""
    parts = {"scenario": made.scenario, "model": made.model, "method": made.method, "seed": made.config.seed}
    return CSSStrategy(**parts, optim=made.config.optim, train=made.config.train, **more)


def weights_of(folder: RunFolder, step: int, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    checkpoint.load_weights(folder.records()[step].folder / "model.safetensors", model)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", ["finetune", "mib"])
def test_a_strategy_ends_with_the_weights_and_scores_of_our_own_loop(
    method: str, recipe: dict[str, Any], tmp_path: Path
):
    folder = start(recipe, tmp_path / "run", f"method.name={method}")
    made = build(recipe, tmp_path / "other", f"method.name={method}")
    metric = MeanIoU(made.scenario, made.model)
    kept = Kept(LoggedRun(tmp_path, {}, "p", ()))
    logger = RunLogger(RunLog(kept.run, {"kept": kept}))
    strategy = strategy_of(made, evaluator=EvaluationPlugin(metric, loggers=[logger]))
    benchmark = benchmark_of(made)
    for experience in benchmark.train_stream:
        strategy.train(experience)
        t = experience.current_experience
        mine = {name: value.clone() for name, value in made.model.state_dict().items()}
        for name, value in weights_of(folder, t, made.model).items():
            assert torch.equal(mine[name], value), (t, name)
        told = strategy.eval([benchmark.test_stream[t]])
        record = folder.records()[t]
        for name, value in scoring.step_scores(folder, record, get("plop@1")).items():
            if name in ("base", "incremental", "all") and value is not None:
                assert told[f"{name}/plop@1/step{t}"] == pytest.approx(value, abs=1e-12)
                assert (f"{name}/plop@1/step{t}", pytest.approx(value)) in kept.told
        assert (metric.matrix.numpy() == record.matrices["crop.all"]).all()


class Kept(Logger):
    def __init__(self, run: LoggedRun):
        super().__init__(run)
        self.told: list[tuple[str, float]] = []

    def scalar(self, name: str, value: float, step: int, iteration: int) -> None:
        self.told.append((name, value))


def test_a_method_and_a_strategy_with_the_plug_in_end_alike(recipe: dict[str, Any], tmp_path: Path):
    """EWC in our loop, and Avalanche's plug-in in its strategy around our fine-tuning."""
    # one pass per iteration: over several, Avalanche's would be called before each
    folder = start(recipe, tmp_path / "run", "method.name=avalanche:EWC", "method.ewc_lambda=50", "train.accumulate=1")
    made = build(recipe, tmp_path / "other", "train.accumulate=1")
    strategy = strategy_of(made, plugins=[EWCPlugin(ewc_lambda=50.0)])
    benchmark = benchmark_of(made)
    for experience in benchmark.train_stream:
        experience._dataset._flat_data._datasets[0].fixed = True  # our importances see the first views
        strategy.train(experience)
    mine = {name: value.clone() for name, value in made.model.state_dict().items()}
    theirs = weights_of(folder, 1, made.model)
    plain = weights_of(start(recipe, tmp_path / "plain", "train.accumulate=1"), 1, made.model)
    assert any(not torch.equal(plain[name], value) for name, value in theirs.items()), "EWC changes something"
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-7)


def test_an_experience_has_the_images_and_labels_of_its_step(recipe: dict[str, Any], tmp_path: Path):
    made = build(recipe, tmp_path / "run")
    benchmark = benchmark_of(made)
    assert len(benchmark.train_stream) == len(benchmark.test_stream) == 2
    for experience, step in zip(benchmark.train_stream, made.scenario.steps, strict=True):
        assert len(experience.dataset) == len(made.train_stems[step.index])
        assert experience.classes_in_this_experience == list(step.new_positions)
        shown = {int(v) for image, label, task in experience.dataset for v in label.unique()}
        assert shown <= {0, 255, *step.new_positions}
        assert shown & set(step.new_positions)
        assert experience.class_images == made.class_images(step)
    first, again = (benchmark.train_stream[0].dataset[0][0] for _ in range(2))
    assert not torch.equal(first, again), "augmented anew"
    image, label, task = benchmark.test_stream[0].dataset[0]
    stem = made.evaluation.showing(made.scenario.steps[0].seen)[0]
    assert torch.equal(label, torch.from_numpy(made.data.label("val", stem)).long()), "every class, native order"
    assert (image.shape, task) == ((3, 32, 32), 0)


def test_a_strategy_of_avalanche_learns_a_scenario(recipe: dict[str, Any], tmp_path: Path):
    made = build(recipe, tmp_path / "run")
    benchmark = benchmark_of(made)
    model = GrowingModel(made.model, made.scenario)
    metric = MeanIoU(made.scenario, made.model, "mib@1")
    naive = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=OwnLoss(made.model),
        train_mb_size=4,
        eval_mb_size=3,
        plugins=[EWCPlugin(1.0)],
        evaluator=EvaluationPlugin(metric, loggers=[RunLogger(RunLog(LoggedRun(tmp_path, {}, "p", ())))]),
    )
    naive.train(benchmark.train_stream[0])
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    early = naive.eval([benchmark.test_stream[0], benchmark.test_stream[1]])  # the second shows classes to come
    assert 0 < early["all/mib@1/step0"] < 1
    naive.train(benchmark.train_stream[1])
    assert [len(made.model.heads), any(p.grad is not None for p in made.model.heads[1].parameters())] == [2, True]
    assert not torch.equal(made.model.state_dict()["heads.0.weight"], before["heads.0.weight"])
    assert "incremental/mib@1/step1" in naive.eval([benchmark.test_stream[1]])
    with pytest.raises(ConfigError, match="reads full images"):
        MeanIoU(made.scenario, made.model, "mmseg150@1")


def test_steps_come_in_order_and_settings_that_do_not_exist_are_refused(recipe: dict[str, Any], tmp_path: Path):
    made = build(recipe, tmp_path / "run")
    with pytest.raises(ConfigError, match="the next one is 0, not 1"):
        strategy_of(made).train(benchmark_of(made).train_stream[1])
    made = build(recipe, tmp_path / "run", "train.precision=bf16-mixed")
    with pytest.raises(ConfigError, match="in full precision"):
        strategy_of(made)


# --- plug-ins in our loop ---------------------------------------------------------------------------------------------


def make(name: str, **options: Any) -> Any:
    return build_method(config.PartChoice(name=f"avalanche:{name}", **options))


def in_step(recipe: dict[str, Any], folder: Path, method: Any, step: int = 1) -> tuple[Any, Any]:
    """(context, experiment) of a step, the model grown up to it, the previous one as it was."""
    from cssbench.logs import StepLog
    from cssbench.models.segmenter import freeze_copy
    from cssbench.task_loop import _context

    made = build(recipe, folder, method=method)
    previous = None
    for one in made.scenario.steps[: step + 1]:
        previous = freeze_copy(made.model) if one.index else None
        torch.manual_seed(one.index)
        made.model.grow(one)
    log = StepLog(folder, step, enabled=False)
    return _context(made, made.scenario.steps[step], previous, 2, log, 0)[0], made


def a_batch(ctx: Any) -> Batch:
    loaded = next(iter(ctx.train_loader))
    with torch.no_grad():
        old = ctx.previous(loaded["images"]) if ctx.previous else None
    return Batch(loaded["images"], loaded["labels"], ctx.model(loaded["images"]), old, loaded["names"])


def test_ewc_is_the_weighted_distance_to_the_old_weights(recipe: dict[str, Any], tmp_path: Path):
    method = make("EWC", ewc_lambda=3.0)
    ctx, made = in_step(recipe, tmp_path, method, step=0)
    method.start_step(ctx)
    assert set(method.loss(ctx, a_batch(ctx))) == {"ce"}, "nothing is old at step 0"
    method.end_step(ctx)
    importance = {name: torch.zeros_like(p) for name, p in made.model.named_parameters()}
    view = StepView(ctx.train_loader.dataset, fixed=True)
    size = made.config.train.batch_size // made.config.train.accumulate
    batches = [range(i, min(i + size, len(view))) for i in range(0, len(view), size)]
    made.model.eval()
    for batch in batches:
        items = [view[i] for i in batch]
        images, labels = torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])
        made.model.zero_grad()
        made.model.loss(made.model(images), labels)["ce"].backward()
        for name, p in made.model.named_parameters():
            importance[name] += p.grad**2 / len(batches) if p.grad is not None else 0
    old = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.model.train()
    made.model.grow(made.scenario.steps[1])
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    later, _ = in_step(recipe, tmp_path, method)
    later.model = made.model
    method.start_step(later)
    terms = method.loss(later, a_batch(later))
    wanted = sum(3 * (importance[n] * (p - old[n]) ** 2).sum() for n, p in made.model.named_parameters() if n in old)
    torch.testing.assert_close(terms["penalty"], wanted, rtol=1e-4, atol=1e-6)
    found = torch.autograd.grad(terms["penalty"], made.model.heads[0].weight)[0]
    name = "heads.0.weight"
    torch.testing.assert_close(found, 6 * importance[name] * (made.model.heads[0].weight - old[name]).detach())


def test_lwf_is_the_divergence_of_softened_old_outputs_per_pixel(recipe: dict[str, Any], tmp_path: Path):
    method = make("LwF", alpha=[0.0, 5.0], temperature=3.0)
    ctx, _ = in_step(recipe, tmp_path, method)
    method.start_step(ctx)
    batch = a_batch(ctx)
    found = method.loss(ctx, batch)["penalty"]
    old = 1 + len(ctx.step.old)
    assert batch.previous is not None
    new, before = (x.pixel_logits[:, :old] / 3 for x in (batch.output, batch.previous))
    divergence = (before.softmax(1) * (before.log_softmax(1) - new.log_softmax(1))).sum(1)
    torch.testing.assert_close(found, 5 * divergence.mean())
    assert rows(torch.arange(24).reshape(1, 2, 3, 4)).tolist()[:2] == [[0, 12], [1, 13]]
    with pytest.raises(ConfigError, match=r"lists 1 values, the scenario has 2 steps"):
        make("LwF", alpha=[1.0]).start_step(ctx)


def test_replay_learns_from_kept_images_with_the_labels_of_their_step(recipe: dict[str, Any], tmp_path: Path):
    method = make("Replay", mem_size=3, batch_size_mem=2)
    assert method.memory == 3
    ctx, made = in_step(recipe, tmp_path, method, step=0)
    method.start_step(ctx)
    torch.manual_seed(0)
    assert set(method.loss(ctx, a_batch(ctx))) == {"ce"}
    method.end_step(ctx)
    state = method.state_dict()
    assert [len(state["images"]), len(state["labels"])] == [3, 3]
    for image, label, number in zip(state["images"], state["labels"], state["numbers"][0], strict=True):
        stem = made.train_stems[0][number]
        assert torch.equal(image, torch.from_numpy(made.data.image("train", stem).copy()))
        truth = torch.from_numpy(made.data.label("train", stem).copy())
        assert torch.equal(label, truth.where(truth <= 4, 0)), "classes 1..4 are new at step 0"
    ctx, made = in_step(recipe, tmp_path, method)
    method.start_step(ctx)
    batch = a_batch(ctx)
    terms = method.loss(ctx, batch)
    plain = made.model.loss(batch.output, batch.labels)["ce"]
    torch.testing.assert_close(terms["ce"], plain * 2 / 4)  # 2 images of the step, 2 of the memory
    assert 0 < float(terms["memory_ce"].detach()) < 5
    method.end_step(ctx)
    assert [len(n) for n in method.state_dict()["numbers"]] == [2, 1], "shared out among the steps"


def test_the_memory_of_replay_stands_in_the_provenance(recipe: dict[str, Any], tmp_path: Path):
    folder = start(recipe, tmp_path / "run", "method.name=avalanche:Replay", "method.mem_size=5")
    assert folder.provenance["memory"] == 5
    assert folder.provenance["parts"]["method"]["distribution"] == "cssbench"
    assert RunFolder.read(tmp_path / "run").config.method.name == "avalanche:Replay"


def test_logits_carry_the_whole_output(recipe: dict[str, Any], tmp_path: Path):
    ctx, _ = in_step(recipe, tmp_path, make("MAS"))
    batch = a_batch(ctx)
    logits = as_logits(ctx.model, batch.output)
    assert torch.equal(logits, batch.output.logits)
    future = batch.labels.clone()
    future[:] = 7  # learned by no step yet
    half = batch.labels.clone()
    half[0] = 7
    ignored = batch.labels.clone()
    ignored[0] = 255
    loss = OwnLoss(ctx.model)
    assert torch.equal(loss(logits, half), loss(logits, ignored))
    assert float(loss(logits, future).detach()) == 0


def test_ewc_keeps_the_rules_of_the_benchmark():
    assert_conforms(method_class("avalanche:EWC"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit-linear", "segvit"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EWC", {"mode": "online", "decay_factor": 0.5}),
        ("SI", {}),
        ("MAS", {}),
        ("LwF", {}),
        ("RWalk", {"delta_t": 2}),
        ("Replay", {"mem_size": 7}),
        ("Replay", {"mem_size": 5, "storage": "reservoir", "batch_size_mem": 2}),
    ],
)
def test_all_plug_ins_keep_the_rules_of_the_benchmark(name: str, options: dict[str, Any], model: str):
    assert_conforms(method_class(f"avalanche:{name}"), options, model)


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"unknown key 'ewc_lamda' \(did you mean 'ewc_lambda'\?\)"):
        make("EWC", ewc_lamda=1.0)
    with pytest.raises(ConfigError, match=r"takes method.decay_factor with method.mode = 'online'"):
        make("EWC", mode="online")
    with pytest.raises(ConfigError, match="storage"):
        make("Replay", storage="class")


def test_what_cannot_work_is_refused_with_a_reason():
    with pytest.raises(UnknownNameError, match=r"no method named 'avalanche:EWCC'.*'avalanche:EWC'"):
        method_class("avalanche:EWCC")
    with pytest.raises(UnknownNameError, match="no namespace named 'avalanch'"):
        method_class("avalanch:EWC")
    for name in REFUSED:
        with pytest.raises(ConfigError, match=f"avalanche:{name} cannot run on segmentation: it "):
            method_class(f"avalanche:{name}")


def test_extras_are_imported_only_when_asked_for_and_named_where_they_are_missing():
    code = (
        "import sys; import cssbench.api, cssbench.cli, cssbench.task_loop, cssbench.loggers\n"
        "import cssbench.interop.views, cssbench.interop.methods\n"
        "from cssbench import registry\n"
        "assert registry.find('methods', 'avalanche:EWC').distribution == 'cssbench'\n"
        "heavy = {'avalanche', 'continuum', 'wandb', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from cssbench.logs import logger_class\n"
        "def refuses(make, extra):\n"
        "    try: make()\n"
        "    except cssbench.api.ConfigError as error: assert f'cssbench[{extra}]' in str(error), error\n"
        "    else: raise AssertionError(extra)\n"
        "sys.modules |= dict.fromkeys(['avalanche', 'continuum', 'wandb', 'mlflow'])\n"
        "refuses(lambda: registry.load('methods', 'avalanche:EWC'), 'avalanche')\n"
        "refuses(lambda: __import__('cssbench.interop.continuum'), 'continuum')\n"
        "for name in ('wandb', 'mlflow'): refuses(lambda: logger_class(name), name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_namespace_is_listed_and_its_methods_are_checked_by_name(command: Any):
    assert "avalanche:NAME" in command("list", "methods")[1]
    code, _, said = command("check", "avalanche:GDumb")
    assert code == 2
    assert "avalanche:GDumb cannot run on segmentation: it balances its memory by the one class" in said


def test_a_namespace_that_fails_is_named(install: Any):
    files = {"space.py": "def make(member):\n    raise KeyError(member)\n"}
    install("space-pack", {"namespaces": {"space": "space:make"}}, files)
    with pytest.raises(Exception, match=r"method 'space:Any' of the distribution 'space-pack' cannot be made"):
        registry.load("methods", "space:Any")


def test_the_example_runs_and_stands_in_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    example = Path(__file__).parents[1] / "examples" / "avalanche_ewc.py"
    assert example.read_text().rstrip() in (example.parents[1] / "docs" / "interop.md").read_text()
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example))
    assert "all/plop@1/step2" in capsys.readouterr().out
