"""The documentation site: sphinx-build -W --keep-going docs docs/_build."""

from __future__ import annotations

import base64
import re
import shutil
import sys
from pathlib import Path

import nbformat
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import patchscore  # noqa: E402

project = "patchscore"
author = copyright = "The patchscore developers"
version = release = patchscore.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_nb",
    "sphinx_design",
    "sphinx-mathjax-offline",  # formulas show without a network
]
exclude_patterns = ["_build", "jupyter_execute"]

nb_execution_mode = "off"  # notebooks are committed with their outputs
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autosummary_generate = False
toc_object_entries = False
python_maximum_signature_line_length = 80
numpydoc_show_class_members = False
numpydoc_validation_checks: set[str] = set()  # the house style allows an equation as a summary

html_theme = "pydata_sphinx_theme"
html_title = "patchscore"
html_static_path = ["_static"]
html_css_files = ["patchscore.css"]
html_sidebars: dict[str, list[str]] = {"[!r]*": []}  # single pages have no sections to go through
html_theme_options = {
    "github_url": "https://github.com/patchscore/patchscore",
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    # Not on pages of results: their tables need the room.
    "secondary_sidebar_items": {"[!ir]*": ["page-toc"], "[!r]*/*": ["page-toc"]},
}

# The figure of each notebook that stands on its card: the number of the picture, from the top.
THUMBNAILS = {
    "00_first_steps": 0,
    "01_score_functions": 2,
    "02_score_matching": 0,
    "03_two_by_one_patches": 0,
    "04_map_and_tweedie": 0,
    "05_posterior_samples": 0,
    "06_patch_size": 0,
    "07_robustness": 0,
    "08_adaptation": 2,
    "09_inverse_problems": 0,
}


def copy_notebooks(app: Sphinx) -> None:
    """Copy the notebooks and one picture of each into docs/notebooks, where Sphinx looks for them."""
    for source in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        target = HERE / "notebooks" / source.name
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            shutil.copy2(source, target)
        pictures = [
            output.data["image/png"]
            for cell in nbformat.read(source, as_version=4).cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        picture = pictures[min(THUMBNAILS.get(source.stem, 0), len(pictures) - 1)]
        target.with_suffix(".png").write_bytes(base64.b64decode(picture))


def mark_up(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: show indented equations as they are, and |A| as a norm."""
    lines[:] = descriptions_below(equations_as_literals(lines))


def equations_as_literals(lines: list[str]) -> list[str]:
    """Indented paragraphs become literal blocks, except in the lists of parameters."""
    marked: list[str] = []
    inside, section, literal = False, "", False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip() and re.fullmatch(r"-{3,}", following.strip()):
            section, inside = line.strip(), False
        indented = line.startswith("    ") and line.strip() != ""
        prose = section in ("", "Notes", "References")
        if prose and indented and not inside and (not marked or not marked[-1].strip()):
            marked += ["::", ""]
            inside = literal = True
        elif line.strip() and not indented:
            inside = literal = False
        marked.append(line if literal else line.replace("|", r"\|"))
    return marked


def descriptions_below(lines: list[str]) -> list[str]:
    """``name : description`` of the house becomes what numpydoc takes for a description, not a type."""
    marked: list[str] = []
    section = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip() and re.fullmatch(r"-{3,}", following.strip()):
            section = line.strip()
        name, colon, description = line.partition(" : ")
        if colon and section in ("Attributes", "Parameters") and re.fullmatch(r"\w[\w, ]*", name):
            marked += [name, f"    {description}"]
        else:
            marked.append(line)
    return marked


def setup(app: Sphinx) -> None:
    """Connect the two steps above; docstrings before numpydoc (priority 500) reads them."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-process-docstring", mark_up, priority=400)
