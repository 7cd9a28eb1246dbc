"""Which runs may share a table, and what is said of those that may not."""

from __future__ import annotations

from typing import Any

import pytest
from fabricated import fabricate, fabricate_imported, fabricate_oracle

from cssbench import compare, protocol
from cssbench.errors import RunError

MMSEG, PLOP, MIB = (protocol.get(name) for name in ("mmseg150@1", "plop@1", "mib@1"))
WIDE = {"name": "tiny", "backbone": {"width": 32, "depth": 2}}


def test_runs_that_differ_in_what_is_compared_share_a_table(tmp_path):
    runs = [
        fabricate(tmp_path / "a"),
        fabricate(tmp_path / "b", seed=1, method="mib"),
        fabricate_oracle(tmp_path / "j"),
    ]
    assert compare.differences(runs) == compare.differences(runs, PLOP) == []
    assert compare.differences([]) == compare.differences(runs[:1]) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "disjoint"}, "mode: overlapped in A, disjoint in B"),
        ({"groups": [[2, 1], [3]]}, "class order: [1, 2, 3] in A, [2, 1, 3] in B"),
        (
            {"identity": {"train": "e" * 64, "val": "b" * 64}},
            "data fingerprint of train: aaaaaaaaaaaa... in A, eeeeeeeeeeee... in B",
        ),
        (
            {"evaluated_sha256": "e" * 64},
            "evaluated images: 2 images cccccccccccc... in A, 2 images eeeeeeeeeeee... in B",
        ),
        ({"evaluate": {"split": "test"}}, "evaluated split: val in A, test in B"),
        (
            {"images": ["d" * 64, "e" * 64]},
            "training images of step 1: dddddddddddd... in A, eeeeeeeeeeee... in B",
        ),
        ({"void": "ignore"}, "void pixels in training: background in A, ignore in B"),
        ({"model": WIDE}, "model.backbone.width: 16 in A, 32 in B (and in 1 more like it)"),
        (
            {"evaluate": {"inference": "slide"}},
            "full-size inference: whole, short side 512, long side 2048 in A, "
            "slide 512/341 px, short side 512, long side 2048 in B",
        ),
    ],
)
def test_each_difference_is_named_with_both_values(tmp_path, changes: dict[str, Any], sentence: str):
    runs = [fabricate(tmp_path / "A"), fabricate(tmp_path / "B", **changes)]
    found = compare.differences(runs, MMSEG)
    assert [clause.replace(f"{tmp_path}/", "") for clause in found] == [sentence]
    with pytest.raises(RunError) as caught:
        compare.table(runs, MMSEG)
    assert found[0] in str(caught.value)


def test_heads_may_differ_but_not_backbones(tmp_path):
    backbone = {"backbone": {"width": 16}}
    run = fabricate(tmp_path / "A", model={"name": "tiny", "head": "atm", **backbone})
    other = fabricate(tmp_path / "B", model={"name": "linear", **backbone})
    oracle = fabricate_oracle(tmp_path / "J", model={"name": "linear", **backbone})
    rows, found = compare.table([run, other, oracle], MMSEG)
    assert found == []
    assert [row.oracle for row in rows] == [None, oracle, None]  # the own oracle has the same head, too
    taps = [{"backbone": {"width": 16, "layers": layers}} for layers in ([6, 8, 12], [12], [6, 9])]
    read = [fabricate(tmp_path / f"{n}", model={"name": "tiny", **each}) for n, each in enumerate(taps)]
    assert compare.differences(read[:2]) == []  # a decoder's own choice, as long as as many blocks run
    last = f"model.backbone.last of layers: 12 in {tmp_path}/0, 9 in {tmp_path}/2"
    assert compare.differences([read[0], read[2]]) == [last]
    whole = [fabricate(tmp_path / name, model={"name": "flat", "width": w}) for name, w in (("C", 8), ("D", 9))]
    assert compare.differences(whole) == [f"model.width: 8 in {tmp_path}/C, 9 in {tmp_path}/D"]


def test_steps_of_other_sizes(tmp_path):
    runs = [fabricate(tmp_path / "A"), fabricate(tmp_path / "B", groups=[[1], [2, 3]])]
    assert compare.differences(runs) == [f"classes per step: 2-1 in {tmp_path}/A, 1-2 in {tmp_path}/B"]


def test_only_the_inference_that_the_protocol_reads_matters(tmp_path):
    runs = [fabricate(tmp_path / "A"), fabricate(tmp_path / "B", evaluate={"crop": 448, "background_threshold": 0.3})]
    assert compare.differences(runs, MMSEG) == []
    assert [clause.split(":")[0] for clause in compare.differences(runs, PLOP)] == [
        "centre crop",
        "background threshold",
    ]
    assert [clause.split(":")[0] for clause in compare.differences(runs)] == ["centre crop", "background threshold"]
    slide = [runs[0], fabricate(tmp_path / "C", evaluate={"inference": "slide"})]
    assert compare.differences(slide, PLOP) == []


def test_a_protocol_that_one_run_does_not_support(tmp_path):
    runs = [fabricate(tmp_path / "A"), fabricate(tmp_path / "B", geometries=["full"])]
    assert compare.differences(runs, MMSEG) == []
    assert compare.differences(runs, MIB) == [f"protocol: mib@1 cannot score {tmp_path}/B (it did not keep crop.all)"]
    rows, _ = compare.table(runs, MIB, allow_mixed=True)
    assert rows[1].scores == dict.fromkeys(("base", "incremental", "all", "avg"))


def test_scores_and_drops_by_hand(tmp_path):
    runs = [fabricate(tmp_path / "A"), fabricate_oracle(tmp_path / "J")]
    (mine, oracle), found = compare.table(runs, MMSEG)
    assert found == []
    # step 0: 9/10, 10/11; step 1: 1/2, 1, 2/3; oracle: 9/10, 1, 10/11
    all0, all1 = (0.9 + 10 / 11) / 2, (0.5 + 1 + 2 / 3) / 3
    expected = {"base": 0.75, "incremental": 2 / 3, "all": all1, "avg": (all0 + all1) / 2}
    assert mine.scores == pytest.approx(expected)
    assert oracle.scores == {k: pytest.approx(v) for k, v in (("base", 0.95), ("incremental", 10 / 11))} | {
        "all": pytest.approx((1.9 + 10 / 11) / 3),
        "avg": None,
    }
    assert mine.oracle is runs[1]
    assert mine.drops["base"] == pytest.approx((0.2, 0.2 / 0.95))
    assert mine.intransigence == pytest.approx(10 / 11 - 2 / 3)
    assert (oracle.oracle, oracle.drops["all"], oracle.intransigence) == (None, (None, None), None)


def test_the_oracle_of_another_model_or_data_is_refused_and_never_used(tmp_path):
    run = fabricate(tmp_path / "A")
    for name, changes in {"J": {"model": WIDE}, "K": {"identity": {"train": "e" * 64, "val": "b" * 64}}}.items():
        oracle = fabricate_oracle(tmp_path / name, **changes)
        with pytest.raises(RunError, match=rf"in its oracle {tmp_path}/{name}"):
            compare.table([run, oracle], MMSEG)
        rows, found = compare.table([run, oracle], MMSEG, allow_mixed=True)
        assert len(found) == 1
        assert (rows[0].oracle, rows[0].drops["all"]) == (None, (None, None))


def test_the_oracle_does_not_learn_in_steps_or_under_a_mode(tmp_path):
    oracle = fabricate_oracle(tmp_path / "J", mode="disjoint", images=["f" * 64], groups=[[3, 1, 2]])
    assert compare.differences([oracle, fabricate(tmp_path / "A")]) == []


def test_of_several_oracles_the_one_of_the_same_method_then_seed(tmp_path):
    run = fabricate(tmp_path / "A", seed=1, method="mib")
    oracles = [
        fabricate_oracle(tmp_path / f"{method}-{seed}", seed=seed, method=method)
        for method in ("finetune", "mib")
        for seed in (0, 1)
    ]
    assert compare.own_oracle(run, [run, *oracles], MMSEG) is oracles[3]
    assert compare.own_oracle(run, [run, *oracles[:3]], MMSEG) is oracles[2]
    assert compare.own_oracle(oracles[0], oracles, MMSEG) is None


def test_runs_that_are_not_valid_never_enter(tmp_path):
    limited, whole = fabricate(tmp_path / "A", debug_limited=True), fabricate(tmp_path / "B")
    for allow in (False, True):
        with pytest.raises(RunError, match=r"/A must not stand in a table: debug-limited"):
            compare.table([whole, limited], MMSEG, allow_mixed=allow)


def test_long_orders_are_told_apart_by_their_digest(tmp_path):
    long = list(range(1, 21))
    runs = [
        fabricate(tmp_path / "A", groups=[long, [21]], steps=[]),
        fabricate(tmp_path / "B", groups=[long, [21]], steps=[]),
    ]
    runs[1].scenario["steps"][0]["new"] = [*long[:18], 20, 19]
    (clause,) = compare.differences(runs)
    assert clause.startswith("class order: [1, 2, 3, 4, 5, 6, ...] (21 entries, digest ")
    assert clause.count("digest") == 2
    assert len(set(clause.split("digest ")[1:])) == 2


# cssbench compare -----------------------------------------------------------------------------------------------------


def test_compare_prints_the_table_with_formulas(tmp_path, command):
    run, oracle = fabricate(tmp_path / "A"), fabricate_oracle(tmp_path / "J")
    code, out, err = command("compare", run.path, oracle.path)
    line = next(line.split() for line in out.splitlines() if line.split()[:1] == [f"{tmp_path}/A"])
    assert (code, err) == (0, "")
    assert line[1:] == [
        "finetune", "tiny", "0", "75.00", "66.67", "72.22", "81.34", "20.00", "24.24", "21.41", "21.05", "26.67",
        "22.87", "24.24", f"{tmp_path}/J",
    ]  # fmt: skip
    assert f"{tmp_path}/J (oracle)" in out
    assert "relative drop = (mIoU(own oracle) - mIoU(run)) / mIoU(own oracle)" in out
    assert "MIXED" not in out


def test_compare_of_different_modes_exits_2_with_one_clear_sentence(tmp_path, command):
    a, b = fabricate(tmp_path / "A"), fabricate(tmp_path / "B", mode="disjoint")
    code, out, err = command("compare", a.path, b.path)
    assert (code, out) == (2, "")
    assert f"They differ in mode: overlapped in {a.path}, disjoint in {b.path}. " in err
    code, out, _ = command("compare", a.path, b.path, "--allow-mixed")
    assert code == 0
    assert f"MIXED, not comparable: mode: overlapped in {a.path}, disjoint in {b.path}." in out


def test_compare_with_an_imported_log(tmp_path, command):
    ours = fabricate(tmp_path / "A")
    log = fabricate_imported(tmp_path / "L", [{"0": 0.5, "1": 0.8, "2": 0.7}, {"0": 0.2, "1": 0.4, "2": 0.6, "3": 0.6}])
    code, _, err = command("compare", ours.path, log.path)
    assert (code, f"mmseg150@1 cannot score {log.path} (an imported log supports another)" in err) == (2, True)
    code, out, _ = command("compare", ours.path, log.path, "--protocol", "plop@1")
    assert (code, "40.00  60.00  45.00" in " ".join(out.split()).replace(" ", "  ")) == (0, True)
