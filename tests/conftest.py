"""Fixtures for every test: a cache of its own, real data where they lie beside the checkout, a tiny dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cssbench.data.synthetic import Synthetic

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache; subprocesses inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSSBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
