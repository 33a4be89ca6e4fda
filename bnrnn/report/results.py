"""`results/` from run directories: one folder a run, a table of all, figures against the paper.

python -m bnrnn.report.results OUTPUTS RESULTS

Runs under OUTPUTS are copied (settings, records, result; no weights) to
RESULTS/runs/<task>-<model>...; then RESULTS/README.md and RESULTS/figures are made from what lies
in RESULTS alone, so that anyone can make them again without the runs.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

from bnrnn.errors import BnrnnError
from bnrnn.report.runs import METRICS, Run, find_runs

# Test results of the paper's table 1 to 3, in the units of `METRICS`, and its steps of training.
PAPER = {
    ("mnist", "lstm"): 98.9, ("mnist", "bnlstm"): 99.0,
    ("pmnist", "lstm"): 90.2, ("pmnist", "bnlstm"): 95.4,
    ("ptb", "lstm"): 1.38, ("ptb", "bnlstm"): 1.32,
    ("text8", "lstm"): 1.43, ("text8", "bnlstm"): 1.36,
}  # fmt: skip
FULL_EPOCHS = {"mnist": 200, "pmnist": 200, "ptb": 50, "text8": 50}


def collect(outputs: Path, results: Path) -> None:
    """Copy the runs under `outputs`; a finished one stays, whatever else ran of its kind."""
    for run in sorted(find_runs(outputs), key=lambda run: len(run.records)):
        if run.config["max_valid_batches"] is not None or "demo" in run.path.parts:
            continue
        target = results / "runs" / folder_name(run)
        if (target / "result.json").exists() and run.result is None:
            continue
        target.mkdir(parents=True, exist_ok=True)
        for file in ("config.yaml", "metrics.jsonl", "result.json"):
            if (run.path / file).exists():
                shutil.copyfile(run.path / file, target / file)
        _strip_paths(target)


def folder_name(run: Run) -> str:
    """What tells a run from the others: data, model and seed."""
    return "-".join([data_name(run), run.model, f"seed{run.config['seed']}"])


def data_name(run: Run) -> str:
    """The task, and what its data are where they are not the paper's."""
    if run.config["task"].get("permutation") == "official_code":
        return run.task + "-official-map"
    if run.config.get("data", {}).get("synthetic"):
        return run.task + "-synthetic"
    return run.task


def _strip_paths(target: Path) -> None:
    """Where data and outputs lay on one machine is of no use on another."""
    elsewhere = ("data_dir", "outputs", "resume", "threads")
    file = target / "result.json"
    if file.exists():
        result = json.loads(file.read_text())
        words = result["command"].split()
        kept = [word for word in words if word.partition("=")[0] not in elsewhere]
        file.write_text(json.dumps(result | {"command": " ".join(kept)}, indent=2) + "\n")
    lines = (target / "config.yaml").read_text().splitlines()
    kept = [line for line in lines if line.partition(":")[0] not in ("data_dir", "outputs")]
    (target / "config.yaml").write_text("\n".join(kept) + "\n")


def readme(runs: list[Run]) -> str:
    """The table of all runs, and the curves at the steps where the paper's can be read."""
    lines = [
        "# Results",
        "",
        "Made by `make results` from run directories; nothing here is typed by hand, and nothing "
        "is shown that was not run. Test results are of the model with the best validation, with "
        "population statistics averaged over the whole training set.",
        "",
        "| run | test | the paper's, after | our epochs | valid, population | valid, batch "
        "| best step | wall time | ms a training step | kernel | commit | machine, threads |",
        "|" + "---|" * 12,
    ]
    lines += [_row(run) for run in runs]
    lines += ["", "Each run's settings, records and result: `runs/`. The commands:", ""]
    lines += [f"    {run.result['command']}" for run in runs if run.result is not None]
    return "\n".join(lines) + "\n"


def _row(run: Run) -> str:
    unit, factor = METRICS[run.metric]
    digits = 3 if run.metric == "bpc" else 2
    paper = PAPER.get((run.task, run.model))
    steps, values = run.curve()
    result = run.result
    best = (max if run.metric == "accuracy" else min)(zip(values, steps, strict=True))[1]
    best = result["best_step"] if result else best

    def at_best(statistics: str) -> str:
        found = dict(zip(*run.curve(statistics), strict=True))
        return f"{found[best]:.{digits}f}" if found else "-"

    cells = [
        f"[{run.path.name}](runs/{run.path.name})",
        f"{result['test'][run.metric] * factor:.{digits}f} {unit}" if result else "unfinished",
        f"{paper} after {FULL_EPOCHS[run.task]} epochs" if paper else "-",
        f"{result['epochs']:g}" if result else f"{steps[-1]} steps",
        at_best("population"),
        at_best("batch"),
        str(best),
    ]
    if result:
        training = result.get("train_seconds")
        cells += [
            f"{result['wall_seconds'] / 60:.0f} min",
            f"{1000 * training / result['steps']:.0f}" if training else "-",
            result["kernel"],
            str(result["commit"]),
            f"{result['machine']}, {result['threads']}",
        ]
    return "| " + " | ".join(cells + ["-"] * (12 - len(cells))) + " |"


def against_the_paper(runs: list[Run], curves: dict[str, dict[str, list[list[float]]]]) -> str:
    """Our validation at the steps where the paper's curve has a point, as a table a task."""
    lines: list[str] = []
    for run in runs:
        paper = curves.get(run.task, {}).get(run.model)
        if not paper:
            continue
        factor = METRICS[run.metric][1]
        ours = dict(
            zip(*(run.curve("batch") if run.curve("batch")[0] else run.curve()), strict=True)
        )
        found = [(s, v, _interpolate(paper, s, factor)) for s, v in ours.items()]
        lines += [
            "", f"### {run.path.name}", "",
            "| step | " + " | ".join(f"{s}" for s, _, _ in found) + " |",
            "|---|" + "---|" * len(found),
            "| ours | " + " | ".join(f"{v:.3f}" for _, v, _ in found) + " |",
            "| the paper | " + " | ".join(f"{p:.3f}" if p else "-" for *_, p in found) + " |",
        ]  # fmt: skip
    if lines:
        lines = [
            "", "## Validation against the paper's curves, at the same step", "",
            "Batch statistics where the model normalises, as in the paper; the paper's values read "
            "off its figures 2 and 3a, between its points by a straight line.", *lines,
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _interpolate(points: list[list[float]], step: float, factor: float) -> float | None:
    for (s0, v0), (s1, v1) in itertools.pairwise(points):
        if s0 <= step <= s1:
            share = (step - s0) / (s1 - s0) if s1 > s0 else 0.0
            return (v0 + share * (v1 - v0)) * factor
    return None


def write(results: Path, figures: bool = True) -> str:
    """The text of README.md, from what lies in `results`; the figures too, if asked."""
    runs = [run for run in find_runs(results / "runs") if run.curve()[0]]
    curves = json.loads((results / "paper_curves.json").read_text())["curves"]
    text = readme(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(data_name(run), []).append(run)
    for name, group in groups.items():
        text += f"\n![{name}](figures/{name}.png)\n"
        if figures:
            from bnrnn.report.figures import validation_curves

            factor = METRICS[group[0].metric][1]
            paper = {
                model: ([s for s, _ in points], [v * factor for _, v in points])
                for model, points in curves.get(group[0].task, {}).items()
            }
            validation_curves(group, results / "figures" / f"{name}.png", paper, name)
    return text + against_the_paper(runs, curves)


def main(outputs: Path, results: Path) -> None:
    collect(outputs, results)
    (results / "README.md").write_text(write(results), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bnrnn.report.results OUTPUTS RESULTS")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except BnrnnError as error:
        print(f"bnrnn: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
