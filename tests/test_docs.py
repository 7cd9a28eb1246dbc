"""Every block of README and docs runs, or is checked down to its last setting; what is not is listed with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import doc_blocks
import pytest
from doc_blocks import PAGES, ROOT, SHELL, Stage, blocks

pytestmark = pytest.mark.usefixtures("_one_thread")

# (page, command or first line of a block) -> why it is not run.
NOT_RUN = {
    ("docs/export.md", "import numpy as np"): "inside an exported folder; tests/test_export.py reads every model so",
    ("docs/resume.md", "^C"): "a key, not a command",
    ("docs/devices.md", 'HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'): "needs a SLURM cluster",
}
# Page -> what its fragments of Python have around them.
GIVEN = {
    "docs/backbones.md": """
import torch
from cssbench.models.backbone import Backbone, BackboneConfig
from cssbench.models.packed import pack, run_block

backbone = Backbone(BackboneConfig(
    name="vit_tiny_patch16_224", image_size=32, patch=8, width=16, depth=2, heads=2, layers=[2], drop_path=0.0))
H = W = 32
images, keep = torch.zeros(2, 3, H, W), torch.arange(16).expand(2, 16) < 9
"""
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doc_blocks.make_stock(tmp_path_factory.mktemp("stock"))


def play(page: str, folder: Path, stock: Path, real: bool) -> Stage:
    stage = Stage(folder, stock, real, NOT_RUN)
    exec(GIVEN.get(page, ""), stage.names)
    with doc_blocks.imports_of(folder), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(page):
            stage.write(block)
        for block in blocks(page):
            stage.play(block)
    return stage


@pytest.mark.usefixtures("_drawn_only")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks_of_a_page(page: str, tmp_path: Path, stock: Path):
    stage = play(page, tmp_path, stock, real=False)
    assert stage.used == {key for key in NOT_RUN if key[0] == page}, "NOT_RUN names what is no more"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks_of_a_page_with_training(page: str, tmp_path: Path, stock: Path):
    play(page, tmp_path, stock, real=True)


def test_no_page_hides_code_in_indentation():
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
        hidden = [line for line in re.findall(r"(?<=\n\n) {4}(\S[^\n]*)", text) if not line.startswith(("-", "*"))]
        assert not hidden, f"{page}: an indented block is not run; fence it: {hidden[0]}"


def test_what_is_not_run_has_a_reason():
    known = {page: blocks(page) for page, _ in NOT_RUN}
    for (page, what), reason in NOT_RUN.items():
        lines = [line for block in known[page] for line in (block.text.split("\n")[0], *block.commands)]
        assert what in lines, f"{page} has no {what!r} any more"
        assert len(reason) > 10


def test_the_pages_have_blocks_of_each_kind():
    languages = [block.language for page in PAGES for block in blocks(page)]
    assert sum(language in SHELL for language in languages) > 20
    assert {"python", "toml", "yaml"} <= set(languages)
