"""Compose `conf/` and the command line to a `Config` with Hydra; only this file uses DictConfig."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from bnrnn.errors import ConfigError
from bnrnn.settings import schema
from bnrnn.settings.same import flatten, to_dict
from bnrnn.settings.schema import Config

CONF = "bnrnn.conf"
# Whether the command line itself contains `data.pipes`; it may be true only then. Other processes,
# such as those of a parallel launcher, do not know the command line, so they refuse it.
_commands_typed = False

# The folder of this command's `--config-dir`, with settings files in addition to `conf/`.
_own: Path | None = None

GROUPS = ("model", "task", "optimizer", "experiment", "reproduce")
_NOT_TEXT = ("null", "true", "false", "nan", "inf")


@functools.cache
def register() -> None:
    """Register the resolvers and the schemas, `base_*` in each group of `conf/`, with Hydra."""
    # Hydra copies the whole store for each composition, a hundred times for --help. The copy is
    # not needed: Hydra also copies each schema that it uses.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # pyright: ignore (it has none)
    OmegaConf.register_new_resolver("bnrnn.by_scale", _by_scale, replace=True)
    OmegaConf.register_new_resolver("bnrnn.by_size", _by_size, replace=True)
    add("base_config", Config)
    add("base_model", schema.ModelConfig, "model")
    add("base_attentive", schema.AttentiveReaderConfig, "model")
    add("base_words", schema.WordModelConfig, "model")
    add("base_speech", schema.SpeechConfig, "model")
    add("base_character_stack", schema.CharacterStackConfig, "model")
    add("base_pixels", schema.PixelConfig, "task")
    add("base_questions", schema.QuestionConfig, "task")
    add("base_characters", schema.CharacterConfig, "task")
    add("base_character_stack", schema.CharacterStackTaskConfig, "task")
    add("base_words", schema.WordConfig, "task")
    add("base_frames", schema.FrameConfig, "task")
    add("base_adam", schema.AdamConfig, "optimizer")
    add("base_rmsprop", schema.RMSPropConfig, "optimizer")
    add("base_sgd", schema.SGDConfig, "optimizer")


def literal(text: str) -> str:
    """Quote a string in Hydra's grammar; `${` in it stays text."""
    # Of OmegaConf's and Hydra's escapes, only backslashes before a special character are doubled.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\*)\Z", r"\1\1", text) + "'"


def as_override(value: Any) -> str:
    """Write a value of a setting in Hydra's grammar, without quotes if it needs none."""
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return repr(value)
    # Hydra reads other words as a number, a list or a null.
    plain = re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII)
    return value if plain and value.lower() not in _NOT_TEXT else literal(value)


def add(name: str, node: Any, group: str | None = None) -> None:
    """Register settings without a file under `group=name`; `node`: a dataclass or an instance."""
    _composed.cache_clear()
    ConfigStore.instance().store(name=name, node=node, group=group)


def _by_scale(scale: str | None, minutes: Any, hour: Any, full: Any) -> Any:
    """Choose one of three values by the scale of `reproduce=`."""
    return {"minutes": minutes, "hour": hour}.get(scale or "full", full)


def _by_size(size: str, small: Any, medium: Any, large: Any) -> Any:
    """Choose one of three values by the size of the word model."""
    return {"medium": medium, "large": large}.get(size, small)


def allow_commands(typed: bool) -> None:
    """Record whether this command line contains `data.pipes`."""
    global _commands_typed
    _commands_typed = typed


def use_folder(folder: Path | None) -> None:
    """Let `group=name` also choose files of `folder`."""
    global _own
    if folder != _own:
        _own = folder
        _composed.cache_clear()


def from_hydra(cfg: DictConfig) -> Config:
    """Convert a composed configuration to plain objects, and check all values.

    Raises:
        ConfigError: a value is invalid; the message names the key and the valid values.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give it one, {missing[0]}=…")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    # Hydra's +key=value adds keys that are not in the schema.
    given = OmegaConf.to_container(cfg)
    assert isinstance(given, dict)
    known = flatten(to_dict(config))
    for key in flatten({str(key): value for key, value in given.items()}):
        if key not in known:
            raise ConfigError(f"there is no setting {key!r}")
    if config.data.pipes and not _commands_typed:
        raise ConfigError(
            "data.pipes=true lets files run commands: it is accepted only on the command line "
            "itself, and for one run"
        )
    for name in ("data_dir", "outputs", "run", "resume", "question"):
        if (path := getattr(config, name)) is not None:
            setattr(config, name, os.path.expanduser(path))  # shells do not expand outputs=~/x
    return config


def compose_config(*overrides: str) -> Config:
    """Return the settings of a command with these overrides.

    Raises:
        ConfigError: see `from_hydra`.
        HydraException, OmegaConfBaseException: an override cannot be parsed or does not exist.
    """
    with _hydra():
        return from_hydra(compose("config", list(overrides)))


def keys(*choices: str) -> list[str]:
    """Return the flat keys of all settings in the groups that `choices` select.

    Raises: as `compose_config`; values are not checked.
    """
    return list(_flat(choices, resolve=False))


def defaults(*choices: str) -> dict[str, Any]:
    """Return the flat settings of a command with these choices, even if some are missing.

    Raises: as `compose_config`; values are not checked.
    """
    return _flat(choices, resolve=True)


def _flat(choices: tuple[str, ...], resolve: bool) -> dict[str, Any]:
    settings = OmegaConf.to_container(_composed(*choices), resolve=resolve)
    assert isinstance(settings, dict)
    return flatten({str(key): value for key, value in settings.items()})


@functools.cache
def _composed(*choices: str) -> DictConfig:
    """Compose and cache, because the report needs the same settings for each run. Do not modify."""
    own = [] if _own is None else [f"hydra.searchpath=[{literal(f'file://{_own}')}]"]
    with _hydra():
        return compose("config", [*choices, *own])


def options(group: str) -> list[str]:
    """Return a group's options: files in `conf/` and of `use_folder`, and those of `add`."""
    folder = resources.files(CONF) / group
    files = {entry.name for entry in folder.iterdir() if entry.is_file()}
    added = ConfigStore.instance().repo.get(group, {})
    own = set() if _own is None else {path.name for path in (_own / group).glob("*.yaml")}
    found = files | set(added) | own
    names = {name.removesuffix(".yaml") for name in found if name.endswith(".yaml")}
    return sorted(name for name in names if not name.startswith("base_"))


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """Make sure that Hydra is initialised; the command may have done it already."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        register()
        with initialize_config_module(CONF, version_base="1.3"):
            yield
