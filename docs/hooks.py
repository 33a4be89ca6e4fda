"""What MkDocs does to the pages beside building them.

Links that leave docs/ (to results, examples and source files) lead to copies within the site, and
formulas become MathML, which browsers draw without any script.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)\)")
_RUN = re.compile(r"\[([^\]]*)\]\(runs/[^)]*\)")  # a folder: there is nothing to look at
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = Path(config.docs_dir).glob("*.md")
    wanted = {path for page in pages for _, path in _OUTSIDE.findall(page.read_text("utf-8"))}
    results = [p for p in (ROOT / "results").rglob("*") if p.suffix in (".md", ".png")]
    wanted |= {path.relative_to(ROOT).as_posix() for path in results}
    for path in sorted(wanted):
        if (ROOT / path).is_file():
            files.append(File.generated(config, _shown(path), abs_src_path=str(ROOT / path)))
    return files


def _shown(path: str) -> str:
    """A browser shows a source file as text only if it is named so."""
    return path + ".txt" if path.endswith((".py", ".h")) else path


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def within(link: re.Match[str]) -> str:
        text, path = link.groups()
        return f"[{text}]({_shown(path)})" if (ROOT / path).is_file() else text

    return _RUN.sub(r"\1", _OUTSIDE.sub(within, markdown))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def drawn(formula: re.Match[str]) -> str:
        display: Any = "block" if formula[1] == "div" else "inline"
        return convert(html.unescape(formula[2]).strip(), display=display)

    return _FORMULA.sub(drawn, content)
