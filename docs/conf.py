"""How Sphinx makes the site of these pages: `ci/docs`."""

import inspect
import re
import sys
from pathlib import Path

import dask_batchinv

ROOT = Path(__file__).parent.parent

project = "dask_batchinv"
author = "The dask_batchinv developers"
version = release = dask_batchinv.__version__
html_title = f"{project} {release}"
html_theme = "furo"
html_show_copyright = False  # LICENSE has it
html_static_path = ["static"]
html_css_files = ["tables.css"]
exclude_patterns = ["_build"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx_click", "sphinx_copybutton"]

# Headings are linked to as on code hosts: `operators.md#slurm`.
myst_heading_anchors = 4

# In docstrings `inverse` is a name, and a link where it is one of ours.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # their docstrings say it in words, and shorter
numpydoc_show_class_members = False  # autodoc shows them
smartquotes = False  # "--json" is no dash

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

#: Pages that are files beside this folder.
BESIDE = {"overview": "README.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}


def _show_what_is_beside(app, docname, content):
    """Fill the pages that are files beside this folder, and have links to and from those files lead there."""
    if docname in BESIDE:
        path = ROOT / BESIDE[docname]
        app.env.note_dependency(path)
        content[0] = path.read_text().replace("](docs/", "](")
    for page, name in BESIDE.items():
        content[0] = re.sub(rf"\]\((\.\./)*{re.escape(name)}", f"](/{page}.md", content[0])


def _restore_modules():
    """Let classes say where they are from: there autodoc finds the docstrings of their fields."""
    for name in dask_batchinv.__all__:
        thing = getattr(dask_batchinv, name)
        if isinstance(thing, type):
            thing.__module__ = next(
                module
                for module in map(sys.modules.get, sorted(sys.modules))
                if module.__name__.startswith("dask_batchinv.")
                and vars(module).get(name) is thing
                and f"class {name}" in inspect.getsource(module)
            ).__name__


def _trim(app, docname, content):
    """Take the blank line away that ends an example for doctest, and would be shown."""
    content[0] = re.sub(r"(?m)\n\n```$", "\n```", content[0])


def _escape(app, context, lines):
    """Have help texts of commands mean what they say: they are no reStructuredText."""
    lines[:] = [line if line.startswith(".. ") else line.replace("*", r"\*") for line in lines]


def setup(app):
    """Connect what is ours."""
    _restore_modules()
    app.connect("source-read", _show_what_is_beside)
    app.connect("source-read", _trim)
    app.connect("sphinx-click-process-description", _escape)
    app.connect("sphinx-click-process-options", _escape)
