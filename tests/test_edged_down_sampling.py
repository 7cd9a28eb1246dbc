"""EQD: edges keep their tokens in batches, at each depth; what the edge head learns from, and when."""

from __future__ import annotations

import pytest
import torch
from tiny_shrunk import EQD, FAMILIES, dense, images, kept, make, with_edges

from cssbench.models.segvit import SegViT


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES[1:])
def test_edges_of_any_family(name):
    options = {"backbone": {"name": name}, **EQD}
    model, x = with_edges(make(**options)), images(3)
    raw = model(x).edges
    model.edge_head.mlp[-1].bias[1] += (raw[..., 0] - raw[..., 1]).median()  # half of the tokens are edges
    together = model(x)
    assert len(set(kept(together))) > 1
    for i in range(3):
        torch.testing.assert_close(together.scores[i], model(x[i : i + 1]).scores[0], atol=1e-5, rtol=1e-4)
    every = torch.ones(3, 16, dtype=torch.bool)
    torch.testing.assert_close(dense(model._encode(x, (4, 4), every)[1]), model.backbone(x)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch():
    model, x = with_edges(make(**EQD)), images(4)
    together = model(x)
    assert len(set(kept(together))) > 1
    assert all(4 <= n <= 16 for n in kept(together))
    for i in range(4):
        alone = model(x[i : i + 1])
        assert kept(alone) == [kept(together)[i]]
        torch.testing.assert_close(together.scores[i], alone.scores[0], atol=1e-5, rtol=1e-4)
    others = model(torch.cat([x[:1], 10 * x[1:]]))
    torch.testing.assert_close(others.scores[0], together.scores[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_no_edge_is_plain_down_sampling_and_all_edges_the_whole_image():
    model, x = make(**EQD), images()
    plain = make(down_layer=0)
    plain.load_state_dict(model.state_dict(), strict=False)
    none, every = torch.zeros(3, 16, dtype=torch.bool), torch.ones(3, 16, dtype=torch.bool)
    torch.testing.assert_close(model(x, none).scores, plain(x).scores, atol=1e-5, rtol=1e-4)
    found = model._encode(x, (4, 4), every)
    tokens = found[0]
    for block in model.backbone.vit.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(dense(found[1]), tokens, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_depths_are_the_blocks_that_each_token_went_through():
    """Three blocks; block 1 down-samples: one block for dropped tokens. At block 0 with edges: none."""
    x = images(2)
    grid = [[3, 1, 3, 1], [1, 1, 1, 1]] * 2
    for options in ({}, {"down_by": "conv"}, {"down_on": "all"}, {"upsample": False}):
        depths = make(**options)(x).depths
        assert depths.dtype == torch.int64
        assert depths.tolist() == [grid, grid]
    edges = torch.zeros(2, 16, dtype=torch.bool)
    edges[1, [1, 15]] = True
    plain = [[3, 0, 3, 0], [0, 0, 0, 0], [3, 0, 3, 0], [0, 0, 0, 0]]
    edged = [[3, 3, 3, 0], [0, 0, 0, 0], [3, 0, 3, 0], [0, 0, 0, 3]]
    assert make(**EQD)(x, edges).depths.tolist() == [plain, edged]
    assert make(cls=SegViT)(x).depths is None


def test_gradients_reach_the_edge_head_from_its_loss_alone():
    model = make(**EQD).train()
    labels = torch.zeros(3, 32, 32, dtype=torch.long)
    labels[:, :, 5:20] = 1
    terms = model.loss(model(images()), labels)
    assert set(terms) == {"class", "focal", "dice", "edge"}
    parameters = list(model.edge_head.parameters())
    rest = terms["class"] + terms["focal"] + terms["dice"]
    assert all(g is None for g in torch.autograd.grad(rest, parameters, retain_graph=True, allow_unused=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms["edge"], parameters))


TRUTH = {"edges": {"threshold": 0.5, "select": "truth"}, "down_layer": 0}


def halves():
    """Labels of 3 images: cells of column 1 (px 8 to 15) show two labels; the second image has none, the third 255."""
    labels = torch.ones(3, 32, 32, dtype=torch.long)
    labels[0, :, 12:], labels[2, :, 12:] = 2, 255
    return labels


def test_teacher_forcing_keeps_the_true_edges_in_training_alone():
    x, labels = images(), halves()
    for options, forced in ((TRUTH, [8, 4, 4]), (EQD, None)):
        model = with_edges(make(**options)).train()
        inputs = model.training_inputs(labels)
        assert set(inputs) == ({"edges"} if forced else set())
        output = model(x, **inputs)
        if forced:
            assert kept(output) == forced  # 2x2 grid; in image 0 also the 4 cells of column 1
            assert inputs["edges"][0].view(4, 4).int().tolist() == [[0, 1, 0, 0]] * 4
        else:
            predicted = kept(output)
            assert predicted != [8, 4, 4]
        terms = model.loss(output, labels)
        assert torch.autograd.grad(terms["edge"], list(model.edge_head.parameters()))[0].abs().sum() > 0
    truth = with_edges(make(**TRUTH))
    assert kept(truth(x)) == predicted


def test_teacher_forcing_ends_with_step_0():
    """Later labels show the step's own classes alone."""
    assert make(steps=2, **TRUTH).training_inputs(halves()) == {}


@torch.no_grad()
def test_the_edge_head_may_read_deeper_tokens():
    x = images()
    for layer in (0, 1, 2):
        model = make(edges={"threshold": 0.5, "layer": layer}, down_layer=2)
        backbone, seen = model.backbone, []
        model.edge_head.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
        tokens = backbone.embed(x)
        for block in backbone.blocks[:layer]:
            tokens = block(tokens)
        model(x)
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], tokens)


def test_the_edge_head_learns_at_step_0_only():
    model = make(steps=2, **EQD).train()
    labels = torch.full((3, 32, 32), 3)
    terms = model.loss(model(images()), labels)
    assert "edge" not in terms
    assert not any(p.requires_grad for p in model.edge_head.parameters())
    sum(terms.values()).backward()
    assert all(p.grad is None for p in model.edge_head.parameters())
