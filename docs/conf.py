"""The site: `make docs` writes build/site. No network, warnings are errors."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "cssbench"
version = release = installed("cssbench")
copyright = "the cssbench authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "reference", "plain_files"]
exclude_patterns = ["_ext"]
templates_path: list[str] = []

myst_heading_anchors = 4  # [text](page.md#heading) works, as it does on a plain file view
myst_enable_extensions = ["colon_fence"]
highlight_language = "console"  # of blocks that name no language
smartquotes = False  # "--" in prose is an option
default_role = "code"  # docstrings write `name`
suppress_warnings = ["misc.highlighting_failure"]  # console blocks with ^C, [options] and the like

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
autodoc_preserve_defaults = True
nitpicky = True
# Types stand in signatures as they are; their own pages are not ours, or are named in full nowhere.
nitpick_ignore_regex = [(r"py:.*", r".*")]

html_theme = "furo"
html_title = f"cssbench {release}"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
