"""The values of `mode=`: one function per mode, and a table of all modes."""

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bnrnn import processes
from bnrnn.analyses import ANALYSES
from bnrnn.answer import answer
from bnrnn.command import where
from bnrnn.command.device import set_up
from bnrnn.command.launch import launched
from bnrnn.command.terminal import Formatter, say
from bnrnn.errors import CheckpointError, ConfigError, OutputError
from bnrnn.evaluate import evaluate, load_best
from bnrnn.nn.attentive_reader import AttentiveReader
from bnrnn.nn.lstm import AlikeWarning
from bnrnn.runs.analysis import write_analysis
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.files import write_atomic
from bnrnn.runs.find import find_analysis, read_run
from bnrnn.runs.interrupt import Interrupted
from bnrnn.runs.metrics import format_values
from bnrnn.runs.provenance import provenance
from bnrnn.runs.record import (
    Failure,
    Result,
    decode_json,
    read_settings,
    write_json,
)
from bnrnn.runs.text import quoted
from bnrnn.sample import sample
from bnrnn.settings.same import differences
from bnrnn.settings.schema import Config
from bnrnn.tasks import CharacterModel, CharacterTask, QuestionTask, build_task
from bnrnn.train import train

log = logging.getLogger(__name__)


def run_mode(config: Config) -> None:
    """Run `config.mode`.

    Raises:
        ConfigError: there is no such mode, or a setting is missing or does not go with the mode.
    """
    mode = MODES.get(config.mode)
    if mode is None:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {config.mode!r}")
    if mode.uses_run and config.run is None:
        raise ConfigError(f"mode={config.mode} needs a finished run: add run=DIR")
    if config.run is not None and not mode.uses_run:
        modes = ", ".join(f"mode={name}" for name, mode in MODES.items() if mode.uses_run)
        raise ConfigError(f"run=DIR goes with {modes}, not {config.mode}")
    if config.question is not None and config.mode != "answer":
        raise ConfigError("question=FILE goes with mode=answer run=DIR")
    if config.question is None and config.mode == "answer":
        raise ConfigError("mode=answer run=DIR question=FILE answers the question in a file")
    if config.resume is not None and config.mode != "train":
        raise ConfigError(f"resume goes with mode=train, not mode={config.mode}")
    if config.mode != "train" and launched().size > 1:
        raise ConfigError(f"mode={config.mode} runs in one process: start it without torchrun")
    with _warnings_logged():
        mode.run(config)


@contextlib.contextmanager
def _warnings_logged() -> Iterator[None]:
    """Log the warnings of the library, without the source line that Python prints."""
    with warnings.catch_warnings():
        warnings.filterwarnings("once", category=AlikeWarning)
        warnings.showwarning = lambda message, *_: log.warning("%s", message)
        yield


def _train(config: Config) -> None:
    launch = launched()
    if launch.attempt > 0 and config.resume is None:
        config.resume = "auto"
    if launch.size > 1 and config.task.batch_size < 2 * launch.size:
        raise ConfigError(
            f"task.batch_size must be {2 * launch.size} or more for {launch.size} processes, "
            f"which train on a part of it each; it is {config.task.batch_size}"
        )
    device = set_up(config, launch.local_rank if launch.size > 1 else None)
    with processes.explained():
        processes.meet(launch.rank, launch.size, launch.attempt, config.timeout)
        if launch.is_first:
            _lead(config, device)
        elif (path := processes.from_first(_no_path)) is not None:
            train(config, build_task(config), RunDirectory(path), device)


def _no_path() -> Path | None:
    """Return None, because there is nothing to train or another process chooses the folder."""


def _lead(config: Config, device: torch.device) -> None:
    """Train as the first process, which reads and writes the folder of the run."""
    with where.run_to_train(config) as run, _log_file(run.log):
        if not run.is_protected:
            log.warning("%s has no locks: train in it from one process only", run.path)
        finished = decode_json(run.result, Result)
        if config.resume not in (None, "auto"):
            _check_same(config, run)
        if finished is not None and run.subject.exists():
            found = read_run(run.path)
            asked = config.total_steps(found.subject.steps_per_epoch)
            if found.suffices(asked, config.patience):
                values = format_values(finished.test)
                log.info("%s is finished: test %s; %s", run.path, values, finished.data)
                processes.from_first(_no_path)
                return
            if not run.last.exists():
                raise CheckpointError(f"{run.path} has no last.pt to resume from: restore it")
        try:
            processes.from_first(lambda: run.path)
            with processes.explained():
                result = train(config, build_task(config), run, device)
        except Interrupted as interrupted:
            interrupted.advice = f"resume with: bnrnn resume={quoted(run.path)}"
            raise
        except ConfigError:  # refused before the run was changed
            run.discard()
            raise
        except Exception as error:
            _remember_failure(run, error)
            raise
        except BaseException:  # Ctrl-C before the first step
            run.discard()
            raise
    say(f"test  {format_values(result.test)}   ({run.path})")


def _check_same(config: Config, run: RunDirectory) -> None:
    saved = read_settings(run.config)
    for key, (ours, theirs) in differences(config, saved or {}).items():
        raise ConfigError(
            f"a resumed run keeps its settings: {key} is {theirs!r} in {run.path}, not {ours!r}"
        )


def _remember_failure(run: RunDirectory, error: Exception) -> None:
    """Write why the run stopped, for the report, unless it never started or is already finished."""
    if not run.begun:
        run.discard()
        return
    # Do not let a full disk mask the error itself.
    with contextlib.suppress(OutputError, CheckpointError):
        if not (run.result.exists() and read_run(run.path).is_finished):
            text = " ".join(str(error).split()) or type(error).__name__
            write_json(run.failure, Failure(text, getattr(error, "exit_code", 1)))


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append all log messages to a file, with their time."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        with contextlib.suppress(OSError):  # a full disk
            handler.close()


def _data(config: Config) -> None:
    log.info("%s", build_task(config).describe())


def _evaluate(config: Config) -> None:
    device, began = set_up(config), time.monotonic()
    source = where.used_run(config)
    result = evaluate(config, source, build_task(config), device)
    result |= {"run": str(source), "wall_seconds": round(time.monotonic() - began, 1)}
    say(f"valid  {format_values(result['valid'])}")
    say(f"test   {format_values(result['test'])}")
    folder = where.new_folder(source / config.mode)
    write_json(folder / "result.json", result | provenance(device))


def _sample(config: Config) -> None:
    device, source = set_up(config), where.used_run(config)
    task = build_task(config)
    if not isinstance(task, CharacterTask):
        raise ConfigError(f"mode=sample needs a character model, {source} is of another task")
    model, _ = load_best(config, source, task, device)
    assert isinstance(model, CharacterModel)
    text = sample(model, task, config.sample, config.seed)
    say(text)
    folder = where.new_folder(source / config.mode)
    write_atomic(folder / "sample.txt", text.encode())


def _answer(config: Config) -> None:
    assert config.question is not None
    device, source = set_up(config), where.used_run(config)
    task = build_task(config)
    if not isinstance(task, QuestionTask):
        raise ConfigError(f"mode=answer needs an Attentive Reader, {source} is of another task")
    model, _ = load_best(config, source, task, device)
    assert isinstance(model, AttentiveReader)
    found = answer(model, task, Path(config.question))
    lines = [" ".join(found.question.question), "", *found.lines()]
    say("\n".join(lines))
    folder = where.new_folder(source / config.mode)
    text = "\n".join(lines) + "\n"
    write_atomic(folder / "answer.txt", text.encode("utf-8", "backslashreplace"))
    try:
        from bnrnn.plots.attention import heat_map
        from bnrnn.plots.style import save
    except ImportError:
        log.info("No picture of the attention: pip install 'bnrnn[plot]' for matplotlib")
        return
    figure = heat_map(found.words, found.attention, found.question.question, found.lines())
    save(figure, folder / "attention.png")
    say(f"\nThe attention: {folder / 'attention.png'}")


def _analyse(config: Config) -> None:
    """Run one of the analyses of the paper."""
    device, analysis = set_up(config), ANALYSES[config.mode]
    source = where.used_run(config) if analysis.uses_run else None
    if source is not None and config.run == "auto":
        finished = find_analysis(source, config.mode, analysis.settings(config))
        if finished is not None:
            figure = finished.with_name(f"{config.mode}.png")
            log.info("finished already: %s%s", finished, f", {figure}" * figure.exists())
            return
    began = time.monotonic()
    found = analysis.compute(config, source, device)
    found = replace(
        found, wall_seconds=round(time.monotonic() - began, 1), **provenance(device)
    )  # fmt: skip
    parent = Path(config.outputs) if source is None else source
    result = where.new_folder(parent / config.mode) / "result.json"
    write_analysis(result, found)
    try:
        from bnrnn.plots.style import save
        from bnrnn.report.analysis_figures import FIGURES
    except ImportError:
        say(f"{result}; for the figure: pip install 'bnrnn[plot]'")
        return
    figure = result.with_name(f"{config.mode}.png")
    save(FIGURES[config.mode].draw([found]), figure)
    say(f"{figure}, drawn from {result.name} beside it")


def _report(config: Config) -> None:
    try:
        from bnrnn.report.report import write_report
    except ImportError as error:
        raise ConfigError(f"mode=report needs pip install 'bnrnn[plot]': {error}") from error
    target = Path(config.outputs) / "report"
    write_report(Path(config.outputs), target)
    say(f"{target / 'report.html'}, and the same as report.md")


def _leaderboard(config: Config) -> None:
    try:
        from bnrnn.report.report import write_leaderboard
    except ImportError as error:
        raise ConfigError(f"mode=leaderboard needs pip install 'bnrnn[plot]': {error}") from error
    target = Path(config.outputs) / "leaderboard"
    say(write_leaderboard(Path(config.outputs), target))
    say(f"\nWith settings, commands and figures: {target / 'leaderboard.html'}")


@dataclass(frozen=True)
class Mode:
    run: Callable[[Config], None]
    uses_run: bool = False  # needs run=DIR, a finished run


MODES = {
    "train": Mode(_train),
    "data": Mode(_data),
    "evaluate": Mode(_evaluate, uses_run=True),
    "sample": Mode(_sample, uses_run=True),
    "answer": Mode(_answer, uses_run=True),
    **{name: Mode(_analyse, analysis.uses_run) for name, analysis in ANALYSES.items()},
    "report": Mode(_report),
    "leaderboard": Mode(_leaderboard),
}
