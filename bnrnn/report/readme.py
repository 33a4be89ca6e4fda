"""The numbers in README.md and docs/: our results and the cost of a training step.

They are between `<!-- results: NAME -->` and `<!-- end of results -->`. NAME is "experiments" (a
table of commands with a column for our results), "family" (a table of models with two such
columns), "speed" or "gpu". `make results` writes them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnrnn.kernels.triton import plan
from bnrnn.report import paper
from bnrnn.report.document import Code, Table, Text, to_markdown
from bnrnn.report.groups import BASELINES, unlike
from bnrnn.report.leaderboard import standings, target
from bnrnn.runs.find import find_runs
from bnrnn.runs.record import Run

_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
_COMMAND = re.compile(r"\| `bnrnn task=(\w+) model=(\w+)` \|")
_OURS = 3  # index of our column; index 0 is the text before the first bar
_MODEL = re.compile(r"`model=(\w+)`")
_FAMILY = "pydocs"  # the data on which the models are compared
_GPU = "gpu-nvidia-h200.json"  # written by `make gpu-check`
_SHAPES = {
    "pMNIST": "permuted MNIST",
    "PTB": "Penn Treebank",
    "text8": "text8",
    "reader": "Attentive Reader",
}
_SIZES = {"T": "steps", "B": "batch", "H": "hidden"}


def pages(root: Path) -> list[Path]:
    """The pages that may contain such numbers: README.md and the pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def refreshed(text: str, results: Path, to_results: str = "results") -> str:
    """The text of a page, updated with the numbers in `results`.

    Args:
        to_results: the relative path from the page to `results`.
    """
    blocks: dict[str, Callable[[str], str]] = {
        "experiments": lambda block: _experiments(block, find_runs(results / "runs"), to_results),
        "family": lambda block: _family(block, find_runs(results / "runs")),
        "speed": lambda block: _speed(results / "bench" / "recurrence.json"),
        "gpu": lambda block: _gpu(results / "bench" / _GPU),
    }
    return _BLOCK.sub(lambda found: found[1] + blocks[found[2]](found[3]) + found[4], text)


def _experiments(block: str, runs: list[Run], to_results: str) -> str:
    """The same table, with our results in each row whose command has a task and a model."""

    def fill(found: re.Match[str], cells: list[str]) -> None:
        cells[_OURS] = f" {ours(runs, found[1], found[2], to_results)} "

    return _filled(block, _COMMAND, fill)


def _filled(
    block: str, names: re.Pattern[str], fill: Callable[[re.Match[str], list[str]], None]
) -> str:
    """The same table, after `fill(match, cells)` for each row in which `names` is found."""
    rows = []
    for row in block.splitlines():
        cells = row.split("|")
        if found := names.search(row):
            fill(found, cells)
        rows.append("|".join(cells) + "\n")
    return "".join(rows)


def ours(runs: list[Run], data: str, model: str, to_results: str = "results") -> str:
    """Our result, from runs with the paper's settings, of any length.

    `90.4 % (LSTM 81.2) after 20 epochs`; if the LSTM's run is of another length, `90.4 % after 20
    epochs (LSTM 90.9 after 89)`.
    """
    if model.startswith("words_"):
        baseline = model.removesuffix("_bn_input")
    else:
        baseline = f"{model.partition('_')[0]}_lstm"
        baseline = baseline if baseline in BASELINES else "lstm"
    alike = [run for run in runs if run.data == data and run.result is not None and _usual(run)]
    found = {run.model: run for run in sorted(alike, key=lambda run: (run.step, -run.seed))}
    if model not in found or baseline not in found:
        others = [run.subject.data_title for run in runs if run.data.startswith(f"{data}-")]
        if any((run.data, run.model) == (data, model) for run in runs):
            others.insert(0, "with other settings")
        return f"[only {others[0]}]({to_results}/README.md)" if others else "not run yet"
    run, base = found[model], found[baseline]
    metric = run.metric
    decimals = metric.decimals - (metric.unit == "%")
    test, base_test = (metric.number(r.final("test"), decimals) for r in (run, base))
    number = f"{test} {metric.unit or metric.title}"
    if run.settings.get("patience") is not None:
        return f"{number} (LSTM {base_test}), trained until they stop improving"
    epochs, base_epochs = (f"{r.result.epochs:.3g}" for r in (run, base) if r.result is not None)
    if epochs == base_epochs:
        return f"{number} (LSTM {base_test}) after {epochs} epochs"
    return f"{number} after {epochs} epochs (LSTM {base_test} after {base_epochs})"


def _family(block: str, runs: list[Run]) -> str:
    """The same table, with test and speed in the last two columns of each row that has a model."""
    ranked = standings([run for run in runs if run.data == _FAMILY])
    by_model = {standing.first.model: standing for standing in ranked}

    def fill(found: re.Match[str], cells: list[str]) -> None:
        shown = ("not run yet", "-")
        if (standing := by_model.get(found[1])) is not None:
            shown = (standing.test_shown(), standing.steps_shown(target(ranked)[0]))
        cells[-3:-1] = (f" {cell} " for cell in shown)

    return _filled(block, _MODEL, fill)


def _usual(run: Run) -> bool:
    theirs = paper.settings(run.data, run.model) or paper.usual(run.subject.task, run.model)
    return not unlike(run, theirs)


def _speed(file: Path) -> str:
    """A table of times per training step, as multiples of `nn.LSTM`'s."""
    rows = []
    for name, shape in json.loads(file.read_text(encoding="utf-8"))["shapes"].items():
        steps = {subject: row["step"] for subject, row in shape["subjects"].items()}
        ratios = (steps[subject] / steps["nn.LSTM"] for subject in ("bnrnn", "plain loop"))
        rows.append([_title(name, shape), *(f"{ratio:.2f}" for ratio in ratios)])
    header = [
        ("training step, as a multiple of ", Code("nn.LSTM"), "'s"), Code("bnrnn.BNLSTM"),
        "a Python loop",
    ]  # fmt: skip
    return to_markdown([Table(header, "lrr", rows)])


def _gpu(file: Path) -> str:
    """A table of GPU times per training step, as multiples of `nn.LSTM`'s.

    BNLSTM uses the kernel that it chooses for the size and the precision.
    """
    rows: dict[str, list[Text]] = {}
    for shape in json.loads(file.read_text(encoding="utf-8"))["shapes"]:
        way = plan.way(shape["hidden"], shape["products"])
        step = {subject: row["step"] for subject, row in shape["subjects"].items()}
        cells = rows.setdefault(shape["name"], [_title(shape["name"], shape)])
        cells.append(f"{step[way] / step['nn.LSTM']:.1f}")
        if shape["products"] == "float32":
            loop = f"{step['reference'] / step['nn.LSTM']:.0f}"
            cells.append(loop)
    header = [
        ("training step, as a multiple of ", Code("nn.LSTM"), "'s"), "float32",
        "reference kernel, float32", "TF32", "bfloat16",
    ]  # fmt: skip
    return to_markdown([Table(header, "lrrrr", list(rows.values()))])


def _title(name: str, shape: dict[str, Any]) -> str:
    sizes = (f"{letter} {shape[key]}" for letter, key in _SIZES.items())
    return f"{_SHAPES[name]}: {', '.join(sizes)}"
