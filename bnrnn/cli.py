"""The command `bnrnn`: composes the settings, dispatches on `mode`, and says what went wrong."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnrnn import allocator, config_errors, kernels
from bnrnn import config as settings
from bnrnn.analyse import analyse, find_analysis
from bnrnn.answer import answer
from bnrnn.config import Config
from bnrnn.errors import BnrnnError, CheckpointError, ConfigError, OutputError
from bnrnn.evaluate import evaluate, load_best
from bnrnn.files import write_atomic, write_json
from bnrnn.interrupt import Interrupted
from bnrnn.metrics import format_values
from bnrnn.nn.attentive_reader import AttentiveReader
from bnrnn.provenance import provenance
from bnrnn.rundir import RunDirectory, find_finished, find_matching
from bnrnn.sample import sample
from bnrnn.tasks import CharacterModel, CharacterTask, QuestionTask, Task, build_task
from bnrnn.train import train

log = logging.getLogger(__name__)

_THREADS = torch.get_num_threads()


def main() -> None:
    """The console script: exit codes are in `bnrnn.errors`."""
    # Hydra raises its errors instead of printing them, so that they can be said in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv[1:] = _replay(sys.argv[1:])
        _job()
    except BnrnnError as error:
        _fail(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(config_errors.explain(error, sys.argv[1:]), ConfigError.exit_code)
    except KeyboardInterrupt:  # before there was anything to save, or pressed twice
        _fail("interrupted", 130)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(
            f"cannot write to {error.filename}: {error.strerror}; choose another place with "
            "outputs=DIR",
            OutputError.exit_code,
        )


def _fail(message: str, exit_code: int) -> None:
    print(f"bnrnn: error: {message}", file=sys.stderr)
    sys.exit(exit_code)


@hydra.main(version_base="1.3", config_path="pkg://bnrnn.conf", config_name="config")
def _job(cfg: DictConfig) -> None:
    """One run, also as one job of a sweep."""
    run = RunDirectory(Path(HydraConfig.get().runtime.output_dir))
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        if cfg.scale is not None and HydraConfig.get().runtime.choices["reproduce"] is None:
            raise ConfigError(f"scale={cfg.scale} goes with reproduce=…, which says what to shrink")
        _dispatch(settings.from_hydra(cfg), run)
    except BnrnnError as error:
        run.discard_if_empty(Path(cfg.outputs))
        if single:
            _fail(str(error), error.exit_code)
        raise  # Hydra goes on with the sweep, and raises this again at its end
    except Interrupted as interrupted:
        # Ends a sweep too: who presses Ctrl-C means all of it.
        how = f"go on with: bnrnn resume={_quoted(run.path)}" if run.last.exists() else "stopped"
        print(f"bnrnn: {interrupted}: {how}", file=sys.stderr)
        sys.exit(128 + interrupted.signum)


def _dispatch(config: Config, run: RunDirectory) -> None:
    allocator.keep_large_blocks()
    device = choose_device(config.device)
    check_kernel(config.kernel, device)
    torch.set_num_threads(config.threads or _THREADS)  # a job of a sweep leaves it to the next
    torch.use_deterministic_algorithms(device.type == "cpu")
    # It comes with the line above and costs an eighth of a training step: every array written once
    # more before it is used.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    if config.mode == "train":
        _train(config, run, device)
        return
    if config.mode == "report":
        _report(config, run)
        return
    if config.mode in settings.ANALYSES:
        _analyse(config, run, device)
        return
    task = build_task(config)
    if config.mode == "data":
        log.info("%s", task.describe())
        run.discard_if_empty(Path(config.outputs))
        return
    source = _used_run(config)
    if config.mode == "evaluate":
        began = time.monotonic()
        result = evaluate(config, source, task, device)
        result |= {"run": str(source), "wall_seconds": round(time.monotonic() - began, 1)}
        write_json(run.result, result | provenance(device))
        print(f"valid  {format_values(result['valid'])}")
        print(f"test   {format_values(result['test'])}")
    elif config.mode == "sample":
        if not isinstance(task, CharacterTask):
            raise ConfigError(
                f"mode=sample needs a character model, {source} is a {task.metric} task"
            )
        model, _ = load_best(config, source, task, device)
        assert isinstance(model, CharacterModel)
        text = sample(model, task, config.sample, config.seed)
        write_atomic(run.path / "sample.txt", text.encode())
        print(text)
    elif config.mode == "answer":
        _answer(config, run, task, device)


def _answer(config: Config, run: RunDirectory, task: Task, device: torch.device) -> None:
    assert config.question is not None
    source = _used_run(config)
    if not isinstance(task, QuestionTask):
        raise ConfigError(f"mode=answer needs an Attentive Reader, {source} is of another task")
    model, _ = load_best(config, source, task, device)
    assert isinstance(model, AttentiveReader)
    found = answer(model, task, Path(config.question))
    lines = [" ".join(found.question.question), "", *found.lines()]
    write_atomic(run.path / "answer.txt", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    try:
        from bnrnn.report.attention import heat_map, save_heat_map
    except ImportError:
        log.info("No picture of the attention: pip install bnrnn[plot] for matplotlib")
        return
    figure = heat_map(found.words, found.attention, found.question.question, found.lines())
    save_heat_map(figure, run.path / "attention.png")
    print(f"\nThe attention: {run.path / 'attention.png'}")


def _analyse(config: Config, run: RunDirectory, device: torch.device) -> None:
    source = _used_run(config) if config.mode in settings.USE_A_RUN else None
    if source is not None and config.run == "auto":
        finished = find_analysis(config, source)
        if finished is not None:
            figure = finished.with_name(f"{config.mode}.png")
            log.info("finished already: %s%s", finished, f", {figure}" * figure.exists())
            run.discard_if_empty(Path(config.outputs))
            return
    began = time.monotonic()
    result = analyse(config, source, device)
    result |= {"wall_seconds": round(time.monotonic() - began, 1), **provenance(device)}
    write_atomic(run.result, (json.dumps(result) + "\n").encode())  # long curves, a line is enough
    try:
        from bnrnn.report.analysis_figures import FIGURES
        from bnrnn.report.figures import save
    except ImportError:
        print(f"{run.result}; for the figure: pip install bnrnn[plot]")
        return
    figure = run.path / f"{config.mode}.png"
    save(FIGURES[config.mode]([result]), figure)
    print(f"{figure}, drawn from {run.result.name} beside it")


def _report(config: Config, run: RunDirectory) -> None:
    try:
        from bnrnn.report.report import write_report
    except ImportError as error:
        raise ConfigError(f"mode=report needs pip install bnrnn[plot]: {error}") from error
    write_report(Path(config.outputs), run.path)
    print(f"{run.path / 'report.html'}, and the same as report.md")


def _used_run(config: Config) -> Path:
    """The run that `run=DIR` names; auto: the finished one with these settings that went furthest.

    Raises:
        CheckpointError: there is none.
    """
    assert config.run is not None
    if config.run != "auto":
        return Path(config.run)
    found = find_finished(Path(config.outputs), settings.to_dict(config))
    if found is None:
        raise CheckpointError(
            f"no finished run of task={config.task.name} model={config.model.name} with these "
            f"settings under {config.outputs}: train it first, with resume=auto instead of run=auto"
        )
    return found


def _train(config: Config, run: RunDirectory, device: torch.device) -> None:
    with run:
        finished = run.read_result()
        if config.resume is None and (run.last.exists() or finished is not None):
            raise ConfigError(
                f"{run.path} holds a run already: go on with resume=auto, or choose another folder"
            )
        if run.config.exists():
            _check_same(config, run)
        if finished is not None and not _goes_on(config, finished):
            data = f"; {finished['data']}" if "data" in finished else ""
            values = format_values(finished["test"])
            log.info("%s is finished: test %s%s", run.path, values, data)
            return
        run.failure.unlink(missing_ok=True)
        try:
            result = train(config, build_task(config), run, device)
        except Interrupted:
            raise
        except Exception as error:
            if not run.result.exists():  # a finished run that could not go on is a finished run
                run.write_failure(error)
            raise
    print(f"test  {format_values(result['test'])}   ({run.path})")


def _goes_on(config: Config, finished: dict[str, float]) -> bool:
    """Whether the settings ask for more steps than the finished run was allowed."""
    if config.max_steps is not None and config.max_steps <= finished["max_steps"]:
        return False
    epochs = config.max_epochs or config.task.max_epochs
    steps_per_epoch = finished["steps"] / finished["epochs"]
    return min(epochs * steps_per_epoch, config.max_steps or float("inf")) > finished["max_steps"]


def _check_same(config: Config, run: RunDirectory) -> None:
    try:
        saved = yaml.safe_load(run.config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{run.config} cannot be read: {error}") from error
    for key, (ours, theirs) in settings.differences(settings.to_dict(config), saved).items():
        raise ConfigError(
            f"a resumed run keeps its settings: {key} is {theirs!r} in {run.path}, not {ours!r}"
        )


def choose_device(name: str) -> torch.device:
    """
    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices here")
    return device


def check_kernel(name: str, device: torch.device) -> None:
    """
    Raises:
        ConfigError: there is no such kernel, or it cannot serve here.
    """
    if name == "auto":
        return  # chosen when it is needed
    try:
        kernels.choose(name, device, torch.float32)
    except (ValueError, kernels.BuildError) as error:
        raise ConfigError(f"kernel={name}: {error}") from error


def _replay(arguments: list[str]) -> list[str]:
    """Before `resume=DIR` or `run=DIR` the overrides that made the run in DIR.

    So `bnrnn resume=DIR` needs no other setting, and the command line stays what Hydra saw.
    """
    given: dict[str, str] = {}
    parser = OverridesParser.create()
    for argument in arguments:
        if "=" in argument and not argument.startswith("-"):
            try:
                override = parser.parse_override(argument)
                given[override.get_key_element()] = str(override.value() or "")
            except HydraException:
                pass  # said better when Hydra parses all of them
    folder = given.get("run") or given.get("resume")
    if not folder or folder == "auto":
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError("resume=DIR and run=DIR are for one run; a sweep takes resume=auto")
    run = RunDirectory(Path(folder))
    if not run.path.is_dir():
        raise CheckpointError(f"no run directory at {folder}")
    if "resume" in given and not run.last.exists():
        raise CheckpointError(f"{folder} has no last.pt to go on from: start the run anew")
    own = {"run", "resume", "mode"} | given.keys()
    typed = {o: parser.parse_override(o).get_key_element() for o in run.read_overrides()}
    return [override for override, key in typed.items() if key not in own] + arguments


def _register_resolvers() -> None:
    OmegaConf.register_new_resolver("bnrnn.run_dir", _run_dir, replace=True)
    OmegaConf.register_new_resolver("bnrnn.sweep_subdir", _sweep_subdir, replace=True)


def _run_dir(stamp: str, *, _root_: DictConfig) -> str:
    """Where this command writes: a new run directory, or the one it goes on in."""
    if _root_.mode in settings.USE_A_RUN and _root_.run:
        return str(_unused(_used_by(_root_) / _root_.mode, stamp))
    if _root_.mode == "train" and _root_.resume is not None:
        found = _resumed(_root_)
        if found is not None:
            return str(found)
    outputs = Path(_root_.outputs)
    if _root_.mode == "report":
        return str(outputs / "report")
    if _root_.mode in settings.ANALYSES:
        parent = outputs / _root_.mode
    else:
        folder = "data" if _root_.mode == "data" else _root_.model.name
        parent = outputs / _root_.task.name / folder
    return str(_unused(parent, stamp))


def _unused(parent: Path, stamp: str) -> Path:
    """Two commands can begin within a second."""
    path, attempt = parent / stamp, 1
    while path.exists():
        attempt += 1
        path = parent / f"{stamp}-{attempt}"
    return path


def _sweep_subdir(number: int, stamp: str, *, _root_: DictConfig) -> str:
    """A job's folder in its sweep; the one it goes on in, or looks into, is named absolutely."""
    if _root_.mode in settings.USE_A_RUN and _root_.run:
        # Each job by its number: several may look into one run.
        return str(_used_by(_root_).resolve() / _root_.mode / f"{stamp}-{number}")
    if _root_.mode == "train" and _root_.resume is not None:
        found = _resumed(_root_)
        if found is not None:
            return str(found.resolve())
    return f"{number}-{_root_.task.name}-{_root_.model.name}-seed{_root_.seed}"


def _resumed(root: DictConfig) -> Path | None:
    if root.resume != "auto":
        return Path(root.resume)
    return find_matching(Path(root.outputs), _plain(root))


def _used_by(root: DictConfig) -> Path:
    """As `_used_run`, which says so if there is none."""
    if root.run != "auto":
        return Path(root.run)
    return find_finished(Path(root.outputs), _plain(root)) or Path(root.outputs)


def _plain(root: DictConfig) -> dict[str, Any]:
    keys = [str(key) for key in root if key != "hydra"]
    ours = OmegaConf.to_container(OmegaConf.masked_copy(root, keys), resolve=True)
    assert isinstance(ours, dict)
    return {str(key): value for key, value in ours.items()}


def _quoted(path: Path) -> str:
    """As Hydra's grammar wants it on a shell's command line."""
    text = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    plain = all(character.isalnum() or character in "/._-" for character in text)
    return text if plain else f"\"'{text}'\""


# At import, because the processes of a parallel launcher import this module and call `_job`.
settings.register()
_register_resolvers()
