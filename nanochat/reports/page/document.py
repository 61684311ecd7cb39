"""The HTML document around tables and charts, and the small elements that it is made of."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from nanochat.reports.page.chart import COLOURS


@dataclass(frozen=True)
class Section:
    """A heading and the HTML elements below it; an empty one is left out."""

    heading: str
    elements: Sequence[str]


def document(title: str, lead: Sequence[str], sections: Iterable[Section], foot: str = "") -> str:
    """A whole page.

    Args:
        title: plain text, as all that is not called an element.
        lead: elements under the title. foot: the last line.
    """
    script = _asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    body = "\n".join(_section(section) for section in sections if any(section.elements))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_asset("style.css")}</style>
</head>
<body>
<main>
<header>
<h1>{html.escape(title)}</h1>
{"".join(lead)}
</header>
{body}
<footer>{html.escape(foot)}</footer>
</main>
<div id="tip" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; kind: a class of the style (`verdict`, `note`, `soft`)."""
    return f"<p{_class(kind)}>{html.escape(text)}</p>"


def verbatim(text: str) -> str:
    """Text as it is, in a block."""
    return f"<pre>{html.escape(text)}</pre>"


def details(summary: str, element: str) -> str:
    """An element that is folded away."""
    return f"<details><summary>{html.escape(summary)}</summary>{element}</details>" if element else ""


def facts(pairs: Mapping[str, str]) -> str:
    """Names and their texts."""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in pairs.items() if text)
    return f"<dl>{rows}</dl>" if rows else ""


def columns(elements: Iterable[str], kind: str = "charts") -> str:
    """Elements side by side where there is room."""
    present = [element for element in elements if element]
    return f'<div class="{kind}">{"".join(present)}</div>' if present else ""


def legend(names: Sequence[str]) -> str:
    """The arms by number, each with a box that hides it everywhere on the page; it works without a script."""
    rules = "".join(f'body:has(#arm-{i}:not(:checked)) [data-arm="{i}"]{{display:none}}\n' for i in range(len(names)))
    boxes = "".join(
        f'<label class="c{i % COLOURS} d{i // COLOURS % 3}"><input type="checkbox" id="arm-{i}" checked>'
        f'<svg viewBox="0 0 24 10" aria-hidden="true"><path class="line" d="M1 5H23"/></svg>{html.escape(name)}</label>'
        for i, name in enumerate(names)
    )
    return f'<style>{rules}</style><fieldset class="legend"><legend>Arms</legend>{boxes}</fieldset>'


def _section(section: Section) -> str:
    return f"<section>\n<h2>{html.escape(section.heading)}</h2>\n{chr(10).join(section.elements)}\n</section>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


@cache
def _asset(name: str) -> str:
    return files("nanochat.reports.page").joinpath(name).read_text(encoding="utf-8")
