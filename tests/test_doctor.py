"""`cssbench doctor`: what it finds, and what it says to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from strangers import GOOD, Command, Install

from cssbench import doctor
from cssbench.data.synthetic import Synthetic


def checks(command: Command) -> tuple[int, dict[str, dict[str, str]]]:
    code, out, _ = command("doctor", "--json")
    return code, {check["name"]: check for check in json.loads(out)["checks"]}


def test_a_sound_installation(command: Command):
    code, found = checks(command)
    assert code == 0
    assert {check["area"] for check in found.values()} == set(doctor.AREAS)
    assert not [check for check in found.values() if check["state"] == "broken"]
    assert found["required"]["state"] == "ok"
    assert all(check["advice"] for check in found.values() if check["state"] != "ok")


def test_for_people_it_says_what_to_do(command: Command):
    code, out, _ = command("doctor")
    assert code == 0
    assert "cssbench demo" in out
    assert "Traceback" not in out


def test_the_tested_versions_are_those_of_the_checkout():
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text()
    assert doctor.tested_versions()["torch"] == constraints.partition("\ntorch==")[2].partition("\n")[0]


def test_a_required_package_that_is_gone_is_broken(command: Command, monkeypatch: pytest.MonkeyPatch):
    there = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "timm" else there(name))
    code, found = checks(command)
    assert code == 1
    assert (found["timm"]["state"], found["timm"]["advice"]) == ("broken", 'Install it: pip install "timm".')
    assert found["required"]["state"] == "broken"


def test_another_version_is_a_note(command: Command, monkeypatch: pytest.MonkeyPatch):
    there = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.1" if name == "timm" else there(name))
    code, found = checks(command)
    assert code == 0
    assert "timm 0.1 (tested: " in found["versions"]["found"]
    assert "constraints.txt" in found["versions"]["advice"]


def test_a_missing_extra_is_a_note(command: Command, monkeypatch: pytest.MonkeyPatch):
    there = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "furo" else there(name))
    code, found = checks(command)
    assert code == 0
    assert found["docs"]["found"] == "without furo"
    assert 'pip install "cssbench[docs]"' in found["docs"]["advice"]


def test_plug_ins_good_and_broken(install: Install, command: Command):
    install("good-pack", {"methods": {"fine": "good_mod:Mine"}}, {"good_mod.py": GOOD})
    install("bad-pack", {"methods": {"awful": "bad_mod:Mine"}}, {"bad_mod.py": "raise RuntimeError('no luck')"})
    code, found = checks(command)
    assert code == 0
    assert found["method fine"]["found"] == "from good-pack"
    broken = found["a package that is not used"]
    assert "bad-pack" in broken["found"]
    assert "no luck" in broken["found"] + broken["advice"]
    assert "pip uninstall bad-pack" in broken["advice"]


def test_data_roots(synthetic: Synthetic, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CSSBENCH_DATA_CAMVID", str(tmp_path / "nowhere"))
    (tmp_path / "train").mkdir()
    _, found = checks(command)
    assert found["CSSBENCH_DATA_CAMVID"]["state"] == "note"
    assert "is not a folder" in found["CSSBENCH_DATA_CAMVID"]["found"]


def test_a_check_that_fails_is_a_finding(command: Command, monkeypatch: pytest.MonkeyPatch):
    def fails():
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(doctor.AREAS, "disk", fails)
    code, found = checks(command)
    assert code == 1
    assert "ZeroDivisionError: oh" in found["this check"]["found"]
