"""A document as a list of blocks, rendered as Markdown, as text or as one HTML page."""

import base64
import hashlib
import html
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import quote

from bnrnn.errors import printable
from bnrnn.report.chart import Chart, embedded


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Link:
    """A link; `target` is a relative path."""

    text: str
    target: str


Inline = str | Code | Link
Text = Inline | tuple[Inline, ...]


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: Text


@dataclass(frozen=True)
class Bullets:
    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    """A table. `align` has one letter per column: l left, r right, w left and wrapped."""

    header: Sequence[Text]
    align: str
    rows: Sequence[Sequence[Text]]


@dataclass(frozen=True)
class Figure:
    """A figure. `draw` returns the picture, a matplotlib Figure.

    `chart`, if any, returns the same curves as data, for the HTML page to draw.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[], Any]
    chart: Callable[[], Chart] | None = None


@dataclass(frozen=True)
class Folded:
    """A collapsed section: the HTML page shows only the heading until the reader opens it."""

    heading: Heading
    blocks: Sequence[Paragraph | Bullets | Table]


Block = Heading | Paragraph | Bullets | Table | Figure | Folded


def to_markdown(blocks: Sequence[Block], pictures: str = "figures") -> str:
    """The blocks as Markdown; figures are linked as `pictures`/NAME.png."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {_markdown(text)}")
            case Paragraph(text):
                parts.append(_markdown(text))
            case Bullets(items):
                parts.append("\n".join(f"- {_markdown(item)}" for item in items))
            case Table(header, align, rows):
                marks = ["---:" if letter == "r" else "---" for letter in align]
                lines = [
                    f"| {' | '.join(_markdown(cell, in_table=True) for cell in row)} |"
                    for row in [header, *rows]
                ]
                parts.append("\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]]))
            case Figure(name, alt, caption):
                parts.append(
                    f"![{_markdown(alt)}]({pictures}/{quote(name)}.png)\n\n{_markdown(caption)}"
                )
            case Folded(heading, inner):
                parts.append(to_markdown([heading, *inner]).rstrip("\n"))
    return "\n\n".join(parts) + "\n"


def to_text(blocks: Sequence[Block]) -> str:
    """The blocks as text for a terminal of about 100 columns.

    Tables lose their wrapped columns; figures are omitted.
    """
    parts = []
    for block in blocks:
        match block:
            case Heading(_, text):
                parts.append(_plain(text))
            case Paragraph(text):
                parts.append(textwrap.fill(_plain(text), 98))
            case Bullets(items):
                parts.append("\n".join(f"- {_plain(item)}" for item in items))
            case Table(header, align, rows):
                parts.append(_aligned(header, align, rows))
            case Folded(heading, inner):
                parts.append(to_text([heading, *inner]))
            case Figure():
                pass
    return "\n\n".join(parts)


def _plain(text: Text) -> str:
    if isinstance(text, tuple):
        return "".join(_plain(part) for part in text)
    return _shown(text if isinstance(text, str) else text.text)


def _aligned(header: Sequence[Text], align: str, rows: Sequence[Sequence[Text]]) -> str:
    kept = [k for k, letter in enumerate(align) if letter != "w"]
    cells = [[_plain(row[k]) for k in kept] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if align[k] == "r" else cell.ljust(width)
            for k, cell, width in zip(kept, row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _shown(text: str) -> str:
    """The text on one line.

    Spaces at the ends remain: they separate the parts of a tuple.
    """
    return printable(re.sub(r"\s+", " ", text))


def _target(link: Link) -> str:
    return quote(link.target, errors="replace")


def _markdown(text: Text, in_table: bool = False) -> str:
    if isinstance(text, tuple):
        return "".join(_markdown(part, in_table) for part in text)
    if isinstance(text, Link):
        return f"[{_markdown(text.text, in_table)}]({_target(text)})"
    if isinstance(text, str):
        line = re.sub(r"[\\`*\[\]<>|~$]", r"\\\g<0>", _shown(text))
        # Markdown takes an underscore as emphasis unless it is inside a word.
        return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line.replace("&", "&amp;"))
    line = _shown(text.text).strip()
    if not line or (in_table and "\\|" in line):  # a table cell cannot contain this as code
        return _markdown(line, in_table)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    line = line.replace("|", "\\|") if in_table else line
    return f"{fence}{pad}{line}{pad}{fence}"


def to_html(title: str, blocks: Sequence[Block], pictures: dict[str, bytes]) -> str:
    """One self-contained HTML file; it needs no network.

    Its script, page.js, replaces the pictures with interactive charts and sorts the tables. Without
    JavaScript, the pictures remain. The content security policy blocks every other script, so that
    the name of a run cannot inject one.

    Args:
        pictures: the SVG of each `Figure`, by its name.
    """
    body = "\n".join(_block(block, pictures) for block in blocks)
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{_resource('page.css')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _resource(name: str) -> str:
    return resources.files("bnrnn.report").joinpath(name).read_text(encoding="utf-8")


def _block(block: Block, pictures: dict[str, bytes]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_html(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_html(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_html(item)}</li>" for item in items) + "</ul>"
        case Table(header, align, rows):

            def row(tag: str, cells: Sequence[Text]) -> str:
                found = [
                    f'<{tag} class="{letter}">{_html(cell)}</{tag}>'
                    for letter, cell in zip(align, cells, strict=True)
                ]
                return "<tr>" + "".join(found) + "</tr>"

            # With focus, the table can be scrolled by keyboard.
            return (
                '<div class="table" tabindex="0" role="group" aria-label="table"><table>\n'
                f"<thead>{row('th', header)}</thead>\n"
                "<tbody>" + "\n".join(row("td", cells) for cells in rows) + "</tbody></table></div>"
            )
        case Figure(name, alt, caption, _, chart):
            data = base64.b64encode(pictures[name]).decode("ascii")
            drawn_by_script = (
                f'\n<script type="application/json">{embedded(chart())}</script>\n' if chart else ""
            )
            return (
                f'<figure><img alt="{_escaped(alt)}" src="data:image/svg+xml;base64,{data}">'
                f"{drawn_by_script}<figcaption>{_html(caption)}</figcaption></figure>"
            )
        case Folded(heading, inner):
            content = "\n".join(_block(block, pictures) for block in inner)
            summary = _block(heading, pictures)
            return f"<details>\n<summary>{summary}</summary>\n{content}\n</details>"


def _html(text: Text) -> str:
    if isinstance(text, tuple):
        return "".join(map(_html, text))
    if isinstance(text, Code):
        return f"<code>{_escaped(text.text)}</code>"
    if isinstance(text, Link):
        return f'<a href="{html.escape(_target(text))}">{_escaped(text.text)}</a>'
    return _escaped(text)


def _escaped(text: str) -> str:
    return html.escape(_shown(text))
