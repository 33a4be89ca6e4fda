"""A document as a list of blocks, and the same blocks as Markdown and as one HTML page."""

import base64
import html
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from bnrnn.errors import printable


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Link:
    """target: a relative path."""

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
    """`align` has a letter a column: l left, r right, w left and wrapped where it is long."""

    header: Sequence[Text]
    align: str
    rows: Sequence[Sequence[Text]]


@dataclass(frozen=True)
class Figure:
    """`draw` makes the picture (a matplotlib Figure); who renders the document calls it."""

    name: str
    alt: str
    caption: str
    draw: Callable[[], Any]


Block = Heading | Paragraph | Bullets | Table | Figure


def to_markdown(blocks: Sequence[Block], pictures: str = "figures") -> str:
    """Figures are linked as `pictures`/NAME.png."""
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
    return "\n\n".join(parts) + "\n"


def to_text(blocks: Sequence[Block]) -> str:
    """For a terminal, of 100 columns or so: a table without its wrapped columns, no figures."""
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
    """On one line; spaces at the ends matter between the parts of a tuple."""
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
        # An underscore within a word is one; elsewhere it is emphasis.
        return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line.replace("&", "&amp;"))
    line = _shown(text.text).strip()
    if not line or (in_table and "\\|" in line):  # of which a table cannot have code
        return _markdown(line, in_table)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    line = line.replace("|", "\\|") if in_table else line
    return f"{fence}{pad}{line}{pad}{fence}"


def to_html(title: str, blocks: Sequence[Block], pictures: dict[str, bytes]) -> str:
    """One file that needs no other.

    Args:
        pictures: the name of each `Figure` -> its SVG.
    """
    body = "\n".join(_block(block, pictures) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


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

            # The focus lets a keyboard scroll it.
            return (
                f'<div class="table" tabindex="0"><table>\n<thead>{row("th", header)}</thead>\n'
                "<tbody>" + "\n".join(row("td", cells) for cells in rows) + "</tbody></table></div>"
            )
        case Figure(name, alt, caption):
            data = base64.b64encode(pictures[name]).decode("ascii")
            return (
                f'<figure><img alt="{_escaped(alt)}" src="data:image/svg+xml;base64,{data}">'
                f"<figcaption>{_html(caption)}</figcaption></figure>"
            )


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


_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fff; --ink: #1c1e21; --faint: #5b626b; --rule: #dfe2e6; --shade: #f6f7f9;
}
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --ink: #e4e6e9; --faint: #9aa2ab; --rule: #32373d; --shade: #1c2024; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h1 { font-size: 1.9rem; margin: 0 0 1rem; }
h2 {
  font-size: 1.4rem; margin: 3rem 0 1rem; padding-top: 1.2rem; border-top: 1px solid var(--rule);
}
h3 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p, ul { max-width: 46rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { color: var(--faint); font-weight: 600; border-bottom: 2px solid var(--rule); }
td { border-bottom: 1px solid var(--rule); }
tbody tr:hover { background: var(--shade); }
.r { text-align: right; }
.w { white-space: normal; min-width: 7rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { padding-left: 0; }
code {
  font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere;
}
figure { margin: 1.5rem 0; }
figure img {
  display: block; width: 100%; max-width: 48rem; height: auto;
  background: #fff; border-radius: 6px; padding: .4rem;
}
/* Black on white becomes white on the page's ground; hues stay, and so do the legends. */
@media (prefers-color-scheme: dark) {
  figure img { filter: invert(.92) hue-rotate(180deg); }
}
figcaption { color: var(--faint); font-size: .875rem; max-width: 46rem; margin-top: .5rem; }
@media (max-width: 40rem) { main { padding: 1.25rem .9rem 3rem; } }
"""
