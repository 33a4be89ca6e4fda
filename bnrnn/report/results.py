"""Make `results/` from run directories: copies without weights, and a report on them.

python -m bnrnn.report.results OUTPUTS RESULTS

Runs under OUTPUTS are copied (settings, records, result; no weights) to RESULTS/runs, analyses to
RESULTS/analyses. Then RESULTS/README.md and RESULTS/figures are made from RESULTS alone, so that
anyone can make them again without the runs. The numbers in RESULTS/family/README.md, and in the
README.md and docs/ beside RESULTS, are updated too.
"""

import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bnrnn.errors import BnrnnError, printable
from bnrnn.report import by_paper, readme, report
from bnrnn.report.analyses import analysis_name, furthest, trained
from bnrnn.report.document import Code, Link, to_markdown
from bnrnn.report.groups import (
    MEASURED,
    cluster,
    comparable,
    differing,
    how_far,
    part,
    rank,
    unlike_the_paper,
)
from bnrnn.runs.analysis import Analysis, write_analysis
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.files import write_atomic
from bnrnn.runs.find import Found, find, find_runs
from bnrnn.runs.record import (
    Record,
    Result,
    Run,
    Settings,
    write_json,
    write_records,
    write_settings,
)
from bnrnn.runs.text import slug

MOST_TRAINING_RECORDS = 400
# Overrides that depend on the machine; a copied command omits them.
_ELSEWHERE = ("data_dir", "outputs", "resume", "threads")


def collect(outputs: Path, results: Path) -> None:
    """Copy the runs and analyses under `outputs` to `results`.

    Of several runs with the same settings and seed, keep the longest finished one, if any.
    """
    found = find(outputs)
    kept = {run.path.name: run for run in find_runs(results / "runs")}
    for run in sorted(found.runs, key=how_far):
        # A run that validates on part of the data is only a trial, unless `reproduce=` set that.
        part_only = run.settings.get("max_valid_batches") is not None and run.scale is None
        if part_only or "demo" in run.path.relative_to(outputs).parts or not run.records:
            continue
        name = folder_name(run, kept)
        if name in kept and how_far(kept[name]) > how_far(run):
            continue
        _copy(run, RunDirectory(results / "runs" / name))
        kept[name] = run
    shown = furthest(find(results / "analyses").analyses)
    for name, analysis in furthest(found.analyses).items():
        if name in shown and trained(shown[name]) > trained(analysis):
            continue
        folder = results / "analyses" / analysis_name(analysis)
        folder.mkdir(parents=True, exist_ok=True)
        write_analysis(folder / "result.json", replace(analysis, command=command(analysis)))


def folder_name(run: Run, kept: dict[str, Run]) -> str:
    """A unique name from data, model, differences from the paper's settings, and seed.

    Args:
        kept: the runs already copied, by folder. A repeated run gets the folder of the first.
    """
    alike = {
        name: other
        for name, other in kept.items()
        if run.scale == other.scale and len(cluster([run, other])) == 1
    }
    for name, other in alike.items():
        if run.seed == other.seed:
            return name
    for name, other in alike.items():  # the same settings, another seed: the same name but the seed
        head, _, seed = name.rpartition("seed")
        if seed == str(other.seed) and f"{head}seed{run.seed}" not in kept:
            return f"{head}seed{run.seed}"
    keys = unlike_the_paper(run) - MEASURED
    while True:
        changes = [part(key, comparable(run).get(key)) for key in sorted(keys)]
        scale = [run.scale] if run.scale else []
        parts = map(slug, [run.data, run.model, *changes, *scale, f"seed{run.seed}"])
        name = slug("-".join(parts), most=200)
        if name not in kept:
            return name
        if not (more := differing(run, kept[name]) - keys):
            break
        keys.add(min(more, key=rank))
    # The names differ only in characters that a file name cannot contain.
    return next(f"{name}-{k}" for k in itertools.count(2) if f"{name}-{k}" not in kept)


def _copy(run: Run, target: RunDirectory) -> None:
    target.path.mkdir(parents=True, exist_ok=True)
    write_settings(target.config, _without_places(run.settings))
    description = _without_paths(run.subject.description)
    write_json(target.subject, replace(run.subject, description=description))
    write_records(target.metrics, thin(run.records))
    result, failure = run.result, run.failure
    if result is not None:
        data = _without_paths(result.data)
        result = replace(result, data=data, command=command(result))
    if failure is not None:
        failure = replace(failure, error=_without_paths(failure.error))
    for file, content in ((target.result, result), (target.failure, failure)):
        if content is None:
            file.unlink(missing_ok=True)
        else:
            write_json(file, content)


def thin(records: list[Record]) -> list[Record]:
    """The records, with the training records thinned evenly to at most 400 (the last one stays)."""
    training = [record for record in records if record.split == "train"]
    steps = {record.step for record in by_paper.thinned(training, MOST_TRAINING_RECORDS)}
    return [record for record in records if record.split != "train" or record.step in steps]


def _without_places(settings: Settings) -> Settings:
    elsewhere = {"data_dir": "data", "outputs": "outputs", "run": None, "resume": None}
    kept = settings | elsewhere | {"question": None}
    if settings["task"].get("path"):
        kept["task"] = settings["task"] | {"path": Path(settings["task"]["path"]).name}
    kept["data"] = {
        key: _without_paths(value) if isinstance(value, str) else value
        for key, value in settings.get("data", {}).items()
    }
    return kept


def _without_paths(text: str) -> str:
    return re.sub(r"(?<![\w.])(/[^\s/:;,'\"]+)+/", "", text)


def command(result: Result | Analysis) -> str:
    """The command that makes this result on another machine."""
    # The run was stopped early, then resumed with fewer steps to test its model.
    cut_short = isinstance(result, Result) and result.steps > result.max_steps
    words = []
    for word in result.command.split():
        key, _, value = word.partition("=")
        if key in _ELSEWHERE or (cut_short and key in ("max_epochs", "max_steps")):
            continue
        in_place_of = {"task.path": f"task.path={Path(value).name}", "run": "run=auto"}
        word = _without_paths(word) if key.startswith("data.") else word
        words.append(in_place_of.get(key, word))
    if cut_short and isinstance(result, Result):
        words.append(f"max_steps={result.steps}")
    return " ".join(words)


def write(results: Path, figures: bool = True) -> str:
    """The text of README.md, made from the runs and analyses in `results`.

    Args:
        figures: whether to draw and write the figures too.
    """
    runs, analyses = find(results / "runs"), find(results / "analyses")
    found = Found(
        results, runs.runs, analyses.analyses, [*runs.unreadable, *analyses.unreadable]
    )  # fmt: skip
    blocks = report.document(
        found,
        "Results",
        (Code("make results"), " generates this page from run directories. Nothing is typed by "
         "hand, and nothing is shown that was not run. The settings, records and result of each "
         "run are in ", Code("runs/"), ". The differences from the paper, and what was tried: ",
         Link("differences.md", "differences.md"), "."),
        lambda run: Link(run.path.name, f"runs/{run.path.name}"),
    )  # fmt: skip
    if figures:
        blocks, pictures = report.draw(blocks, ("png",))
        report.write_pictures(results / "figures", pictures)
    return to_markdown(blocks)


def main(arguments: Sequence[str]) -> None:
    outputs, results = map(Path, arguments)
    collect(outputs, results)
    write_atomic(results / "README.md", write(results).encode())
    root = results.absolute().parent
    for page in filter(Path.exists, readme.pages(root)):
        text = page.read_text(encoding="utf-8")
        to_results = Path(os.path.relpath(results, page.parent)).as_posix()
        write_atomic(page, readme.refreshed(text, results, to_results).encode())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bnrnn.report.results OUTPUTS RESULTS")
    try:
        main(sys.argv[1:])
    except BnrnnError as error:
        print(f"bnrnn: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
