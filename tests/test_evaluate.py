"""Evaluation: counts of an oracle that reads class ids off the colours, so that every matrix can be worked out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import SCENE, K, Mean, OneOf, Oracle, Shown, view

from cssbench.config import EvaluateConfig, TrainConfig
from cssbench.evaluate import EvaluationDataset, evaluate
from cssbench.scenario import Scenario, from_dict

RULES = ("all", "foreground")


def random_data(*shapes: tuple[int, int]) -> Shown:
    """What is shown and what is true differ on many pixels; the truth has void and ignored pixels."""
    rng = np.random.default_rng(0)
    shown = {f"s{i}": rng.integers(0, K + 1, shape, dtype=np.uint8) for i, shape in enumerate(shapes)}
    truth = {
        s: np.where(rng.random(m.shape) < 0.5, m, rng.choice([0, 1, 2, 3, 4, 255], m.shape)) for s, m in shown.items()
    }
    return Shown(shown, {s: m.astype(np.uint8) for s, m in truth.items()})


def expected(shown: np.ndarray, truth: np.ndarray, seen: tuple[int, ...], rule: str) -> np.ndarray:
    """Pixel by pixel, from the words of the rules."""
    matrix = np.zeros((K + 1, K + 1), np.int64)
    for colour, true in zip(shown.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if true != 255:
            # an unknown colour scores 0 for every class: background, or the first output where there is none
            unknown = 0 if rule == "all" else SCENE.order[0]
            matrix[true, colour if colour in seen else unknown] += 1
    return matrix


def same(found: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert found.keys() == other.keys()
    for key, matrix in found.items():
        np.testing.assert_array_equal(matrix, other[key], err_msg=key)


SHAPES = ((6, 9), (9, 6), (6, 6), (7, 13))


def centre(array: np.ndarray, side: int = 6) -> np.ndarray:
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


@pytest.mark.parametrize("inference", ["whole", "slide"])
@pytest.mark.parametrize("has_background", [True, False])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_matrices_of_an_oracle(step: int, has_background: bool, inference: str):
    """Both geometries, both rules, an order that is not the native one, odd sizes: count by count."""
    data = random_data(*SHAPES[:3])  # short side 6: neither geometry resizes
    seen = SCENE.steps[step].seen
    model = Oracle(has_background, len(seen))
    found, _ = evaluate(
        OneOf(), model, view(data, model, inference=inference, window=4, stride=3), SCENE, SCENE.steps[step]
    )
    wanted = {
        f"{geometry}.{rule}": sum(
            expected(cut(data.shown[s]), cut(data.truth[s]), seen, rule) for s in data.shown
        )
        for geometry, cut in (("full", lambda a: a), ("crop", centre))
        for rule in RULES
    }  # fmt: skip
    assert all(matrix.dtype == np.int64 for matrix in found.values())
    same(found, wanted)


@pytest.mark.parametrize("has_background", [True, False])
def test_old_outputs_alone_after_the_last_step(has_background: bool):
    """`upto<t>` is what a model with the classes of steps 0..t predicts, over the images of step t."""
    data, last = random_data(*SHAPES), SCENE.steps[-1]
    model = Oracle(has_background, K)
    alone = [frozenset({"s0", "s3"}), frozenset({"s0", "s1", "s2"})]
    found, _ = evaluate(OneOf(), model, view(data, model), SCENE, last, alone=alone)
    plain = {f"{geometry}.{rule}" for geometry in ("full", "crop") for rule in RULES}
    assert found.keys() == plain | {f"{key}.upto{t}" for key in plain for t in (0, 1)}
    for t, stems in enumerate(alone):
        young = Oracle(has_background, len(SCENE.steps[t].seen))
        part = Shown({s: data.shown[s] for s in sorted(stems)}, data.truth)
        then, _ = evaluate(OneOf(), young, view(part, young), SCENE, SCENE.steps[t])
        same({key: found[f"{key}.upto{t}"] for key in plain}, then)


def test_resized_geometries_count_the_label_at_its_own_size():
    """Images of one colour survive any resampling: `full` counts stored pixels, `crop` those of the square."""
    shapes = {"a": (5, 9), "b": (16, 8), "c": (3, 3)}
    colours = {"a": 1, "b": 3, "c": 2}
    maps = {s: np.full(shape, colours[s], np.uint8) for s, shape in shapes.items()}
    model = Oracle(True, K)
    found, _ = evaluate(
        OneOf(), model, view(Shown(maps, maps), model, short_side=8, long_side=10, crop=7), SCENE, SCENE.steps[-1]
    )
    assert found["full.all"].diagonal().tolist() == [0, 45, 9, 128, 0]
    assert found["crop.all"].diagonal().tolist() == [0, 49, 49, 49, 0]
    assert all(matrix.sum() == matrix.trace() for matrix in found.values())
    # `full`: a is 6 x 10 (the long side rules), b 10 x 5, c 8 x 8; `crop`: 7 x 7; all padded to multiples of 4
    assert Counter(call[-2:] for call in model.calls) == Counter([(8, 12), (8, 8), (12, 8), (8, 8), (8, 8), (8, 8)])


def test_equal_inputs_run_once_per_kind_of_inference():
    data = random_data((6, 6))
    model = Oracle(True, K)
    evaluate(OneOf(), model, view(data, model), SCENE, SCENE.steps[-1])
    assert len(model.calls) == 1
    model.calls.clear()
    evaluate(OneOf(), model, view(data, model, inference="slide", window=4, stride=2), SCENE, SCENE.steps[-1])
    assert len(model.calls) == 4 + 1


def test_the_crop_does_not_depend_on_how_full_images_are_read():
    """A square image gives both geometries the same input; only `full` is cut into windows."""
    shown = np.array([[4, 4, 0, 0]] * 4, np.uint8)
    data = Shown({"a": shown}, {"a": np.full((4, 4), 3, np.uint8)})

    def crop(**changes: Any) -> np.ndarray:
        model = Mean(False, 1)
        scene = from_dict("one", {"dataset": "toy", "classes": K, "base": K})
        made = view(data, model, crop=4, background_threshold=90.0, **changes)
        return evaluate(OneOf(), model, made, scene, scene.steps[0])[0]["crop.all"]

    both = crop(inference="slide", window=2, stride=2)
    np.testing.assert_array_equal(both, crop(inference="slide", window=2, stride=2, geometries=["crop"]))
    np.testing.assert_array_equal(both, crop())
    assert both[3, 1] == 16  # the mean over the whole, 100, is above 90; over the right windows it is 0


@pytest.mark.parametrize("geometries", [["full", "crop"], ["crop", "full"], ["crop"]])
def test_samples_are_foreground_predictions_of_the_full_image(geometries: list[str]):
    data = random_data(*SHAPES)
    model = Oracle(True, K)
    made = view(data, model, geometries=geometries, short_side=6)
    _, samples = evaluate(OneOf(), model, made, SCENE, SCENE.steps[-1], keep=frozenset({"s1", "s2", "none"}))
    assert samples.keys() == {"s1", "s2"}
    for stem, ids in samples.items():
        shown = data.shown[stem] if "full" in geometries else centre(data.shown[stem])
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, np.where(shown == 0, SCENE.order[0], shown))
        image, truth = made.picture(stem)
        np.testing.assert_array_equal(image[..., 0], 50 * shown)
        np.testing.assert_array_equal(truth, data.truth[stem] if "full" in geometries else centre(data.truth[stem]))


def test_the_model_is_left_in_its_mode_and_images_are_reported():
    data, seen = random_data(*SHAPES), []
    model = Oracle(True, K).train()
    evaluate(OneOf(), model, view(data, model), SCENE, SCENE.steps[-1], on_image=lambda: seen.append(1))
    assert model.training
    assert len(seen) == len(SHAPES)
    evaluate(OneOf(), model.eval(), view(data, model), SCENE, SCENE.steps[-1])
    assert not model.training


def test_holdout_reads_the_training_files():
    class Asked(Shown):
        def label(self, split: str, stem: str) -> np.ndarray:
            assert split == "train"
            return super().label(split, stem)

    data = random_data((6, 6))
    made = EvaluationDataset(Asked(data.shown, data.truth), "holdout", ["s0"], EvaluateConfig(), Oracle(True, K))
    assert made[0][0] == "s0"


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_add_up_to_one(world: int):
    """Also with more processes than images: every process must bring every matrix, or the sum would wait for ever."""
    data, last = random_data(*SHAPES), SCENE.steps[-1]

    def run(rank: int, world: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        model = Oracle(False, K)
        alone = [frozenset({"s0"}), frozenset({"s3"})]
        return evaluate(OneOf(rank, world), model, view(data, model), SCENE, last, keep=frozenset({"s3"}), alone=alone)

    whole, samples = run(0, 1)
    parts = [run(rank, world) for rank in range(world)]
    same({key: sum(part[key] for part, _ in parts) for key in parts[0][0]}, whole)
    assert all(part.keys() == whole.keys() for part, _ in parts)
    kept = [part for _, part in parts if part]
    assert len(kept) == 1  # by the process that has the image
    same(kept[0], samples)


def test_matrices_do_not_depend_on_the_workers():
    data = random_data(*SHAPES)
    model = Oracle(True, K)
    alone = evaluate(OneOf(), model, view(data, model), SCENE, SCENE.steps[-1])[0]
    same(alone, evaluate(OneOf(), model, view(data, model), SCENE, SCENE.steps[-1], workers=1)[0])


def on_processes(out: str, world: int) -> None:
    """Run by torchrun below: the real sum of Fabric, over gloo."""
    from cssbench.engine import make_fabric

    fabric = make_fabric(TrainConfig(iterations=1, accelerator="cpu", devices=world))
    assert fabric.world_size == world
    data = random_data(*SHAPES[:3])
    model = Oracle(True, K)
    found, _ = evaluate(fabric, model, view(data, model), SCENE, SCENE.steps[-1])
    if fabric.is_global_zero:
        np.savez(out, **found)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_real_processes_give_the_matrices_of_one(tmp_path: Path, world: int):
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_evaluate\ntest_evaluate.on_processes({str(tmp_path / 'out.npz')!r}, {world})\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        str(script),
    ]
    run = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    data = random_data(*SHAPES[:3])
    model = Oracle(True, K)
    with np.load(tmp_path / "out.npz") as found:
        same(dict(found), evaluate(OneOf(), model, view(data, model), SCENE, SCENE.steps[-1])[0])


def test_the_class_order_is_not_the_native_one():
    """What the tests above rely on."""
    scene: Scenario = SCENE
    assert [step.seen for step in scene.steps] == [(3, 1), (3, 1, 4), (3, 1, 4, 2)]
