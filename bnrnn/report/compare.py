"""Runs side by side: a table on the terminal and a figure.

python -m bnrnn.report.compare FOLDER [FIGURE.png]
"""

import sys
from pathlib import Path

from bnrnn.errors import BnrnnError, CheckpointError
from bnrnn.report.runs import METRICS, Run, find_runs


def table(runs: list[Run]) -> str:
    """One line a run: validation at a quarter, half and the end of its steps, test, time."""
    unit, factor = METRICS[runs[0].metric]
    steps = runs[0].curve()[0]
    shown = sorted({steps[len(steps) // 4], steps[len(steps) // 2], steps[-1]})
    header = ["", *(f"step {step}" for step in shown), "test", "seconds", "ms a step"]
    rows = []
    for run in runs:
        at = dict(zip(*run.curve(), strict=True))
        cells = [f"{at[step]:.3f}" if step in at else "-" for step in shown]
        if run.result is None:
            cells += ["unfinished", "-", "-"]
        else:
            cells += [
                f"{run.result['test'][run.metric] * factor:.3f}",
                f"{run.result['wall_seconds']:.0f}",
                f"{1000 * run.result['train_seconds'] / run.result['steps']:.0f}",
            ]
        rows.append([run.title, *cells])
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = [
        row[0].ljust(widths[0])
        + "".join(
            "   " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        )
        for row in [header, *rows]
    ]
    title = f"{runs[0].task}: validation and test, {unit}; population statistics"
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    runs = [run for run in find_runs(folder) if run.curve()[0]]
    if not runs:
        raise CheckpointError(f"no run with a validation under {folder}")
    if len({run.task for run in runs}) > 1:
        raise CheckpointError(f"{folder} has runs of several tasks: name the folder of one")
    runs.sort(key=lambda run: run.model != "lstm")
    print(table(runs))
    if len(arguments) > 1:
        from bnrnn.report.figures import save, steps_and_seconds

        save(steps_and_seconds(runs), Path(arguments[1]))
        print(f"\nBoth curves: {arguments[1]}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m bnrnn.report.compare FOLDER [FIGURE.png]")
    try:
        main(sys.argv[1:])
    except BnrnnError as error:
        print(f"bnrnn: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
