"""Scores a few classes at a time against all of them at once: the same bits, the same predictions, less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import SCENE, K, OneOf, Oracle, Scores, Shown, view
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cssbench import config, evaluate, registry
from cssbench.models.pieces import pieces
from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.models.segvit import MaskOutput
from cssbench.predict import Predictor, RunningBest, SlideScores, WholeScores, resized
from cssbench.scenario import Scenario, from_dict
from cssbench.testing.rig import TINY

WIDE = from_dict(
    "wide", {"dataset": "toy", "classes": 41, "base": 21, "increment": [15, 4, 1], "order": list(range(41, 0, -1))}
)
HEAD = TINY["segvit"]["head"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY},
    "segvit v1": ("segvit", {"head": HEAD | {"version": "v1"}}),
    "segvit, background query": ("segvit", {"background_query": True}),
    "segvit, cross-entropy": ("segvit", {"loss": "ce"}),
    "segvit, cross-entropy of scores": ("segvit", {"loss": "ce", "ce": {"logits": "scores"}}),
    "dtop, logits": ("dtop", {"upsample": "logits"}),
    "dtop, own": ("dtop", {"assembly": "own"}),
    "dtop, fcn": ("dtop", {"auxiliary": "fcn", "fcn_width": 8}),
}


@cache
def make(name: str, scene: Scenario = WIDE) -> Segmenter:
    """A model of the conformance kit, grown through a scenario, whose scores differ from place to place."""
    part, options = MODELS[name]
    cls = registry.load("models", part)
    torch.manual_seed(0)
    model = cls(config.part_config("model", config.PartChoice(name=part, **(TINY[part] | options)), cls.Config))
    for step in scene.steps:
        model.grow(step)
    for head in model.heads:
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def picture(height: int, width: int) -> Tensor:
    """(3, H, W) of blocks, so that neighbouring patches differ."""
    generator = torch.Generator().manual_seed(height * width)
    return F.interpolate(torch.randn(1, 3, height // 8 + 1, width // 8 + 1, generator=generator), (height, width))[0]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def all_at_once(model: Segmenter, image: Tensor) -> Tensor:
    """(C, H, W): the output's own `scores`."""
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (0, -width % model.multiple, 0, -height % model.multiple))
    return model(padded).scores[0, :, :height, :width].float()


def mean_over_windows(model: Segmenter, image: Tensor, window: int, tops: list[int], lefts: list[int]) -> Tensor:
    total, count = 0.0, torch.zeros(image.shape[-2:])
    for top in tops:
        for left in lefts:
            scores = all_at_once(model, image[:, top : top + window, left : left + window])
            far = image.shape[-1] - left - window, image.shape[-2] - top - window
            total = total + F.pad(scores, (left, far[0], top, far[1]))
            count[top : top + window, left : left + window] += 1
    return total / count


def predicted(scores: np.ndarray, end: int, background: bool, threshold: float, scene: Scenario) -> dict[str, Any]:
    """From the words of the rules: argmax over classes; background where its own score, or else none, is enough."""
    classes = scores[1:] if background else scores
    classes = classes[:end]
    ids = np.array(scene.order)[classes.argmax(0)]
    none = scores[0] >= classes.max(0) if background else classes.max(0) < threshold
    return {"all": np.where(none, 0, ids), "foreground": ids}


def same(found: dict[int, dict[str, Tensor]], scores: Tensor, background: bool, scene: Scenario, limit: float) -> None:
    for step in scene.steps:
        wanted = predicted(scores.numpy(), len(step.seen), background, limit, scene)
        for rule, ids in wanted.items():
            np.testing.assert_array_equal(found[step.index][rule].numpy(), ids, err_msg=f"{step.index} {rule}")


@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_the_scores_bit_for_bit(name: str):
    """Of every kind of output, at sizes at which PyTorch's kernels differ, one and two images."""
    model = make(name)
    for size in ((40, 40), (72, 88), (128, 40)):
        for batch in (1, 2):
            images = torch.stack([picture(*size), picture(*size).flip(-1)])[:batch]
            output = model(images)
            for most in (1, 16, 20, 1000):
                assert torch.equal(torch.cat(list(output.score_chunks(most)), dim=1), output.scores), (size, most)


@pytest.mark.parametrize("last", [False, True])
def test_a_piece_resized_is_a_piece_of_the_whole(last: bool):
    """PyTorch's own arithmetic, which `pieces` relies on: any number of channels, up and down, small and large."""
    generator = torch.Generator().manual_seed(0)
    for channels in range(1, 54):
        maps = torch.randn(1, channels, 7, 9, generator=generator)
        maps = maps.contiguous(memory_format=torch.channels_last) if last else maps
        for first, second in (((56, 72), (40, 30)), ((56, 100), (97, 60))):
            resize = partial(F.interpolate, mode="bilinear", align_corners=False)
            whole = resize(maps, first)
            parts = [resize(piece, first) for piece in pieces(maps, 16)]
            assert torch.equal(torch.cat(parts, 1), whole)
            cut = torch.cat([resize(part[..., :-3, :-1], second) for part in parts], 1)
            assert torch.equal(cut, resize(whole[..., :-3, :-1], second))


@given(channels=st.integers(1, 200), most=st.integers(1, 100))
def test_pieces_are_few_and_never_thin(channels: int, most: int):
    sizes = [piece.shape[1] for piece in pieces(torch.zeros(1, channels, 1, 1), most)]
    assert sum(sizes) == channels
    assert all(size % 16 == 0 for size in sizes[:-1])
    assert max(sizes) <= 16 * ((most + 15) // 16) + 3
    assert len(sizes) == 1 or min(sizes) >= 4


VIEWS = [((72, 88), (72, 88)), ((70, 83), (70, 83)), ((70, 83), (61, 150)), ((72, 88), (131, 97))]


@pytest.mark.parametrize(("size", "label"), VIEWS)
@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_the_argmax_over_all_scores(name: str, size: tuple[int, int], label: tuple[int, int]):
    """Whole images, also padded and resized to another label: with the outputs of each step alone, in one walk."""
    model, image = make(name), picture(*size)
    scores = all_at_once(model, image)
    if size != label:
        scores = F.interpolate(scores[None], label, mode="bilinear", align_corners=False)[0]
    limit = float(scores.amax(0).median())
    whole = WholeScores(model, image, model, nullcontext, 16)
    found = Predictor(model, WIDE, limit)(resized(whole.chunks(), label), range(4))
    same(found, scores, model.has_background, WIDE, limit)
    assert len(found[3]["foreground"].unique()) > 1  # or the test sees little


@pytest.mark.parametrize("name", MODELS)
def test_sliding_windows_chunk_by_chunk(name: str):
    model, image, label = make(name), picture(64, 88), (75, 90)
    scores = mean_over_windows(model, image, 40, [0, 24], [0, 32, 48])
    scores = F.interpolate(scores[None], label, mode="bilinear", align_corners=False)[0]
    slide = SlideScores(model, image, 40, 32, model, nullcontext, 16)
    found = Predictor(model, WIDE, 0.3)(resized(slide.chunks(), label), range(4))
    same(found, scores, model.has_background, WIDE, 0.3)


def test_three_classes_beside_others_resize_as_one_of_many():
    """PyTorch has a kernel of its own for three channels."""
    chunks = torch.randn(11, 60, 80).split([5, 3, 3])
    whole = F.interpolate(torch.cat(chunks)[None], (97, 70), mode="bilinear", align_corners=False)[0]
    assert torch.equal(torch.cat(list(resized(chunks, (97, 70)))), whole)


@given(st.data())
def test_the_running_best_is_the_first_of_the_largest(data: st.DataObject):
    """Ties, infinities and NaN as `numpy.argmax` has them, wherever the maps are cut."""
    values = st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("inf"), float("-inf")])
    number = data.draw(st.integers(1, 9))
    maps = np.array(data.draw(st.lists(values, min_size=6 * number, max_size=6 * number)), np.float32)
    maps = maps.reshape(number, 2, 3)
    best, start = RunningBest(), 0
    while start < number:
        stop = data.draw(st.integers(start + 1, number))
        best.add(torch.from_numpy(maps[start:stop]))
        start = stop
    assert best.count == number
    np.testing.assert_array_equal(best.index.numpy(), maps.argmax(0))
    np.testing.assert_array_equal(best.value.numpy(), maps.max(0))


@pytest.mark.parametrize("background", [True, False])
@given(data=st.data())
def test_predictions_do_not_depend_on_where_scores_are_cut(background: bool, data: st.DataObject):
    """Whole-numbered scores, full of ties; steps end inside chunks, at their ends, and in the first of them."""
    seed = data.draw(st.integers(0, 10**6))
    scores = np.random.default_rng(seed).integers(0, 4, (K + background, 3, 4)).astype(np.float32)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(scores) - 1))))
    steps = data.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=1, unique=True))
    chunks = [torch.from_numpy(part) for part in np.split(scores, cuts)]
    found = Predictor(Oracle(background, K), SCENE, 2.0)(chunks, steps)
    assert sorted(found) == sorted(steps)
    for step in steps:
        wanted = predicted(scores, len(SCENE.steps[step].seen), background, 2.0, SCENE)
        for rule in ("all", "foreground"):
            np.testing.assert_array_equal(found[step][rule].numpy(), wanted[rule])


def test_nothing_is_scored_after_the_last_step_asked_for():
    def chunks() -> Iterable[Tensor]:
        yield torch.tensor([0.1, 0.9])[:, None, None]
        raise AssertionError("step 0 has two classes")

    found = Predictor(Oracle(False, K), SCENE, 0.5)(chunks(), [0])
    assert int(found[0]["all"]) == SCENE.order[1]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.found = max(self.found, tensor.numel())
        return out


@pytest.mark.parametrize("name", ["segvit", "segvit, background query", "shrunk", "vit-linear", "dtop", "dtop, logits"])
@pytest.mark.parametrize("slide", [True, False])
def test_all_scores_are_never_held(name: str, slide: bool):
    """42 scores of 96 x 104 px; chunks of 16, or 19, make no tensor of more than 19 such maps."""
    model, image = make(name), picture(96, 104)
    with Largest() as largest:
        if slide:
            made: Any = SlideScores(model, image, 80, 16, model, nullcontext, 16)
        else:
            made = WholeScores(model, image, model, nullcontext, 16)
        Predictor(model, WIDE, 0.5)(resized(made.chunks(), (108, 104)), [3])
    assert 0 < largest.found <= 19 * 108 * 104


class Reversed(MaskOutput):
    """A stranger's output: derived from one that has chunks, it defines its scores alone."""

    @cached_property
    def scores(self) -> Tensor:
        return 1 - super().scores


def test_who_defines_scores_anew_is_read_by_them():
    output = make("segvit")(picture(72, 88)[None])
    turned = Reversed(**{name: getattr(output, name) for name in ("size", "stages", "heads")})
    assert torch.equal(torch.cat(list(turned.score_chunks(16)), 1), 1 - output.scores)

    class Both(Reversed):
        def score_chunks(self, most: int) -> Any:
            return iter([self.scores])

    assert Both.score_chunks is not SegOutput.score_chunks
    assert Reversed.score_chunks is Scores.score_chunks is SegOutput.score_chunks


class Rounding(OneOf):
    """bf16, as Fabric's precision plugin has it."""

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


SMALL = from_dict("small", {"dataset": "toy", "classes": K, "base": 2, "increment": 1, "order": [3, 1, 4, 2]})
ONE = from_dict("one", {"dataset": "toy", "classes": K, "base": 1, "increment": 1, "order": [3, 1, 4, 2]})


@pytest.mark.parametrize("fabric", [OneOf, Rounding])
@pytest.mark.parametrize("inference", ["whole", "slide"])
@pytest.mark.parametrize("scene", [SMALL, ONE], ids=["small", "one"])
@pytest.mark.parametrize("name", ["segvit", "segvit v1", "segvit, background query", "vit-linear", "dtop"])
def test_matrices_count_the_argmax_over_all_scores(
    name: str, scene: Scenario, inference: str, fabric: Callable[[], OneOf]
):
    """A whole evaluation, with `upto` matrices and steps of one class, pixel by pixel from scores made all at once."""
    rng = np.random.default_rng(1)
    shown = {s: rng.integers(0, K + 1, (10, 12), np.uint8).repeat(8, 0).repeat(8, 1) for s in "abc"}
    data, model = Shown(shown, {s: np.roll(m, 3, 1) for s, m in shown.items()}), make(name, scene)
    made = view(data, model, geometries=["full"], inference=inference, window=64, stride=32, background_threshold=0.3)
    alone = [frozenset("ab"), *[frozenset("c")] * (len(scene.steps) - 2)]
    matrices, _ = evaluate.evaluate(fabric(), model, made, scene, scene.steps[-1], alone=alone)
    wanted = {key: np.zeros((K + 1, K + 1), np.int64) for key in matrices}
    for index, stem in enumerate("abc"):
        image = made[index][1][0].image
        with fabric().autocast():
            if inference == "slide":
                scores = mean_over_windows(model, image, 64, [0, 16], [0, 32])
            else:
                scores = all_at_once(model, image)
        parts = {"": scene.steps[-1]} | {f".upto{t}": scene.steps[t] for t, s in enumerate(alone) if stem in s}
        for part, step in parts.items():
            found = predicted(scores.float().numpy(), len(step.seen), model.has_background, 0.3, scene)
            for rule, ids in found.items():
                np.add.at(wanted[f"full.{rule}{part}"], (data.truth[stem].astype(int), ids), 1)
    for key, matrix in wanted.items():
        np.testing.assert_array_equal(matrices[key], matrix, err_msg=key)


def test_equal_predictions_are_counted_once(monkeypatch: pytest.MonkeyPatch):
    """A step whose classes win nowhere changes no prediction: its image is not counted again."""
    calls = []
    count = evaluate.confusion
    monkeypatch.setattr(evaluate, "confusion", lambda *given: (calls.append(1), count(*given))[1])
    shown = {"a": np.full((6, 6), 3, np.uint8)}  # of the first step
    model, data = Oracle(False, K), Shown(shown, shown)
    found, _ = evaluate.evaluate(
        OneOf(), model, view(data, model, geometries=["full"]), SCENE, SCENE.steps[-1], alone=[frozenset("a")] * 2
    )
    assert len(calls) == 1
    assert len(found) == 6
    assert all(matrix[3, 3] == 36 for matrix in found.values())
