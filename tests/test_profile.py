"""FLOPs by hand, against the papers' public code, per part and per step; the command line."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cssbench import profile
from cssbench.errors import ConfigError
from cssbench.flops import counting

TINY = ["backbone.name=vit_tiny_patch16_224", "head.heads=3", "backbone.layers=[1,2]", "backbone.depth=2"]
TINY_SET = [word for change in TINY for word in ("--set", f"model.{change}")]


def flops(run: Any) -> int:
    with counting() as counter:
        run()
    return counter.total.total()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_operations_counted_by_hand(device: str) -> None:
    with torch.device(device):
        x, image = torch.zeros(2, 5, 8), torch.zeros(1, 4, 6, 6)
        assert flops(lambda: nn.Linear(8, 3)(x)) == 2 * 5 * 8 * 3
        assert flops(lambda: nn.Conv2d(4, 10, 3, padding=1, groups=2)(image)) == 10 * 36 * 2 * 9
        assert flops(lambda: nn.ConvTranspose2d(4, 10, 2, stride=2)(image)) == 36 * 4 * 10 * 4
        assert flops(lambda: nn.BatchNorm2d(4).eval()(image)) == 2 * 4 * 36
        assert flops(lambda: nn.LayerNorm(8)(x)) == 5 * 80
        assert flops(lambda: F.layer_norm(x, (8,))) == 4 * 80
        assert flops(lambda: F.interpolate(image, size=(12, 9), mode="bilinear")) == 4 * 4 * 12 * 9
        assert flops(lambda: (x.softmax(-1) + x).relu()) == 0


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_counts_both_products_however_it_is_computed(device: str) -> None:
    with torch.device(device):
        q, k, v = torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 11, 4), torch.zeros(2, 3, 11, 4)
        assert flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 3 * (7 * 11 * 4) * 2
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()  # has a fused kernel in eval mode
        attention = 5 * (4 * 8 * 8) + 2 * 5 * 5 * 8
        assert flops(lambda: layer(torch.zeros(1, 5, 8))) == attention + 2 * 5 * 8 * 16 + 2 * 5 * 5 * 8


@pytest.mark.parametrize(
    ("vit", "version", "layers", "size", "part", "product", "expected"),
    [
        ("base", "v1", [6, 8, 12], 512, None, 0, 120.88),
        ("base", "v1", [12], 512, None, 0, 115.77),
        ("large", "v1", [8, 16, 24], 640, None, 0, 637.87),
        ("base", "v2", [6, 8, 12], 512, "head 0", 150 * 512**2 / 1e9, 6.886),  # its einsum is a product here
    ],
)
def test_papers_models_cost_what_the_public_code_counts(
    vit: str, version: str, layers: list[int], size: int, part: str | None, product: float, expected: float
) -> None:
    options = {
        "backbone": {"name": f"vit_{vit}_patch16_384", "layers": layers},
        "head": {"version": version, "heads": 16 if vit == "large" else 12},
    }
    model = profile.build_model("segvit", options)
    image = torch.empty(1, 3, size, size, device="meta")
    (cost,) = profile.growth(model, profile.cut_steps(None, 150), [image])
    counted = cost.flops[part] / 1e9 if part else cost.gflops
    assert counted + product == pytest.approx(expected, rel=1e-3)


def test_parts_sum_to_the_whole_and_each_step_adds_one_head() -> None:
    options = {"backbone": {"name": "vit_tiny_patch16_224", "depth": 2, "layers": [1, 2]}, "head": {"heads": 3}}
    costs = []
    for device in ("meta", "cpu"):
        model = profile.build_model("segvit", options, device)
        costs.append(profile.growth(model, profile.cut_steps("6-2", 10), [torch.zeros(1, 3, 64, 64, device=device)]))
        assert costs[-1][-1].num_parameters == sum(p.numel() for p in model.parameters())
    first, second, last = costs[0]
    assert costs[0] == costs[1]  # shapes are all that is read
    assert [*last.flops] == ["encoder", "head 0", "head 1", "head 2", "resize"]
    assert last.flops["head 0"] == first.flops["head 0"]
    assert last.gflops - second.gflops == pytest.approx((last.flops["head 2"] + 4 * 2 * 64**2) / 1e9)
    assert 2 * last.gflops == last.to_dict()["gflops_2x"]
    with pytest.raises(ConfigError, match="7-2 does not cut 10"):
        profile.cut_steps("7-2", 10)


def test_cost_that_depends_on_the_image_is_the_mean_over_images() -> None:
    class Bright(nn.Module):
        def forward(self, image: torch.Tensor) -> Any:
            kept = image[image > 0][:, None]
            made = F.linear(kept, torch.ones(3, 1))
            return type("Output", (), {"scores": image * made.sum()})

    model: Any = Bright()
    model.heads = nn.ModuleList()
    dark, bright = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert profile.count(model, [dark, bright]).flops["rest"] == (0 + 12 * 3) / 2
    with pytest.raises(profile.ModelError, match="--data"):
        profile.count(model, [dark.to("meta")])


def test_json(command: Any) -> None:
    words = ["profile", "segvit", "--size", "64", "--classes", "10", "--steps", "6-2", *TINY_SET]
    code, printed, _ = command(*words, "--json", "--latency")
    made = json.loads(printed)
    assert code == 0
    assert [row["classes"] for row in made["steps"]] == [6, 8, 10]
    assert set(made["latency"]["seconds"]) == {"after step 0", "after step 2"}
    assert "threads" in made["latency"]["device"]
    code, printed, _ = command(*words)
    assert code == 0
    assert "head 2" in printed


def test_a_model_is_profiled_without_its_weights(command: Any) -> None:
    """Neither a file that is not there nor a download stands in the way of counting and timing."""
    weights = ["--set", "model.backbone.checkpoint=gone.safetensors", "--set", "model.backbone.pretrained=true"]
    code, _, error = command("profile", "segvit", "--size", "64", "--classes", "3", "--latency", *weights, *TINY_SET)
    assert code == 0, error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["segvitt"], "Did you mean 'segvit'"),
        (["segvit", "--set", "method.x=1"], "takes model.key=value"),
        (["segvit", "--steps", "100-7"], "does not cut 150"),
        (["segvit", "--steps", "ade20k-100-1x"], "scenario"),
        (["segvit", "--data", "."], "belong together"),
        (["segvit", "--latency", "--device", "tpu", *TINY_SET], "--device tpu is not there"),
    ],
)
def test_mistakes_are_one_paragraph(command: Any, words: list[str], said: str) -> None:
    code, _, error = command("profile", *words, "--size", "64")
    assert code == 2
    assert said in error


def test_the_committed_table_reaches_the_published_figures_or_says_what_is_open():
    text = (Path(__file__).parents[1] / "bench" / "results" / "gflops.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["what"].split(" ")[0] for row in rows} >= {"SegViT", "SETR-naive,", "Segmenter", "Shrunk", "QD", "ATM"}
    for row in rows:
        assert abs(float(row["ours"]) / float(row["published"]) - 1) < 0.01 or row["note"], row["what"]


def test_the_committed_table_is_what_the_code_counts(monkeypatch: pytest.MonkeyPatch):
    bench = Path(__file__).parents[1] / "bench"
    monkeypatch.syspath_prepend(str(bench))
    gflops = importlib.import_module("gflops")
    text = (bench / "results" / "gflops.csv").read_text(encoding="utf-8")
    committed = list(csv.DictReader(text.splitlines()))
    assert [row["what"] for row in committed] == [row.what for row in gflops.ROWS]
    for row, line in zip(gflops.ROWS, committed, strict=True):
        if not (row.kept or row.values):  # seconds each
            assert f"{row.ours():.2f}" == line["ours"], row.what
    page = (bench.parent / "docs" / "cost.md").read_text(encoding="utf-8")
    assert page == gflops.markdown(committed)
