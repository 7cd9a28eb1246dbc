"""What run folders hold reaches pages, tables and file names escaped; really drawn, the same bytes twice."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_runs import (
    IDS,
    LABEL,
    Reader,
    add_samples,
    joint,
    learner,
)

from cssbench.reports import formats
from cssbench.reports import html as page


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (float("nan"), "–"), (0.12345, "12.35"), (-0.5, "−50.00"), (-1e-9, "0.00"), (1, "100.00")],
)
def test_percent(value, shown):
    assert formats.percent(value) == shown


def test_latex_escape_keeps_to_what_pdflatex_sets():
    assert formats.latex_escape("a_b & 5%") == r"a\_b \& 5\%"
    assert formats.latex_escape("\\input{x}$^~") == r"\textbackslash{}input\{x\}\$\textasciicircum{}\textasciitilde{}"
    assert formats.latex_escape("é中\n") == r"é\textbackslash{}u4e2d "


HOSTILE = "<b onclick=alert(1)>&_$%#[1]{x}~^|*`\\input"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> list[Path]:
    tmp_path = tmp_path_factory.mktemp("hostile")
    run = learner(
        tmp_path / HOSTILE,
        classes=["<script>alert(1)</script>", "</style><img src=x onerror=alert(2)>", "a_b & 100% $x$"],
        method="<script>alert(3)</script>",
        scenario="toy<script>alert(4)</script>",
        note="</title><script>alert(5)</script> \\write18{x} 中",
        provenance={"command": ["<script>", "a b"], "commit": "'\"><script>", "data": {"<script>": "<i>"}},
    )
    add_samples(run)
    return page.write([run, joint(tmp_path / "_j$")], tmp_path / "out", IDS)


def test_page_escapes_everything_from_files(hostile):
    reader = Reader(hostile[0].read_text(encoding="utf-8"))
    assert not {tag for tag, _ in reader.tags} & {"script", "i", "iframe", "object", "link", "base", "form"}
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert all(not attributes for tag, attributes in reader.tags if tag == "b")  # ours
    assert "<script>alert(1)</script>" in reader.text
    assert HOSTILE in reader.text
    assert LABEL in reader.text


def test_page_is_one_file_without_network(hostile):
    text = hostile[0].read_text(encoding="utf-8")
    for tag, attributes in Reader(text).tags:
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert str(attributes[name]).startswith(("data:image/", "#")), (tag, name)
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_file_names_are_tame(hostile):
    assert all(re.fullmatch(r"[A-Za-z0-9@._-]+", path.name) for path in hostile)


def test_markdown_rows_keep_their_columns(hostile):
    text = next(path for path in hostile if path.name == "summary.plop@1.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
    assert "<script" not in re.sub(r"\\<", "", text)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles(hostile):
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"],
        cwd=hostile[0].parent, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]


def test_same_bytes_twice(tmp_path):
    runs = [learner(tmp_path / "a"), joint(tmp_path / "j")]
    add_samples(runs[0])
    first, second = (page.write(runs, tmp_path / name, ["plop@1"]) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
