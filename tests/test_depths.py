"""How deep tokens went and what a pass costs: shares, maps and multiply-adds worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fabricated import fabricate
from oracles import SCENE, OneOf, Oracle, Scores, Shown, view
from torch import Tensor

from cssbench import validate
from cssbench.depths import DepthCounter, checked, depth_map, gflops
from cssbench.errors import ModelError, RunError
from cssbench.evaluate import evaluate
from cssbench.results import RunFolder, read_json, write_json


class Deep(Oracle):
    """Cells of 4 x 4 px; the depth of a cell is the class id shown by its first pixel."""

    def forward(self, images: Tensor) -> Scores:
        output = super().forward(images)
        output.depths = (images[:, 0, ::4, ::4] / 50).round().long()
        return output


class Counted(Oracle):
    """Depth = number of the pass, from 1 on."""

    def forward(self, images: Tensor) -> Scores:
        output = super().forward(images)
        cells = (images.shape[-2] // 4, images.shape[-1] // 4)
        output.depths = torch.full((len(images), *cells), len(self.calls))
        return output


def cells(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint8).repeat(4, 0).repeat(4, 1)


def two_images() -> Shown:
    shown = {"a": cells([1, 1], [2, 3]), "b": cells([3])}
    return Shown(shown, {stem: np.ones_like(ids) for stem, ids in shown.items()})


def counted(model: Oracle, fabric: OneOf, **changes: Any) -> DepthCounter:
    data = view(two_images(), model, **{"geometries": ["full"]} | changes)
    with DepthCounter(model, torch.device("cpu")) as counter:
        evaluate(fabric, model, data, SCENE, SCENE.steps[-1])
    return counter


def test_shares_of_five_tokens_by_hand():
    model = Deep(True, 4)
    assert counted(model, OneOf()).shares(OneOf()) == {"1": 0.4, "2": 0.2, "3": 0.4}
    assert not model._forward_hooks  # what comes after the evaluation is not counted


def test_every_forward_pass_counts():
    """Image a (8 x 8): 4 windows of one cell each, b one; the centre crop of 4 px: one more cell of each."""
    model = Deep(True, 4)
    found = counted(model, OneOf(), inference="slide", window=4, stride=4, geometries=["full", "crop"], crop=4)
    assert int(found.counts.sum()) == 7


def test_processes_add_up():
    parts = [counted(Deep(True, 4), OneOf(rank, 2)) for rank in range(2)]
    assert [int(part.counts.sum()) for part in parts] == [4, 1]

    class Summing(OneOf):
        def all_reduce(self, data: Tensor, reduce_op: str) -> Tensor:
            return data + parts[1].counts

    assert parts[0].shares(Summing()) == {"1": 0.4, "2": 0.2, "3": 0.4}


def test_a_model_without_depths_has_no_shares_and_no_map():
    model = Oracle(True, 4)
    assert counted(model, OneOf()).shares(OneOf()) == {}
    data = view(two_images(), model, geometries=["full"])
    assert depth_map(OneOf(), model.eval(), data.sampled_view(0), data.config) is None


@pytest.mark.parametrize("depths", [torch.full((1, 2, 2), 256), torch.full((1, 2, 2), -1), torch.ones(1, 2, 2)])
def test_impossible_depths_are_refused(depths: Tensor):
    with pytest.raises(ModelError, match=r"expected \(B, h, w\)"):
        checked(depths, Oracle(True, 4))


def test_the_map_has_the_size_of_the_label():
    """The input is the image at half its size, so that a cell of 4 px is 8 px of the label."""
    shown = {"a": cells([1, 2], [3, 4]).repeat(2, 0).repeat(2, 1)}
    model = Deep(True, 4).eval()
    data = view(Shown(shown, shown), model, geometries=["full"], short_side=8)
    np.testing.assert_array_equal(depth_map(OneOf(), model, data.sampled_view(0), data.config), shown["a"])


def test_padding_is_cut_off_the_map():
    shown = {"a": cells([1, 2], [3, 4])[:6, :7]}
    model = Deep(True, 4).eval()
    data = view(Shown(shown, shown), model, geometries=["full"])
    np.testing.assert_array_equal(depth_map(OneOf(), model, data.sampled_view(0), data.config), shown["a"])


def test_the_deepest_window_counts():
    """Windows of 4 px at columns 0, 2 and 4 of 8: passes 1, 2 and 3."""
    shown = {"a": np.ones((4, 8), np.uint8)}
    model = Counted(True, 4).eval()
    data = view(Shown(shown, shown), model, geometries=["full"], inference="slide", window=4, stride=2)
    found = depth_map(OneOf(), model, data.sampled_view(0), data.config)
    np.testing.assert_array_equal(found, [[1, 1, 2, 2, 3, 3, 3, 3]] * 4)


class Priced(Oracle):
    """A 1 x 1 convolution from 3 channels to 2."""

    def __init__(self) -> None:
        super().__init__(True, 4)
        self.convolution = torch.nn.Conv2d(3, 2, 1, bias=False)

    def forward(self, images: Tensor) -> Scores:
        return Scores(self.convolution(images))


def test_gflops_by_hand():
    """6 multiply-adds per pixel and 4 for each of the 2 scores of the last resize: 14 per pixel of the padded input."""
    shown = {stem: np.ones((6, 8), np.uint8) for stem in "abc"}
    model = Priced().eval()
    found = gflops(OneOf(), model, view(Shown(shown, shown), model, geometries=["full"], flops_images=2))
    assert found == {"per_pass": 896e-9, "per_image": 896e-9, "images": 2, "geometry": "full"}
    windows = {"inference": "slide", "window": 4, "stride": 4}
    found = gflops(OneOf(), model, view(Shown(shown, shown), model, geometries=["crop", "full"], **windows))
    assert found["images"] == 3
    assert found["geometry"] == "full"
    assert found["per_pass"] == pytest.approx(14 * 16e-9)
    assert found["per_image"] == pytest.approx(4 * 14 * 16e-9)
    found = gflops(OneOf(), model, view(Shown(shown, shown), model, geometries=["crop"], crop=4, **windows))
    assert found == {"per_pass": 224e-9, "per_image": 224e-9, "images": 3, "geometry": "crop"}
    assert gflops(OneOf(), model, view(Shown(shown, shown), model, flops_images=0)) == {}


COST = {"per_pass": 12.5, "per_image": 25.0, "images": 8, "geometry": "full"}


def test_records_are_read_back(tmp_path: Path):
    run = fabricate(tmp_path / "run", numbers={"tokens": {"12": 0.5, "6": 0.25, "8": 0.25}, "gflops": COST})
    assert run.records()[0].tokens == {6: 0.25, 8: 0.25, 12: 0.5}
    assert list(run.records()[0].tokens) == [6, 8, 12]
    assert run.records()[1].gflops == COST
    assert validate.problems(run) == []
    old = fabricate(tmp_path / "old")
    assert (old.records()[0].tokens, old.records()[0].gflops) == (None, None)
    assert validate.problems(old) == []


@pytest.mark.parametrize(
    "damaged",
    [
        {"tokens": {"6": 0.5, "12": 0.4}},
        {"tokens": {"6": -0.5, "12": 1.5}},
        {"tokens": {"six": 1.0}},
        {"tokens": {"6": "all"}},
        {"tokens": [1.0]},
        {"gflops": 12.5},
        {"gflops": {"per_pass": 12.5}},
        {"gflops": COST | {"per_image": True}},
    ],
)
def test_damaged_records_are_told(tmp_path: Path, damaged: dict[str, Any]):
    run = fabricate(tmp_path / "run", numbers=damaged)
    name = next(iter(damaged))
    with pytest.raises(RunError, match=f"{name!r} must hold"):
        getattr(run.records()[0], name)
    assert [what for what in validate.problems(run) if f"{name!r} must hold" in what]


def test_an_edited_share_is_told(tmp_path: Path):
    run = fabricate(tmp_path / "run", numbers={"tokens": {"6": 1.0}})
    path = run.records()[1].folder / "record.json"
    write_json(path, read_json(path) | {"tokens": {"2": 1.0}})
    assert ["record.json was edited" in what for what in validate.problems(RunFolder.read(run.path))] == [True]
