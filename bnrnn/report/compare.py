"""Compare runs: a table on the terminal and a figure.

python -m bnrnn.report.compare FOLDER [FIGURE.png]
"""

import sys
from pathlib import Path

from bnrnn.errors import BnrnnError, CheckpointError, printable, readable
from bnrnn.report.groups import order
from bnrnn.runs.find import find_runs
from bnrnn.runs.record import Run


def table(runs: list[Run]) -> str:
    """A table with one line per run: validation at up to three steps, test and time.

    The steps are at a quarter, half and the end of the first run.
    """
    metric, steps = runs[0].metric, runs[0].curve()[0]
    shown = sorted({steps[len(steps) // 4], steps[len(steps) // 2], steps[-1]})
    header = ["", *(f"step {step}" for step in shown), "test", "seconds", "ms a step"]
    rows = []
    for run in runs:
        at, result = dict(zip(*run.curve(), strict=True)), run.result
        cells = [metric.number(at[step]) if step in at else "-" for step in shown]
        if result is None:
            cells += ["unfinished", "-", "-"]
        else:
            cells += [
                metric.number(run.final("test")),
                f"{result.wall_seconds:.0f}",
                f"{result.milliseconds_per_step:.0f}",
            ]
        rows.append([run.subject.model_title, *cells])
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = [
        row[0].ljust(widths[0])
        + "".join(
            "   " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        )
        for row in [header, *rows]
    ]
    title = f"{runs[0].data}: validation and test, {metric.label}; population statistics"
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    runs = sorted((run for run in find_runs(folder) if run.curve()[0]), key=order)
    if not runs:
        raise CheckpointError(f"no run with a validation under {folder}")
    if len({(run.data, run.metric) for run in runs}) > 1:
        raise CheckpointError(f"{folder} has runs on several data sets: name the folder of one")
    print(readable(table(runs)))
    if len(arguments) > 1:
        from bnrnn.plots.style import save
        from bnrnn.report.figures import steps_and_seconds

        save(steps_and_seconds(runs), Path(arguments[1]))
        print(f"\nBoth curves: {arguments[1]}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m bnrnn.report.compare FOLDER [FIGURE.png]")
    try:
        main(sys.argv[1:])
    except BnrnnError as error:
        print(f"bnrnn: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
