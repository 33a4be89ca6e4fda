"""Check the command line before Hydra reads it; add the settings of a run that it names."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Sweep
from hydra.errors import HydraException

import bnrnn
from bnrnn.command.explain import unknown_choice, unknown_setting
from bnrnn.command.terminal import say
from bnrnn.command.where import resumed_folder
from bnrnn.errors import CheckpointError, ConfigError
from bnrnn.runs.files import only_read
from bnrnn.runs.record import read_settings
from bnrnn.settings import compose
from bnrnn.settings.compose import GROUPS, as_override, keys, literal, options
from bnrnn.settings.same import flatten
from bnrnn.settings.schema import Config

FLAGS = {"-h", "--help", "--hydra-help", "--version", "-m", "--multirun", "--resolve"}
CFG, OWN_FOLDER = ("-c", "--cfg"), ("-cd", "--config-dir")  # flags with a value
SHOWN_BY_CFG = ("job", "hydra", "all")
# Hydra's flags for shell completion: setting it up, removing it, and each query of the shell.
COMPLETION = [
    ["-sc", f"{what}={shell}"]
    for what in ("install", "uninstall", "query")
    for shell in ("bash", "fish", "zsh")
]
HYDRA_KEYS = ("hydra.launcher.", "hydra.verbose", "hydra.searchpath")
SECTIONS = ("task", "model", "optimizer")  # every run chooses one option of each group
_NAMES = tuple((section, "name") for section in SECTIONS)
OF_THE_COMMAND = ("mode", "run", "resume", "outputs", "question")
DATA_FILES = tuple(
    f"data.{part}{name}"
    for part in ("", "dev_", "test_")
    for name in ("features", "targets", "utt2spk")
)
PLACES = ("data_dir", "task.path")
PATHS = ("run", "resume", "outputs", "question", *PLACES, *DATA_FILES)
TEXTS = ("task.corpus", "sample.prompt", "data.name", "model.title")
PIPES = "data.pipes"  # never read from a file, because it permits commands


def check(arguments: list[str]) -> list[str]:
    """Return the arguments for Hydra, with the settings of the run in `run=DIR` or `resume=DIR`.

    Raises:
        ConfigError: a flag, key or name that bnrnn does not have, or a sweep over nothing.
        CheckpointError: DIR contains no run, or a damaged one.
    """
    if arguments in COMPLETION:
        return arguments
    flags, words = _split([_as_text(word) for word in arguments])
    only_read(None)
    compose.use_folder(_own_folder(flags))
    if "--version" in flags:
        say(f"bnrnn {bnrnn.__version__}")
        sys.exit(0)
    overrides = _parse(words)
    for override in overrides:
        _check(override, arguments)
    compose.allow_commands(any(override.key_or_group == PIPES for override in overrides))
    # The flags first: Hydra's parser refuses settings on both sides of a flag.
    return flags + _settings_of_run(overrides, _is_sweep(flags)) + words


def _as_text(word: str) -> str:
    """Quote the values of paths and texts that Hydra reads as a number or cannot read: 007, ~/x."""
    key, equals, value = word.partition("=")
    if key not in (*PATHS, *TEXTS):
        return word
    whole = set(value) & set("'\"[{(")  # a comma in quotes or brackets separates no values
    values = [value] if whole else value.split(",")
    return f"{key}{equals}{','.join(_quoted(v.strip(), key in PATHS) for v in values)}"


def _quoted(value: str, is_path: bool) -> str:
    if value == "~" or value.startswith("~/"):  # the shell does not expand outputs=~/x
        return literal(os.path.expanduser(value) if is_path else value)
    is_word = re.fullmatch(r"[\w.+-]+", value, re.ASCII) and value.lower() != "null"
    return as_override(value) if is_word else value


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the flags with their values, each in one word, and the other arguments."""
    flags, words, rest = [], [], list(arguments)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif flag in (*CFG, *OWN_FOLDER):
            if not equals:
                value = rest.pop(0) if rest else ""
            flags.append(_with_value(flag, value))
        elif word in FLAGS:
            flags.append(word)
        else:
            raise ConfigError(
                f"there is no flag {word}; settings are written key=value, and bnrnn --help "
                "lists the common ones"
            )
    if "--resolve" in flags and not any(flag.startswith("--cfg=") for flag in flags):
        raise ConfigError("--resolve goes with --cfg job")
    if any(flag.startswith("--cfg=") for flag in flags) and _is_sweep(flags):
        raise ConfigError("--cfg shows one job: leave out -m")
    return flags, words


def _is_sweep(flags: list[str]) -> bool:
    return not {"-m", "--multirun"}.isdisjoint(flags)


def _with_value(flag: str, value: str) -> str:
    """Return a flag and its value as one word.

    Raises:
        ConfigError: the value is missing or is none of the flag's.
    """
    if flag in OWN_FOLDER:
        if not value:
            raise ConfigError(f"{flag} needs a folder: {flag} DIR")
        return f"--config-dir={value}"
    if value not in SHOWN_BY_CFG:
        choices = ", ".join(SHOWN_BY_CFG)
        raise ConfigError(f"{flag}: invalid choice: {value!r}; choose one of {choices}")
    return f"--cfg={value}"


def _own_folder(flags: list[str]) -> Path | None:
    """Return the folder that `--config-dir` names.

    Raises:
        ConfigError: there is no such folder.
    """
    for word in flags:
        flag, _, value = word.partition("=")
        if flag == "--config-dir":
            folder = Path(value).expanduser().absolute()
            if not folder.is_dir():
                raise ConfigError(f"--config-dir: there is no folder {folder}")
            return folder
    return None


def _parse(words: list[str]) -> list[Override]:
    found = []
    for word in words:
        try:
            found.append(OverridesParser.create().parse_override(word))
        except Exception as error:  # functions in a value can raise any exception
            known = isinstance(error, HydraException)
            why = "" if known else f" ({' '.join(str(error).split()) or type(error).__name__})"
            raise ConfigError(
                f"cannot read {word!r}{why}: settings are written key=value; put quotes around a "
                "value with special characters, such as \"outputs='my runs'\""
            ) from error
    return found


def _check(override: Override, arguments: list[str]) -> None:
    key, word = override.key_or_group, override.input_line or ""
    if override.package is not None or not key:
        raise ConfigError(f"cannot read {word!r}: settings are written key=value")
    if override.is_delete():
        raise ConfigError(f"{word}: a setting cannot be removed, only given another value")
    if key.startswith(("hydra.", "hydra/")) and not (
        key == "hydra/launcher" or key.startswith(HYDRA_KEYS)
    ):
        raise ConfigError(
            f"{key} is not a setting of bnrnn: outputs=DIR sets the folder of runs, and "
            "hydra/launcher= how a sweep runs"
        )
    if override.is_add() or override.is_force_add():
        raise ConfigError(
            f"{key} is written without +"
            if key in (*keys(), *GROUPS)
            else unknown_setting(key, arguments)
        )
    values = _values(override)
    if key in ("run", "resume", "outputs", "data_dir") and "" in values:
        raise ConfigError(f"{key} must be a folder, got ''")
    if override.is_sweep_override() and not values:
        raise ConfigError(f"{word} is an empty sweep: no value matches")
    if key in GROUPS:
        for value in values:
            _check_choice(key, value)
    elif key in SECTIONS or "/" in key.replace("hydra/launcher", ""):
        raise ConfigError(unknown_setting(key, arguments))


def _values(override: Override) -> list[Any]:
    """Return the values of an override: one, or all values of a sweep."""
    if not override.is_sweep_override():
        return [override.value()]
    value: Any = override.value()
    try:
        if isinstance(value, Glob):
            key = override.key_or_group
            return value.filter(options(key)) if key in GROUPS else []
        return list(override.sweep_iterator()) if override.is_discrete_sweep() else [value]
    except Exception as error:  # range(0,3,0) raises Python's ValueError
        raise ConfigError(f"cannot read {override.input_line!r}: {error}") from error


def _check_choice(group: str, value: Any) -> None:
    names = options(group)
    if value is None and group not in SECTIONS:
        return
    if not isinstance(value, str) or value not in names:
        shown = "null" if value is None else str(value)
        raise ConfigError(unknown_choice(group, shown))


def _settings_of_run(overrides: list[Override], sweep: bool) -> list[str]:
    """Return the overrides that compose the settings of the run in `run=DIR` or `resume=DIR`.

    They are read as data from its config.yaml. Each key must be a setting and each choice a name
    that bnrnn has, so an untrusted folder can set only numbers, names and the places of data, where
    nothing is then written. It cannot run commands: `data.pipes` is not replayed, and if the
    command line sets it, no place of data is replayed.

    Raises:
        ConfigError: there are several folders, or the command is a sweep.
        CheckpointError: the folder contains no run, or a damaged one.
    """
    given = {o.key_or_group: o.value() for o in overrides}
    folder = given.get("run") or given.get("resume")
    if not isinstance(folder, str | Sweep) or folder == "auto":
        return []
    if sweep or isinstance(folder, Sweep):
        raise ConfigError("resume=DIR and run=DIR are for one run; a sweep takes resume=auto")
    path = Path(os.path.expanduser(folder))
    if "resume" in given:
        resumed_folder(path)
    elif not path.is_dir():
        raise CheckpointError(f"no run directory at {folder}")
    file = path / "config.yaml"
    saved = read_settings(file)
    if saved is None:
        raise CheckpointError(f"{path} has no config.yaml: it is not a run directory")
    choices = {group: saved.get(group, {}).get("name") for group in SECTIONS if group not in given}
    for group, name in choices.items():
        if name not in options(group):
            raise CheckpointError(
                f"{file}: {group}.name is {str(name)!r:.60}, which this bnrnn does not have"
            )
    chosen = [f"{group}={name}" for group, name in choices.items()]
    known, replayed = keys(*chosen), []
    for key, value in flatten(saved).items():
        section, _, name = key.partition(".")
        if key in (*given, *OF_THE_COMMAND, PIPES) or (section, name) in _NAMES:
            continue
        if PIPES in given and key in (*PLACES, "task.corpus", *DATA_FILES):
            continue  # untrusted files may contain commands
        if section in SECTIONS and section not in choices:  # the command line chose another option
            continue
        if key in PLACES and not (isinstance(value, str) and os.path.exists(value)):
            continue  # from another machine
        if key == "data_dir" and value != Config.data_dir:  # perhaps a stranger's choice
            only_read(Path(os.path.expanduser(value)))
        if key not in known:
            raise CheckpointError(f"{file}: this bnrnn has no setting {key!r:.60}")
        replayed.append(f"{key}={as_override(value)}")
    return chosen + replayed
