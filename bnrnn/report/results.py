"""`results/` from run directories: copies without weights, and the report on them.

python -m bnrnn.report.results OUTPUTS RESULTS

Runs under OUTPUTS are copied (settings, records, result; no weights) to RESULTS/runs, analyses to
RESULTS/analyses; then RESULTS/README.md and RESULTS/figures are made from what lies in RESULTS
alone, so that anyone can make them again without the runs.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from bnrnn.errors import BnrnnError
from bnrnn.files import write_atomic, write_json
from bnrnn.report import report
from bnrnn.report.document import Code, Link, to_markdown
from bnrnn.report.groups import (
    MEASURED,
    completed,
    differing,
    how_far,
    kind,
    part,
    rank,
    unlike_the_paper,
)
from bnrnn.report.runs import Found, Run, find, find_runs, slug, trained

MOST_TRAINING_RECORDS = 400
# Where things lay on one machine is of no use on another.
_ELSEWHERE = ("data_dir", "outputs", "resume", "threads")


def collect(outputs: Path, results: Path) -> None:
    """Copy what lies under `outputs`; a run gives way to one of its kind that went further."""
    found = find(outputs)
    kept = {run.path.name: run for run in find_runs(results / "runs")}
    for run in sorted(found.runs, key=how_far):
        # A validation on a part of the data is a trial, unless it is what `reproduce=` asked for.
        part_only = run.config.get("max_valid_batches") is not None and run.scale is None
        if part_only or "demo" in run.path.relative_to(outputs).parts or not run.records:
            continue
        name = folder_name(run, kept)
        if name in kept and how_far(kept[name]) > how_far(run):
            continue
        _copy(run, results / "runs" / name)
        kept[name] = run
    shown = find(results / "analyses").analyses
    for name, analysis in found.analyses.items():
        if name in shown and trained(shown[name]) > trained(analysis):
            continue
        folder = results / "analyses" / name
        folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(_without_paths(analysis)) + "\n"  # indented, curves are a line a number
        write_atomic(folder / "result.json", line.encode())


def folder_name(run: Run, kept: dict[str, Run]) -> str:
    """What tells a run from the others: data, model, how it departs from the paper, and seed.

    Args:
        kept: the runs there are, by folder; the same run again takes its folder.
    """
    for name, other in kept.items():
        if _same(run, other):
            return name
    keys = [key for key in unlike_the_paper(run) if key not in MEASURED]
    while True:
        changes = [slug(part(key, completed(run)[key])) for key in sorted(keys)]
        scale = [run.scale] if run.scale else []
        name = "-".join([run.data, run.model, *changes, *scale, f"seed{run.seed}"])
        if name not in kept:
            return name
        keys.append(min(set(differing(run, kept[name])) - set(keys), key=rank))


def _same(run: Run, other: Run) -> bool:
    same_kind = (kind(run), run.seed, run.scale) == (kind(other), other.seed, other.scale)
    return same_kind and not differing(run, other)


def _copy(run: Run, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in run.config.items() if k not in ("data_dir", "outputs")}
    if settings.get("path"):
        settings["path"] = Path(settings["path"]).name
    if settings["task"].get("path"):
        settings["task"] = settings["task"] | {"path": Path(settings["task"]["path"]).name}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_atomic(target / "config.yaml", text.encode())
    records = "".join(json.dumps(record) + "\n" for record in thin(run.records))
    write_atomic(target / "metrics.jsonl", records.encode())
    for file, content in (
        ("result.json", run.result),
        ("failed.json", None if run.failure is None else {"error": run.failure}),
    ):
        if content is None:
            (target / file).unlink(missing_ok=True)
        else:
            write_json(target / file, _without_paths(content))


def thin(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All validations and tests; of the training at most 400 records, evenly, with the last."""
    training = [record for record in records if record["split"] == "train"]
    steps = {record["step"] for record in report.thinned(training, MOST_TRAINING_RECORDS)}
    return [record for record in records if record["split"] != "train" or record["step"] in steps]


def _without_paths(result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key != "run"}
    if "command" in kept:
        kept["command"] = command(kept)
    for key in ("data", "error"):
        if isinstance(kept.get(key), str):
            kept[key] = re.sub(r"(?<![\w.])(/[^\s/:;,'\"]+)+/", "", kept[key])
    return kept


def command(result: dict[str, Any]) -> str:
    """What makes this result elsewhere."""
    # Stopped on the way to more, and then tested by asking for fewer.
    cut_short = result.get("steps", 0) > result.get("max_steps", math.inf)
    words = []
    for word in str(result["command"]).split():
        key, _, value = word.partition("=")
        if key in _ELSEWHERE or (cut_short and key in ("max_epochs", "max_steps")):
            continue
        words.append({"path": f"path={Path(value).name}", "run": "run=auto"}.get(key, word))
    if cut_short:
        words.append(f"max_steps={result['steps']}")
    return " ".join(words)


def write(results: Path, figures: bool = True) -> str:
    """The text of README.md, from what lies in `results`; the figures too, if asked."""
    runs, analyses = find(results / "runs"), find(results / "analyses")
    found = Found(
        results, runs.runs, analyses.analyses, [*runs.unreadable, *analyses.unreadable]
    )  # fmt: skip
    blocks = report.document(
        found,
        "Results",
        ("Made by ", Code("make results"), " from run directories; nothing here is typed by hand, "
         "and nothing is shown that was not run. Each run's settings, records and result: ",
         Code("runs/"), ". Where ours differs from the paper's, and what was tried: ",
         Link("differences.md", "differences.md"), "."),
        lambda run: Link(run.path.name, f"runs/{run.path.name}"),
    )  # fmt: skip
    if figures:
        for name, encoded in report.draw(blocks, ("png",)):
            report.write_pictures(results / "figures", name, encoded)
    return to_markdown(blocks)


def main(outputs: Path, results: Path) -> None:
    collect(outputs, results)
    text = write(results)
    write_atomic(results / "README.md", text.encode())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bnrnn.report.results OUTPUTS RESULTS")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except BnrnnError as error:
        print(f"bnrnn: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
