"""The site builds without a warning and without network, and no link or picture in it leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from cssbench import protocol, registry, scenario

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """ids: anchors of a page; links: what its links, pictures, styles and scripts name."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [
        "-q",
        "-n",
        "-W",
        "--keep-going",
        "-d",
        str(folder / "doctrees"),
        "-b",
        "html",
        "docs",
        str(folder / "html"),
    ]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


def broken(site: Path) -> list[str]:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                wrong.append(f"{path.relative_to(site)}: {link}: no such file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f"{path.relative_to(site)}: {link}: no such place")
    return wrong


def test_no_link_of_the_site_is_broken(site: Path):
    assert len(list(site.glob("*.html"))) > 30
    assert broken(site) == []


def test_a_broken_link_would_be_found(tmp_path: Path):
    (tmp_path / "a.html").write_text('<a href="b.html#x">1</a><a href="#here">2</a><img src="c.png"><p id="here">')
    (tmp_path / "b.html").write_text('<p id="y"><a href="https://example.org/">')
    assert broken(tmp_path) == ["a.html: b.html#x: no such place", "a.html: c.png: no such file"]


def test_the_reference_is_made_of_the_objects(site: Path):
    shown = (site / "generated" / "scenarios.html").read_text(encoding="utf-8")
    ours = [name for name, owner in scenario.names().items() if owner == registry.OWN]
    assert all(f'id="{name}"' in shown for name in ours)
    shown = unescape((site / "generated" / "protocols.html").read_text(encoding="utf-8"))
    assert all(one.id in shown and one.used_by in shown for one in protocol.BUILT_IN)
    shown = (site / "generated" / "commands.html").read_text(encoding="utf-8")
    assert "cssbench doctor" in shown
    assert "--scenario" in shown


def test_every_page_of_docs_is_in_the_site(site: Path):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file()
    menu = Page((site / "index.html").read_text(encoding="utf-8")).links
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index.html"} <= set(menu)
