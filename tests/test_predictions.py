"""From an image to counts: windows and their average, class ids by either rule, the confusion matrix."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import SCENE, Mean, Oracle, Scores
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cssbench.metrics.confusion import confusion
from cssbench.models.segmenter import Segmenter
from cssbench.predict import Predictor, SlideScores, WholeScores, pad_to_multiple, window_starts


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
        (zeros, zeros - 1, "prediction holds values"),
        (zeros + 254, zeros, "truth holds values"),
        (zeros + 256, zeros, "truth holds values"),
        (zeros + 2**40, zeros, "truth holds values"),  # 0 in its low 32 bits
        (zeros, zeros - 2**40, "prediction holds values"),
        (torch.tensor([[0, 1], [9, 255]]), zeros, r"truth holds values outside 0\.\.2 and 255 \(1 pixels\)"),
        (zeros, zeros[0], "differ in shape"),
    ):
        with pytest.raises(ValueError, match=message):
            confusion(truth, predicted, 2)
    for ignored in (77, -1, 255, 2**40):  # what is ignored may be predicted as anything
        assert confusion(zeros + 255, zeros + ignored, 2).sum() == 0


@pytest.mark.parametrize("dtypes", [(torch.uint8, torch.int64), (torch.int16, torch.uint8), (torch.int32, torch.int64)])
def test_confusion_of_all_class_ids_there_can_be(dtypes: tuple[torch.dtype, torch.dtype]):
    """254 classes, the most that a label map can hold: every pair of ids once, and once ignored; any shape."""
    truth, predicted = torch.meshgrid(torch.arange(256), torch.arange(255), indexing="ij")
    matrix = confusion(truth.to(dtypes[0])[None], predicted.to(dtypes[1])[None], 254)
    assert matrix.tolist() == [[1] * 255] * 255
    with pytest.raises(ValueError, match="prediction holds values"):
        confusion(truth.to(dtypes[0]), predicted.to(dtypes[1]) + 1, 254)
    assert confusion(truth[:0], predicted[:0], 254).sum() == 0
    assert confusion(truth[3, 7], predicted[3, 7], 254)[3, 7] == 1


def test_both_ways_of_counting_agree():
    """On a device without a bincount that does not wait, counts are added one by one."""
    from cssbench.metrics import confusion as module

    code = torch.randint(0, 50, (1000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    expected = module._count(code, 60)
    assert expected.tolist() == [code.tolist().count(value) for value in range(60)]
    assert torch.equal(module.added_up(code, 60), expected)


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


def whole(model: Segmenter, image: Tensor) -> Tensor:
    return torch.cat(list(WholeScores(model, image, model, nullcontext, 1).chunks()))


def slide_scores(model: Segmenter, image: Tensor, window: int, stride: int) -> Tensor:
    return torch.cat(list(SlideScores(model, image, window, stride, model, nullcontext, 1).chunks()))


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
    found = Predictor(model, SCENE, 0.5)([torch.tensor(scores)[:, None, None]], [step])[step]
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
