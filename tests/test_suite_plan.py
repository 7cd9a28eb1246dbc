"""The account of a suite: what is trained once, in which order, and what it is estimated to cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fabricated import fabricate
from tiny_runs import LINEAR, make_recipe

from cssbench.errors import ConfigError
from cssbench.suites import estimate, plan, spec
from cssbench.suites.folder import Entry

Command = Callable[..., tuple[int, str, str]]


def planned(index: Path | None = None, **changes: Any) -> list[plan.Planned]:
    content: dict[str, Any] = {
        "recipe": "camvid-6-1-finetune-linear",
        "methods": ["finetune", "mib"],
        "scenarios": ["camvid-6-1", "camvid-6-5"],
        "set": {"train": {"iterations": [100, 10]}},
    }
    return plan.plan(spec.runs(spec.parse(content | changes, "test"), "test"), index)


def entry(name: str, base: str, *iterations: int) -> Entry:
    return Entry(name, "m", "s", "model", 0, "native", False, base, iterations, 1)


def test_the_account_by_hand():
    # 6-1 trains 100 + 5 x 10, 6-5 trains 100 + 10, both twice; all four have the same base step.
    found = plan.account(planned())
    assert (found.runs, found.separate, found.suite) == (4, 2 * (150 + 110), 100 + 2 * (50 + 10))
    assert found.share == 220 / 520


@pytest.mark.parametrize(
    ("changes", "bases"),
    [
        ({}, 1),
        ({"seeds": [0, 1]}, 2),
        ({"orders": ["native", 3]}, 2),  # other base classes
        ({"method": {"mib": {"set": {"optim": {"lr": 0.5}}}}}, 2),
        ({"method": {"mib": {"set": {"optim": {"later_lr": 0.5}}}}}, 1),  # matters at later steps only
        ({"scenario": {"camvid-6-5": {"set": {"train": {"iterations": [101, 10]}}}}}, 2),
        ({"scenario": {"camvid-6-5": {"set": {"scenario": {"mode": "disjoint"}}}}}, 2),  # other images
        ({"scenario": {"camvid-6-5": {"set": {"data": {"holdout": 0.1}}}}}, 2),
        ({"oracle": {}}, 2),
    ],
)
def test_what_shares_a_base_step(changes: dict[str, Any], bases: int):
    assert len({one.base for one in planned(**changes)}) == bases


def test_runs_of_a_method_that_trains_its_base_step_otherwise_do_not_share_it(install: Any):
    from cssbench import registry

    code = (
        "from cssbench.api import Method\n"
        "class Own(Method):\n"
        "    def loss(self, ctx, batch):\n"
        "        return ctx.model.loss(batch.output, batch.labels)\n"
    )
    install("own-pack", {"methods": {"own": "own_pack_module:Own"}}, files={"own_pack_module.py": code})
    assert "own" in registry.parts("methods")
    found = planned(methods=["finetune", "own"])
    assert [one.run.method for one in found] == ["finetune", "finetune", "own", "own"]
    assert len({one.base for one in found}) == 3  # its later steps may matter to it: one per scenario


def test_four_methods_on_the_scenarios_of_ade20k_train_at_most_half(shared_data: Path):
    index = shared_data / "ade20k_index" / "train_cls.txt"
    for name in ("ade20k-vit-linear", "ade20k-segvit"):
        runs = [run for run in spec.runs(spec.read_suite(name), name) if not run.oracle]
        found = plan.account(plan.plan(runs, index))
        assert found.runs == 16
        # Images of each step from docs/data.md's index: 20192 of 100 base classes and 20177 of 50; 127 and 60 epochs.
        assert found.separate == 3477864
        assert found.suite == found.separate - (4 * 3 - 1) * 160274 - 3 * 160155
        assert found.share <= 0.5


def test_the_shortest_run_trains_the_base_step_and_sharers_come_last():
    entries = [
        entry("long", "a", 9, 1, 1),
        entry("alone", "b", 50),
        entry("short", "a", 9, 1),
        entry("also", "a", 9, 3),
    ]
    assert plan.makers(entries) == {"long": "short", "also": "short", "short": "short", "alone": "alone"}
    assert [one.id for one in plan.in_order(entries)] == ["short", "alone", "long", "also"]


def test_epochs_need_images():
    with pytest.raises(ConfigError, match="--index"):
        planned(set={"train": {"iterations": "none", "epochs": 2}})


def test_epochs_by_class_lists(tmp_path: Path):
    lists = tmp_path / "lists.txt"  # 0-based: classes 1-6 are the base; three images show one of them, two a later one
    lists.write_text("a 0\nb 1 6\nc 5\nd 7 8 9 10\n" + "".join(f"e{i} 6 7 8 9 10\n" for i in range(4)))
    settings = {"train": {"iterations": "none", "epochs": [4, 2], "batch_size": 2}}
    (one,) = planned(lists, set=settings, methods=["mib"], scenarios=["camvid-6-5"])
    assert one.images == (3, 6)
    assert one.iterations == (6, 6)  # 4 x 3 / 2, 2 x 6 / 2


def test_options_of_a_method_are_checked_before_anything_runs():
    with pytest.raises(ConfigError, match="wieght"):
        planned(method={"mib": {"set": {"method": {"wieght": 3}}}})


def test_seconds_from_finished_runs(tmp_path: Path):
    (one,) = planned(methods=["mib"], scenarios=["camvid-6-5"])
    config = estimate.resolved(one)
    run = fabricate(tmp_path / "there", numbers={"seconds": {"train": 10.0, "evaluate": 2.0}})
    config_text = config.model_copy(update={"scenario": run.config.scenario}).to_toml()
    (run.path / "config.toml").write_text(config_text)
    rates = estimate.from_runs([tmp_path / "nothing", run.path])
    # Each step of it took 10 s for 5 iterations, and 2 s of evaluation.
    assert rates.seconds(one, False) == pytest.approx(110 * 2 + 2 * 2)
    assert rates.seconds(one, True) == pytest.approx(10 * 2 + 2)
    assert "1 run that is there" in rates.source
    (other,) = planned(methods=["finetune"], scenarios=["camvid-6-5"])
    assert rates.seconds(other, False) is None  # its later steps are of another kind


def test_seconds_from_the_machines_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = tmp_path / "box-throughput.csv"
    table.write_text(
        "mode,matmul_peak_tflops,of_matmul_peak,machine\ntraining,2.0,10 %,box\ntraining,1.0,5 %,box\n"
        "inference,2.0,90 %,box\n"
    )
    monkeypatch.setattr(estimate, "_gflops", lambda one, config: 5.0)
    (one,) = planned(methods=["mib"], scenarios=["camvid-6-5"])
    rates = estimate.from_bench([one], table)
    # 5e9 multiply-adds x 2 x 8 images x 3 passes (4 with the previous model) at 0.2 TFLOP/s
    assert rates.seconds(one, False) == pytest.approx(100 * 1.2 + 10 * 1.6)
    with pytest.raises(ConfigError, match="throughput"):
        estimate.from_bench([one], Path(__file__))


def test_disk_is_the_weights_after_each_step():
    few = planned(methods=["mib"], set={"train": {"iterations": 1}, "model": {"backbone": {"width": 32}}})
    runs, store = estimate.disk(few)
    long, short = (runs[f"mib_{name}_vit-linear_s0"] for name in ("camvid-6-1", "camvid-6-5"))
    # Heads grow with the classes seen, the encoder does not: 6-1 keeps 6 checkpoints of 6 to 11 classes, 6-5 two.
    last = short - store
    assert store < last < 1.2 * store
    assert long == pytest.approx(6 * (store + last) / 2, rel=0.02)


def test_the_plan_as_a_table_and_as_json(command: Command, tmp_path: Path):
    suite = tmp_path / "small.toml"
    suite.write_text(
        'recipe = "camvid-6-1-finetune-linear"\nmethods = ["finetune", "mib"]\nscenarios = ["camvid-6-5"]\n'
        "[set.train]\niterations = [100, 10]\n[oracle]\n"
    )
    code, printed, _ = command("suite", "plan", suite, "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["account"]["all"] == {"runs": 3, "separate": 320, "suite": 220, "share": 0.6875}
    assert found["account"]["without oracles"]["suite"] == 120
    assert found["runs"][1]["base_step_of"] == "finetune_camvid-6-5_vit-linear_s0"
    assert found["hours"] is None
    code, printed, _ = command("suite", "plan", suite)
    assert "320 iterations one by one, 220 with shared base steps (68.8 %)" in printed
    assert "of 1" in printed
    code, _, error = command("suite", "plan", suite, "--measure", "--out", tmp_path)
    assert code == 2
    assert "one source" in error


def test_a_measurement_runs_real_iterations(tmp_path: Path):
    recipe = make_recipe(tmp_path, LINEAR)
    scene = recipe.pop("scenario")["name"]
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(recipe | {"scenario": {"name": scene}}))
    content = {"recipe": str(tmp_path / "tiny.toml"), "methods": ["mib", "finetune"], "scenarios": [scene]}
    found = plan.plan(spec.runs(spec.parse(content, "test"), "test"), has_data=True)
    rates = estimate.measure(found)
    assert len(rates.train) == 3  # one base step for both, and a later one of each
    assert all(0 < (rates.seconds(one, False) or 0) < 600 for one in found)
