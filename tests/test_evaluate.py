"""Evaluation: counts of an oracle that reads class ids off the colours, so that every matrix can be worked out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cssbench.config import EvaluateConfig, TrainConfig
from cssbench.data.base import SegDataset
from cssbench.evaluate import EvaluationDataset, Predictor, evaluate, pad_to_multiple, slide_scores, window_starts
from cssbench.evaluate import whole_scores as whole
from cssbench.metrics.confusion import confusion
from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.scenario import Scenario, from_dict

torch.set_num_threads(1)
K = 4
RULES = ("all", "foreground")
SCENE = from_dict("toy", {"dataset": "toy", "classes": K, "base": 2, "increment": 1, "order": [3, 1, 4, 2]})


class Shown(SegDataset):
    """Images whose first channel is 50 x the class id in `shown`; the truth is in `truth`. Both by stem."""

    name = "shown"
    classes = tuple("abcd")

    def __init__(self, shown: dict[str, np.ndarray], truth: dict[str, np.ndarray]):
        self.shown, self.truth = shown, truth

    def layout(self) -> str:
        return ""

    def folders(self, split: str) -> tuple[Path, Path]:
        return Path("images"), Path("labels")

    def image(self, split: str, stem: str) -> np.ndarray:
        return np.stack([self.shown[stem] * 50] + [np.zeros_like(self.shown[stem])] * 2, axis=-1)

    def label(self, split: str, stem: str) -> np.ndarray:
        return self.truth[stem]


class Scores(SegOutput):
    """Output with ready scores."""

    def __init__(self, scores: Tensor):
        super().__init__((scores.shape[-2], scores.shape[-1]))
        self.ready = scores

    @cached_property
    def scores(self) -> Tensor:
        return self.ready


class Oracle(Segmenter):
    """Score 1 for the class whose colour a pixel has, among the classes seen; 0 elsewhere. Counts its calls."""

    pixel_mean = (0.0, 0.0, 0.0)
    pixel_std = (1 / 255, 1 / 255, 1 / 255)
    multiple = 4

    def __init__(self, has_background: bool, seen: int):
        super().__init__()
        self.has_background = has_background
        self.seen = SCENE.order[:seen]
        self.calls: list[tuple[int, ...]] = []

    def grow(self, step: Any) -> None:
        raise AssertionError("evaluation must not change the model")

    def loss(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        raise AssertionError("evaluation must not compute losses")

    def forward(self, images: Tensor) -> Scores:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert images.shape[-1] % 4 == images.shape[-2] % 4 == 0
        self.calls.append(tuple(images.shape))
        ids = (images[:, 0] / 50).round()
        scores = torch.stack([(ids == c).float() for c in self.seen], dim=1)
        if self.has_background:
            scores = torch.cat([1 - scores.amax(1, keepdim=True), scores], dim=1)
        return Scores(scores)


class Mean(Oracle):
    """One class, whose score everywhere is the mean of the first channel: tells what a window contained."""

    multiple = 1

    def forward(self, images: Tensor) -> Scores:
        self.calls.append(tuple(images.shape))
        return Scores(images.mean(dim=(2, 3))[:, :1, None, None].expand(-1, 1, *images.shape[-2:]))


class OneOf:
    """What evaluation needs of Fabric, for process `rank` of `world`; the sum over processes is left to the test."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, world: int = 1):
        self.global_rank, self.world_size = rank, world

    def autocast(self) -> Any:
        return nullcontext()

    def all_reduce(self, data: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return data


def random_data(*shapes: tuple[int, int]) -> Shown:
    """What is shown and what is true differ on many pixels; the truth has void and ignored pixels."""
    rng = np.random.default_rng(0)
    shown = {f"s{i}": rng.integers(0, K + 1, shape, dtype=np.uint8) for i, shape in enumerate(shapes)}
    truth = {
        s: np.where(rng.random(m.shape) < 0.5, m, rng.choice([0, 1, 2, 3, 4, 255], m.shape)) for s, m in shown.items()
    }
    return Shown(shown, {s: m.astype(np.uint8) for s, m in truth.items()})


def view(data: Shown, model: Segmenter, **changes: Any) -> EvaluationDataset:
    config = EvaluateConfig(**{"short_side": None, "crop": 6, "background_threshold": 0.5} | changes)
    return EvaluationDataset(data, "val", list(data.shown), config, model)


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


def test_confusion_by_hand():
    truth = torch.tensor([[0, 1, 1], [2, 2, 255]])
    predicted = torch.tensor([[1, 1, 2], [2, 0, 2]])
    matrix = confusion(truth, predicted, 2)
    assert matrix.tolist() == [[0, 1, 0], [0, 1, 1], [1, 0, 1]]
    assert matrix.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_confusion_agrees_with_torchmetrics(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 151, (3, 40, 50), generator=generator)
    predicted = torch.randint(0, 151, (3, 40, 50), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
    theirs = multiclass_confusion_matrix(predicted, truth, num_classes=151, ignore_index=255)
    assert torch.equal(confusion(truth.to(dtype), predicted.to(dtype), 150), theirs)


def test_confusion_refuses_what_it_cannot_count():
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    for truth, predicted, message in (
        (torch.full((2, 2), 3), zeros, r"truth holds values outside 0\.\.2"),
        (zeros - 1, zeros, "truth holds values"),
        (zeros, torch.full((2, 2), 3), r"prediction holds values outside 0\.\.2"),
        (zeros, zeros + 255, "prediction holds values"),
        (zeros, zeros[0], "differ in shape"),
    ):
        with pytest.raises(ValueError, match=message):
            confusion(truth, predicted, 2)
    assert confusion(zeros + 255, zeros + 77, 2).sum() == 0  # what is ignored may be predicted as anything


@pytest.mark.parametrize(
    ("extent", "window", "stride", "starts"),
    [
        (512, 512, 341, [0]),
        (513, 512, 341, [0, 1]),
        (683, 512, 341, [0, 171]),
        (853, 512, 341, [0, 341]),
        (854, 512, 341, [0, 341, 342]),
        (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]),
        (10, 4, 3, [0, 3, 6]),
        (11, 4, 3, [0, 3, 6, 7]),
        (8, 4, 4, [0, 4]),
    ],
)
def test_window_starts_by_hand(extent: int, window: int, stride: int, starts: list[int]):
    assert window_starts(extent, window, stride) == starts


@given(window=st.integers(1, 40), more=st.integers(0, 200), share=st.floats(0, 1))
def test_windows_cover_every_pixel_and_stay_inside(window: int, more: int, share: float):
    stride = max(1, round(share * window))
    starts = window_starts(window + more, window, stride)
    assert {p for s in starts for p in range(s, s + window)} == set(range(window + more))
    assert starts == sorted(set(starts))


def test_pad_to_multiple_by_hand():
    image = torch.ones(1, 3, 5, 8)
    padded = pad_to_multiple(image, 4)
    assert padded.shape == (1, 3, 8, 8)
    assert torch.equal(padded[..., :5, :], image)
    assert (padded[..., 5:, :] == 0).all()
    assert torch.equal(pad_to_multiple(padded, 4), padded)


def test_one_window_that_covers_the_image_is_the_whole_image():
    model = Mean(False, 1).eval()
    image = torch.rand(3, 6, 6)
    assert torch.equal(slide_scores(model, image, 6, 4), whole(model, image))
    # A larger window sees the image and zeros below and to the right, as padding to the model's multiple does.
    model.multiple = 8
    assert torch.equal(slide_scores(model, image, 8, 4), whole(model, image))
    assert model.calls[-2:] == [(1, 3, 8, 8)] * 2


def test_windows_are_averaged_where_they_overlap():
    model = Mean(False, 1).eval()
    image = torch.arange(6.0).expand(3, 4, 6)
    scores = slide_scores(model, image, 4, 2)  # columns 0-3 with mean 1.5, 2-5 with mean 3.5
    assert scores[0].tolist() == [[1.5, 1.5, 2.5, 2.5, 3.5, 3.5]] * 4
    assert len(model.calls) == 2


def test_scores_in_half_precision_are_averaged_in_full():
    class Half(Mean):
        def forward(self, images: Tensor) -> Scores:
            return Scores(super().forward(images).scores.bfloat16())

    value = 1 + 1 / 128  # a bfloat16, whose multiples are not
    scores = slide_scores(Half(False, 1).eval(), torch.full((3, 8, 8), value), 4, 1)
    assert scores.dtype == torch.float32
    assert (scores == value).all()


def predict(model: Segmenter, scores: list[float], step: int) -> tuple[int, int]:
    found = Predictor(model, SCENE, 0.5)(torch.tensor(scores)[:, None, None], step)
    return int(found["all"]), int(found["foreground"])


@pytest.mark.parametrize(
    ("scores", "step", "classes"),
    [
        ([0.9, 0.2, 0.1, 0.1], 2, (3, 3)),  # position 1 is class 3
        ([0.2, 0.2, 0.1, 0.4], 2, (0, 2)),  # none reaches 0.5
        ([0.2, 0.5, 0.1, 0.4], 2, (1, 1)),  # the threshold itself is enough
        ([0.6, 0.7, 0.8, 0.9], 2, (2, 2)),
        ([0.6, 0.7, 0.8, 0.9], 1, (4, 4)),  # the outputs of steps 0 and 1 alone
        ([0.6, 0.7, 0.8, 0.9], 0, (1, 1)),
        ([0.2, 0.3, 0.8, 0.9], 0, (0, 1)),
    ],
)
def test_predictions_without_a_background_output(scores: list[float], step: int, classes: tuple[int, int]):
    assert predict(Oracle(False, 4), scores, step) == classes


@pytest.mark.parametrize(
    ("scores", "step", "classes"),
    [
        ([0.1, 0.2, 0.0, 0.0, 0.0], 2, (3, 3)),  # no threshold: background lost
        ([9.0, 0.2, 0.1, 0.4, 0.3], 2, (0, 4)),
        ([0.4, 0.4, 0.1, 0.0, 0.0], 2, (0, 3)),  # a tie goes to the first output, as argmax has it
        ([0.5, 0.1, 0.2, 0.3, 0.9], 2, (2, 2)),
        ([0.5, 0.1, 0.2, 0.3, 0.9], 1, (0, 4)),
        ([-5.0, -3.0, -2.0, 0.3, 0.9], 0, (1, 1)),  # logits may be negative
    ],
)
def test_predictions_with_a_background_output(scores: list[float], step: int, classes: tuple[int, int]):
    assert predict(Oracle(True, 4), scores, step) == classes


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
    from cssbench.trainer import make_fabric

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
