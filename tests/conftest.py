"""Fixtures of several files: a cache of its own, real data, tiny data, packages of strangers, figures not drawn."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import Install, forget

from cssbench import cli
from cssbench.data.synthetic import Synthetic

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache; subprocesses inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSSBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`command("list", "methods")` runs the command line: (exit code, stdout, stderr in one line)."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cssbench", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, " ".join(printed.err.split())

    return call


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (CamVid, an ADE20K sample, ADE20K's class lists); skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """24 + 8 scenes of 32 x 32 px with 6 classes. Shared by all tests: read only."""
    return Synthetic(tmp_path_factory.mktemp("synthetic"), classes=6, size=32, train=24, val=8)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install("pack", {"methods": {"mine": "mod:Cls"}}, files={"mod.py": "..."})` makes a distribution that is found.

    entry_points: a dict, or the text of entry_points.txt. Returns the folder of its metadata.
    """
    site, before = tmp_path / "site", set(sys.modules)
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def make(distribution: str, entry_points: Any, files: dict[str, str] | None = None, metadata: str = "") -> Path:
        text = entry_points
        if isinstance(entry_points, dict):
            groups = [(f"[cssbench.{group}]", *parts.items()) for group, parts in entry_points.items()]
            text = "\n".join(line if isinstance(line, str) else " = ".join(line) for group in groups for line in group)
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text(text)
        (info / "METADATA").write_text(metadata or f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        for name, content in (files or {}).items():
            (site / name).parent.mkdir(exist_ok=True)
            (site / name).write_text(content)
        forget()
        return info

    yield make
    monkeypatch.undo()
    for name in set(sys.modules) - before:
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    forget()


@pytest.fixture(scope="module")
def _one_thread() -> Iterator[None]:
    """PyTorch computes with one thread while the tests of the file run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _drawn_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not rendered, which takes most of the time of a report."""
    from cssbench.reports import plots

    empty = {"svg": b"<svg/>", "pdf": b"%PDF", "png": b"PNG"}
    monkeypatch.setattr(plots, "render", lambda draw: (draw(plots.LIGHT), dict(empty)))
