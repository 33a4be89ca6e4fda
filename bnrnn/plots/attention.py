"""The attention of an Attentive Reader: its passage, with each word shaded by its weight."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from bnrnn.plots.style import plain, plt

_COLUMNS = 110  # characters per line
_FONT = {"family": "monospace", "size": 8}
_CHARACTER, _LINE = 0.6 * 8 / 72, 1.7 * 8 / 72  # inches
_GROUND = LinearSegmentedColormap.from_list("attention", ["#FFFFFF", "#E69F00"])


def heat_map(
    words: Sequence[str],
    weights: np.ndarray,
    question: Sequence[str],
    lines: Sequence[str] = (),
) -> Figure:
    """Draw a passage of T words with its attention weights.

    words: T of them. weights: α, (T,). lines: printed below the question.
    """
    strength = np.sqrt(weights / weights.max())  # keep small weights visible
    placed: list[tuple[int, int, str, float]] = []
    row = column = 0
    for word, weight in zip(words, strength, strict=True):
        if column > 0 and column + len(word) > _COLUMNS:
            row, column = row + 1, 0
        placed.append((row, column, word, float(weight)))
        column += len(word) + 1
    head = [*_wrapped(question), *lines]
    rows = len(head) + 1 + row + 1
    width, height = (_COLUMNS + 2) * _CHARACTER, (rows + 1) * _LINE
    figure = plt.figure(figsize=(width, height), facecolor="white")

    def write(row: float, column: int, text: str, **style) -> None:
        x = (column + 1) * _CHARACTER / width
        figure.text(
            x, 1 - (row + 1) * _LINE / height, plain(text), fontdict=_FONT, va="center", **style
        )

    for number, line in enumerate(head):
        write(number, 0, line, weight="bold" if number < len(head) - len(lines) else "normal")
    for row, column, word, weight in placed:
        ground = {"facecolor": _GROUND(weight), "edgecolor": "none", "pad": 1.2}
        write(len(head) + 1 + row, column, word, bbox=ground)
    return figure


def _wrapped(words: Sequence[str]) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _COLUMNS:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines
