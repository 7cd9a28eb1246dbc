"""`cssbench.load_runs`: values worked out by hand from the made-up matrices of `fabricated`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from fabricated import fabricate, fabricate_imported, fabricate_oracle

import cssbench
from cssbench.errors import RunError, UnknownNameError


def value(frame: pd.DataFrame, **where: object) -> float:
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    assert len(frame) == 1
    return frame.miou.iloc[0]


def test_one_row_per_run_step_protocol_and_group(tmp_path: Path):
    fabricate(tmp_path / "deep" / "a", seed=3)
    fabricate_oracle(tmp_path / "joint")
    frame = cssbench.load_runs(tmp_path)
    # groups: all, base, incremental, group0 at step 0; group1 too at step 1; two protocols; the oracle has one step
    assert len(frame) == 2 * (4 + 5) + 2 * 4
    assert frame.groupby("run").oracle.first().to_dict() == {
        str(tmp_path / "deep" / "a"): False,
        str(tmp_path / "joint"): True,
    }
    mine = frame[~frame.oracle]
    assert set(mine.seed) == {3}
    assert bool(mine.finished.all())
    # step 1, argmax over classes: class 1 hits 5 of 10 and is predicted 0 times elsewhere but for 2 void pixels, which
    # are ignored; class 2 all; class 3 hits 10, and takes the 5 that class 1 lacks
    ours = {"protocol": "mmseg150@1", "step": 1}
    assert value(mine, group="base", **ours) == pytest.approx((5 / 10 + 1) / 2)
    assert value(mine, group="incremental", **ours) == pytest.approx(10 / 15)
    assert value(mine, group="group1", **ours) == pytest.approx(10 / 15)
    assert value(mine, group="all", **ours) == pytest.approx((0.5 + 1 + 10 / 15) / 3)
    at = mine[(mine.step == 1) & (mine.protocol == "plop@1")].set_index("group")
    assert at.classes.to_dict() == {"all": 3, "base": 2, "incremental": 1, "group0": 2, "group1": 1}
    assert pd.isna(value(mine, group="incremental", protocol="plop@1", step=0))
    assert set(mine.train_seconds) == {61.0}


def test_several_folders_and_a_protocol(tmp_path: Path):
    one, two = fabricate(tmp_path / "one").path, fabricate(tmp_path / "two").path
    frame = cssbench.load_runs([one, str(two), one], ["mib"])
    assert list(frame.run.unique()) == [str(one), str(two)]
    assert set(frame.protocol) == {"mib@1"}


def test_an_imported_log_has_what_it_supports(tmp_path: Path):
    fabricate_imported(tmp_path / "log", [{"0": 0.5, "1": 0.5, "2": 0.25}])
    frame = cssbench.load_runs(tmp_path)
    assert set(frame.protocol) == {"plop@1"}
    assert value(frame, group="all") == pytest.approx(1.25 / 3)
    with pytest.raises(RunError, match="supports the protocol"):
        cssbench.load_runs(tmp_path, ["mib@1"])


def test_mistakes(tmp_path: Path):
    with pytest.raises(RunError, match="none lies below it"):
        cssbench.load_runs(tmp_path)
    fabricate(tmp_path / "a")
    with pytest.raises(UnknownNameError):
        cssbench.load_runs(tmp_path, ["plob"])


def test_a_run_without_steps_has_no_rows(tmp_path: Path):
    fabricate(tmp_path / "a", steps=[])
    frame = cssbench.load_runs(tmp_path)
    assert len(frame) == 0
    assert "miou" in frame


def test_importing_it_loads_no_pandas():
    code = "import sys, cssbench; cssbench.load_runs; assert not {'pandas', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
