"""The numbers in README.md, docs/ and results/family/: our results and the cost of a step.

They are between `<!-- results: NAME -->` and `<!-- end of results -->`. NAME is "experiments" (a
table of commands with a column for our results), "family" (a table of models with two such
columns), "families" (such a table for each data set), "speed" or "gpu". `make results` writes them.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnrnn.kernels.triton import plan
from bnrnn.report import paper
from bnrnn.report.document import Block, Code, Heading, Paragraph, Table, Text, to_markdown
from bnrnn.report.groups import Group, baseline, groups, mean, order, unlike
from bnrnn.report.leaderboard import FEWEST, Standing, standings, target, with_more_seeds
from bnrnn.runs.find import find_runs
from bnrnn.runs.record import Run

_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
_COMMAND = re.compile(r"\| `bnrnn (?:task=(\w+) model=(\w+)|experiment=family task=(\w+))` \|")
_OURS = 3  # index of our column; index 0 is the text before the first bar
_MODEL = re.compile(r"`model=(\w+)`")
_FAMILY = "pydocs"  # the data of the table in README.md
# The models of `experiment=family`.
_MODELS = ("lstm", "bnlstm", "lnlstm", "zoneout", "bn_zoneout", "dropout_lstm", "stabilised")
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_GPU = "gpu-nvidia-h200.json"  # written by `make gpu-check`
_SHAPES = {
    "pMNIST": "permuted MNIST",
    "PTB": "Penn Treebank",
    "text8": "text8",
    "reader": "Attentive Reader",
}
_SIZES = {"T": "steps", "B": "batch", "H": "hidden"}


def pages(root: Path) -> list[Path]:
    """The pages that may contain such numbers."""
    family = root / "results" / "family" / "README.md"
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), family]


def refreshed(text: str, results: Path, to_results: str = "results") -> str:
    """The text of a page, updated with the numbers in `results`.

    Args:
        to_results: the relative path from the page to `results`.
    """
    blocks: dict[str, Callable[[str], str]] = {
        "experiments": lambda block: _experiments(block, find_runs(results / "runs"), to_results),
        "family": lambda block: _family(block, find_runs(results / "runs")),
        "families": lambda block: _families(find_runs(results / "runs")),
        "speed": lambda block: _speed(results / "bench" / "recurrence.json"),
        "gpu": lambda block: _gpu(results / "bench" / _GPU),
    }
    return _BLOCK.sub(lambda found: found[1] + blocks[found[2]](found[3]) + found[4], text)


def _experiments(block: str, runs: list[Run], to_results: str) -> str:
    """The same table, with our results in each row whose command has a task and a model."""

    def fill(found: re.Match[str], cells: list[str]) -> None:
        task, model, of_family = found.groups()
        if of_family is not None:
            cells[_OURS] = f" {_at_best_settings(runs, of_family)} "
        else:
            cells[_OURS] = f" {ours(runs, task, model, to_results)} "

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
    """Our result, from runs with the paper's settings, of any length: the mean over the seeds.

    Of the model's and the LSTM's runs, it takes the two whose shorter one is longest, of the same
    length if possible.

    `90.4 % (LSTM 81.2) after 20 epochs`; if the LSTM's run is of another length, `90.4 % after 20
    epochs (LSTM 90.9 after 89)`; at full length, `123.3 perplexity (LSTM 114.8), three seeds`.
    """
    alike = [run for run in runs if run.data == data and run.result is not None and _usual(run)]
    found = groups(alike)
    of_model, of_base = (
        [group for group in found if group.first.model == name] for name in (model, baseline(model))
    )
    if not of_model or not of_base:
        titles = [run.subject.data_title for run in runs if run.data.startswith(f"{data}-")]
        others = [re.sub("^(Part|Generated) ", lambda m: m[0].lower(), title) for title in titles]
        if any((run.data, run.model) == (data, model) for run in runs):
            others.insert(0, "with other settings")
        return f"[only {others[0]}]({to_results}/README.md)" if others else "not run yet"
    shown, base = max(itertools.product(of_model, of_base), key=_common_length)
    number, base_number, seeds = _number(shown.runs), _number(base.runs), _seeds(shown, base)
    of_base = f"(LSTM {base_number.partition(' ')[0]}"
    if shown.first.settings.get("patience") is not None:
        return f"{number} {of_base}), trained until they stop improving{seeds}"
    epochs, base_epochs = (f"{_epochs(group):.3g}" for group in (shown, base))
    if epochs != base_epochs:
        return f"{number} after {epochs} epochs {of_base} after {base_epochs}){seeds}"
    full = _epochs(shown) >= paper.usual(shown.first.subject.task, model)["task.max_epochs"]
    return f"{number} {of_base}){'' if full else f' after {epochs} epochs'}{seeds}"


def _common_length(pair: tuple[Group, Group]) -> tuple[int, bool, int, int]:
    """A sort key: steps of the shorter one, the same length, steps and runs of both."""
    steps = [group.steps[1] for group in pair]
    return min(steps), steps[0] == steps[1], sum(steps), sum(len(group.runs) for group in pair)


def _number(runs: list[Run]) -> str:
    """The mean test over the seeds, with its unit."""
    metric = runs[0].metric
    decimals = metric.decimals - (metric.decimals == 2)
    value = metric.number(mean([run.final("test") for run in runs]), decimals)
    return f"{value} {metric.unit or metric.title}"


def _epochs(group: Group) -> float:
    return mean([run.result.epochs for run in group.runs if run.result is not None])


def _seeds(ours: Group | Standing, base: Group | Standing) -> str:
    """The number of seeds if it is not one: `, three seeds`, or `, three seeds (LSTM one)`."""
    n, of_base = (
        _COUNTS[k] if k < len(_COUNTS) else str(k) for k in (len(ours.runs), len(base.runs))
    )
    if n != of_base:
        return f", {n} seed{'s' * (n != 'one')} (LSTM {of_base})"
    return "" if n == "one" else f", {n} seeds"


def _at_best_settings(runs: list[Run], data: str) -> str:
    """The BN-LSTM and the LSTM, each at the settings with the best validation."""
    found = {standing.first.model: standing for standing in _compared(runs, data)}
    if not {"bnlstm", "lstm"} <= found.keys():
        return "not run yet"
    bn, base = found["bnlstm"], found["lstm"]
    number, base_number = _number(bn.runs), _number(base.runs).partition(" ")[0]
    seeds = _seeds(bn, base)
    return f"BN-LSTM {number} (LSTM {base_number}), each at its best settings{seeds}"


def _compared(runs: list[Run], data: str) -> list[Standing]:
    return standings([run for run in runs if run.data == data and run.model in _MODELS])


def _family(block: str, runs: list[Run]) -> str:
    """The same table, with test and speed in the last two columns of each row that has a model."""
    ranked = _compared(runs, _FAMILY)
    by_model = {standing.first.model: standing for standing in ranked}

    def fill(found: re.Match[str], cells: list[str]) -> None:
        shown = ("not run yet", "-")
        if (standing := by_model.get(found[1])) is not None:
            shown = (standing.test_shown(), standing.steps_shown(target(ranked)[0]))
        cells[-3:-1] = (f" {cell} " for cell in shown)

    return _filled(block, _MODEL, fill)


def _families(runs: list[Run]) -> str:
    """A table for each data set on which enough models of the family have finished runs.

    If other settings of a model than its best have more seeds, they are shown below.
    """
    blocks: list[Block] = []
    for data in dict.fromkeys(run.data for run in sorted(runs, key=order)):
        ranked = _compared(runs, data)
        if len(ranked) < FEWEST:
            continue
        first, (value, whose) = ranked[0].first, target(ranked)
        of_data = [run for run in runs if run.data == data and run.model in _MODELS]
        more = {standing.first.model: [standing] for standing in with_more_seeds(of_data)}
        shown = [s for best in ranked for s in (best, *more.get(best.first.model, []))]
        whose_best = (
            "the LSTM's best" if "lstm" in {s.first.model for s in ranked} else "the target"
        )
        header: list[Text] = [
            "model", f"test, {first.metric.label}", "seeds", "steps", f"steps to {whose_best}",
            "learning rate",
        ]  # fmt: skip
        rows: list[list[Text]] = [
            [
                s.first.subject.model_title, s.test_shown(), str(len(s.runs)), s.steps,
                s.steps_shown(value), f"{s.first.settings['optimizer']['lr']:g}",
            ]
            for s in shown
        ]  # fmt: skip
        until = f"Steps until validation reaches {first.metric.number(value)}, {whose}."
        blocks += [
            Heading(3, first.subject.data_title), Paragraph(until), Table(header, "lrrrrr", rows),
        ]  # fmt: skip
    return f"\n{to_markdown(blocks)}\n" if blocks else "\n"


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
