"""Pages are written for a plain file view too: what a link of theirs to the rest of the checkout becomes here.

- README.md and CHANGELOG.md of the checkout, and reports/results/README.md, are included by pages of the site;
- a page that index.md does not list stands in the place UNLISTED there;
- any other file of the checkout is named as text, since the site does not hold it;
- a docstring is plain English, not reStructuredText: a list or an indented tree in it is kept as it stands.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

INCLUDED = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "reports/results/README.md": "results.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def relink(text: str, page: str) -> str:
    """`text` of the page `page` (its file, relative to the checkout), whose links lead to pages of the site or away."""
    here = posixpath.dirname(page)

    def one(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(here, target))
        if path in INCLUDED:
            return f"[{label}](/{INCLUDED[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{label}](/{path.removeprefix('docs/')}{anchor})"
        return f"{label} (`{path}` of the checkout)" if label.strip("`") != path else f"`{path}`"

    return LINK.sub(one, text)


def on_source(app: Any, docname: str, source: list[str]) -> None:
    """Pages that stand for a file of the checkout get its text; all others get their links mended."""
    for file, page in INCLUDED.items():
        if page == f"{docname}.md":
            text = (Path(app.srcdir).parent / file).read_text(encoding="utf-8")
            source[0] = relink(text, file)
            app.env.note_dependency(str(Path(app.srcdir).parent / file))
            return
    source[0] = relink(source[0], f"docs/{docname}.md")
    if docname == "index":
        listed = set(re.findall(r"^(?:.*<)?([\w./-]+)>?$", source[0], re.M))
        source[0] = source[0].replace("UNLISTED", "\n".join(sorted(app.env.found_docs - listed - {"index"})))


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Blocks of a docstring that are drawn with spaces stand as they are; a list becomes one of Markdown's kind."""
    made: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        rows = block.split("\n")
        drawn = any(re.match(r"\s*[├└│]", row) for row in rows) or all(row.startswith("    ") for row in rows if row)
        if drawn and block.strip():
            made += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            made += [*_paragraph(rows), ""]
    lines[:] = made


def _paragraph(rows: list[str]) -> list[str]:
    """Indented continuation of a "name: what" line joins it; every such line stands on its own."""
    made: list[str] = []
    for row in rows:
        text = row.replace("*", "\\*").replace("|", "\\|").replace("_ ", "\\_ ")
        if row.startswith((" ", "\t")) and made and made[-1]:
            made[-1] += " " + text.strip()
        elif re.match(r"(- |[\w, `/()+-]{1,40}: )", row) and made and made[-1]:
            made += ["", text.strip()]
        else:
            made.append(text)
    return made


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", on_source)
    app.connect("autodoc-process-docstring", on_docstring)
    return {"parallel_read_safe": True}
