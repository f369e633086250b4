"""Reports as one HTML page that needs nothing else: no network, no other file.

Texts are hostile until proven otherwise. Jinja escapes every value; the only markup that passes is our own plots, in
which matplotlib escapes the names; and a content security policy lets the browser run our one script alone, by its
hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
import unicodedata
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from polar.core.text import blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LABEL_CHARACTERS = 32
"""Most characters of a policy's name in a plot."""
MAX_CHARACTERS_NAMED = 20
"""Most characters of a blank text that are shown by name."""
INK, ACCENT = "#101010", "#2a6fbb"
"""The style sheet recognises these and replaces them by the colours of the page, light or dark."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "polar",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The beginning of a text."""

    text: str
    characters: int
    """Of the whole text."""

    @property
    def left_out(self) -> int:
        """Characters that the excerpt lacks."""
        return self.characters - len(self.text)


def render(template: str, **values: object) -> str:
    """Return the page made of a template of this package; every name in the template needs a value."""
    environment = Environment(
        loader=PackageLoader("polar", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "csp_hash": _csp_hash}
    return environment.get_template(template).render(**values)


def visible(text: str) -> str:
    """Return a text with pictures of its control characters; of a blank text the names of its first characters."""
    if blank(text):
        return " ".join(f"U+{ord(character):04X}" for character in text[:MAX_CHARACTERS_NAMED])
    return "".join(_picture(character) for character in text)


def _picture(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) != "Cc":
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def label(name: str) -> str:
    """Return a name on one short line, for plots."""
    line = " ".join(visible(name).split())
    return line if len(line) <= MAX_LABEL_CHARACTERS else line[: MAX_LABEL_CHARACTERS - 1] + "…"


def svg(figure: Figure, title: str) -> Markup:
    """Return a figure as an SVG element; the title must be ours, not a text of the data."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    file = io.StringIO()
    with warnings.catch_warnings():
        # The browser has the glyphs of names that our font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = file.getvalue()
    return Markup(text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1))
