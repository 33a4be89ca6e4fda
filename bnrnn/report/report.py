"""The report on all runs in a folder: tables and figures, as Markdown and as one HTML page."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bnrnn.errors import CheckpointError
from bnrnn.plots.style import encode, plt
from bnrnn.report import by_paper, leaderboard, run_tables
from bnrnn.report.analyses import furthest
from bnrnn.report.analysis_figures import FIGURES
from bnrnn.report.document import (
    Block,
    Code,
    Figure,
    Heading,
    Inline,
    Paragraph,
    Text,
    to_html,
    to_markdown,
    to_text,
)
from bnrnn.runs.analysis import Analysis
from bnrnn.runs.files import write_atomic
from bnrnn.runs.find import Found, find
from bnrnn.runs.record import Run
from bnrnn.runs.text import quoted, slug

Pictures = dict[str, dict[str, bytes]]  # name -> kind -> encoded

_HOW_TO_READ = (
    "Each number is the test of the model with the best validation (of the last model with "
    "selection=last). It uses population statistics, averaged over the training set or over "
    "test_calibration_batches batches of it. If the paper has no test number, the number is marked "
    "valid, and is the best validation with batch statistics. A row is a group of runs that differ "
    "only in their seed: the mean with the standard deviation over three seeds or more (by n - 1), "
    "or the range of two. The paper's number is reached if ours is better, or if it is within that "
    "spread or, with one seed, the same as ours in the paper's decimals. The verdict also states "
    "what our runs lack: steps, seeds, or the paper's settings."
)


def write_report(outputs: Path, target: Path) -> None:
    """Write a report on all runs and analyses under `outputs` to `target`.

    The files are report.md, report.html and figures/.

    Raises:
        CheckpointError: there are no runs or analyses under `outputs`.
        OutputError: the files cannot be written.
    """
    found = find(outputs)
    if not (found.runs or found.analyses or found.unreadable):
        raise CheckpointError(
            f"no run under {outputs}: train one first, or name another folder with outputs=DIR"
        )
    blocks = document(
        found,
        "Report",
        "Every run under the outputs folder, against what the papers report.",
        lambda run: Code(run_tables.place(found, run.path)),
        resume=lambda run: f"bnrnn resume={quoted(run.path)}",
    )
    _write_document("report", "bnrnn: report", blocks, target)


def write_leaderboard(outputs: Path, target: Path) -> str:
    """Write the leaderboards of all runs under `outputs` to `target`, as HTML and as Markdown.

    Returns:
        the leaderboards as text for a terminal.

    Raises:
        CheckpointError: no data set has finished runs of enough models.
        OutputError: the files cannot be written.
    """
    found = leaderboard.blocks(find(outputs).runs)
    if not found:
        raise CheckpointError(
            f"no data set under {outputs} has finished runs of {leaderboard.FEWEST} models: train "
            "more, or name another folder with outputs=DIR"
        )
    _write_document("leaderboard", "bnrnn: leaderboard", found, target)
    return to_text(found)


def _write_document(name: str, title: str, blocks: list[Block], target: Path) -> None:
    """Write NAME.md, NAME.html and their figures, and remove figures that are no longer used."""
    blocks, pictures = draw(blocks, ("png", "svg"))
    figures = target / "figures"
    write_pictures(figures, pictures)
    for picture in figures.glob("*.*"):
        if picture.stem not in pictures and picture.suffix in (".png", ".svg"):
            picture.unlink()
    vectors = {name: kinds["svg"] for name, kinds in pictures.items()}
    write_atomic(target / f"{name}.md", to_markdown(blocks).encode())
    write_atomic(target / f"{name}.html", to_html(title, blocks, vectors).encode())


def draw(blocks: Sequence[Block], kinds: Sequence[str]) -> tuple[list[Block], Pictures]:
    """The document and its pictures; a figure that cannot be drawn becomes a line of text."""
    drawn: list[Block] = []
    pictures: Pictures = {}
    for block in blocks:
        if isinstance(block, Figure):
            try:
                figure = block.draw()
                pictures[block.name] = {kind: encode(figure, kind) for kind in kinds}
            # matplotlib raises various errors for numbers that it cannot draw.
            except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
                block = Paragraph(f"{block.alt}: no figure, its numbers cannot be drawn ({error}).")
            finally:
                plt.close("all")
        drawn.append(block)
    return drawn, pictures


def write_pictures(folder: Path, pictures: Pictures) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, encoded in pictures.items():
        for kind, content in encoded.items():
            write_atomic(folder / f"{name}.{kind}", content)


def document(
    found: Found,
    title: str,
    introduction: Text,
    name: Callable[[Run], Inline],
    resume: Callable[[Run], str] | None = None,
) -> list[Block]:
    """The report as blocks.

    Args:
        name: returns the name of a run in the tables.
        resume: returns the command that resumes a stopped run; None: show no command.
    """
    return _named_apart([
        Heading(1, title),
        Paragraph(introduction),
        Paragraph(run_tables.counts(found)),
        *run_tables.overview(found.runs),
        Paragraph(_HOW_TO_READ),
        *by_paper.results(found.runs),
        *leaderboard.blocks(found.runs),
        *_analyses(furthest(found.analyses)),
        *run_tables.unfinished(found, name, resume),
        *run_tables.all_runs(found.runs, name),
        *by_paper.same_step(found.runs, name),
        *by_paper.not_run(found.runs),
    ])  # fmt: skip


def _named_apart(blocks: list[Block]) -> list[Block]:
    """The blocks, with a unique file name for each figure."""
    taken: set[str] = set()
    named: list[Block] = []
    for block in blocks:
        if isinstance(block, Figure):
            names = (f"{slug(block.name, most=150)}{f'-{k}' * (k > 1)}" for k in itertools.count(1))
            block = replace(block, name=next(name for name in names if name not in taken))
            taken.add(block.name)
        named.append(block)
    return named


def _analyses(found: dict[str, Analysis]) -> list[Block]:
    """A figure for each analysis and data set; Penn Treebank, the paper's data, comes first."""
    by_figure: dict[tuple[str, str | None], list[Analysis]] = {}
    for name in sorted(found, key=lambda name: ("-ptb-" not in name, name)):
        analysis = found[name]
        data = None if analysis.of is None else analysis.of.data
        by_figure.setdefault((analysis.analysis, data), []).append(analysis)
    blocks: list[Block] = []
    for kind, data in sorted(by_figure, key=lambda key: list(FIGURES).index(key[0])):
        entry, members = FIGURES[kind], by_figure[kind, data]
        name, title, of = kind, entry.title, members[0].of
        if of is not None and of.data != "ptb":
            name, title = f"{kind}-{of.data}", f"{title}: {of.data_title}"
        draw_it = functools.partial(entry.draw, members)
        blocks += [Heading(3, title), Figure(name, title, entry.caption_on(data), draw_it)]
    return [Heading(2, "Analyses"), *blocks] if blocks else []
