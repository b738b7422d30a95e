"""A matplotlib figure becomes an SVG that lives inside a page: its colours and fonts are the page's own.

Figures are drawn in stand-in colours, which turn into the page's CSS variables here: so one drawing is right in light
and in dark. Text stays text; nothing in the SVG points out of it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#010101", "#010102", "#010103", "#010104"  # text, lesser text, grids, the background
SERIES = [f"#01020{number}" for number in range(8)]  # colours of data; told apart by colour-blind people too
_PAGE = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--card)"}
_PAGE |= {color: f"var(--s{number})" for number, color in enumerate(SERIES)}
WIDTH = 4.2  # inches of a figure: as wide as a phone, so that its text is as large there as the page's
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}href"

_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class called $x$ is called that
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


@contextmanager
def page_style() -> Iterator[None]:
    """Inside, figures are drawn for a page; no warning of a glyph that only the page's fonts have."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def plain(text: str, most: int = 40) -> str:
    """Someone's text on one line, without what no XML may hold, and not longer than `most` signs."""
    line = re.sub(r"\s+", " ", "".join(sign if sign.isprintable() or sign.isspace() else "\ufffd" for sign in text))
    line = line.strip()
    return line if len(line) <= most else line[: most - 1] + "…"


def to_svg(figure: Figure, name: str, *, alt: str, tips: Mapping[str, str] | None = None) -> str:
    """`figure` as an SVG element for a page, where `name` is its own; `alt` is read out instead of it.

    `tips` gives what a pointer shows over the artists with these ids (`set_gid`).
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue().encode())
    for junk in root.findall(f"{_SVG}metadata"):
        root.remove(junk)
    for element in root.iter():
        _make_own(element, name, tips or {})
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", plain(alt, 1000))
    return ElementTree.tostring(root, encoding="unicode")


def _make_own(element: ElementTree.Element, name: str, tips: Mapping[str, str]) -> None:
    """Ids become those of this figure, colours and fonts those of the page."""
    number = element.get("id")
    if number is not None:
        if number in tips:
            title = ElementTree.Element(f"{_SVG}title")
            title.text = plain(tips[number], 300)
            element.insert(0, title)
        element.set("id", f"{name}-{number}")
    if element.get(_XLINK, "").startswith("#"):
        element.set(_XLINK, f"#{name}-{element.attrib[_XLINK][1:]}")
    if "clip-path" in element.attrib:
        element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))
    style = element.get("style")
    if style:
        style = re.sub(r"#0[0-9a-f]{5}", lambda found: _PAGE.get(found[0], found[0]), style)
        if element.tag == f"{_SVG}text":
            style = re.sub(r"font: (?:\w+ )?([\d.]+px)[^;]*", r"font-size: \1", style)
        element.set("style", style)
