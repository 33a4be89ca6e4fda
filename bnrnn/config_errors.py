"""Hydra's and OmegaConf's errors in one line: the key, what it may be, the nearest valid name."""

import difflib
import re
from importlib import resources

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from bnrnn.config import flatten

GROUPS = ("model", "task", "optimizer", "experiment", "reproduce")
_TYPES = {
    "Integer": "an integer", "Float": "a number", "Boolean": "true or false", "String": "text",
}  # fmt: skip


def explain(error: Exception, arguments: list[str]) -> str:
    """
    Args:
        error: what Hydra raised on `arguments`, the command line after the program's name.
    """
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)

    if match := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, name = match.groups()
        return _unknown(f"{group}={name}", name, options(group), f"{group} may be")

    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1].partition("@")[0]
        # A key that is there, but behind one that is not a group (model.gamma.x), is unknown too.
        return _unknown(f"setting {key!r}", key, valid_keys(arguments), None)

    if match := re.search(
        r"Value '(.*)' of type '\w+' (?:could not be converted to|is not a subclass of) '?(\w+)",
        text,
    ):
        key = re.search(r"full_key: ([\w.]+)", text)
        name = key[1] if key else "a setting"
        return f"{name} must be {_TYPES.get(match[2], match[2])}, got {match[1]!r}"

    if match := re.search(r"Multiple values for (\w+)", text):
        return f"{match[1]} is given twice: give it once"

    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            return (
                f"cannot read {argument!r}: settings are written key=value; put quotes around a "
                "value with special characters, such as \"path='my file.txt'\""
            )
    return " ".join(text.split())


def options(group: str) -> list[str]:
    """The names a group of `conf/` may take."""
    folder = resources.files("bnrnn.conf") / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.is_file())


def valid_keys(arguments: list[str]) -> list[str]:
    """All dotted settings of the groups that `arguments` choose, and the groups themselves."""
    chosen = [
        argument for argument in arguments
        if argument.partition("=")[0] in GROUPS and "," not in argument
    ]  # fmt: skip
    GlobalHydra.instance().clear()
    with initialize_config_module("bnrnn.conf", version_base="1.3"):
        try:
            settings = OmegaConf.to_container(compose("config", chosen), resolve=False)
        except HydraException:
            settings = OmegaConf.to_container(compose("config"), resolve=False)
    assert isinstance(settings, dict)
    return [*flatten({str(key): value for key, value in settings.items()}), *GROUPS]


def _unknown(what: str, name: str, valid: list[str], may_be: str | None) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if not close and "." not in name:  # lr for optimizer.lr
        close = [key for key in valid if key.endswith("." + name)][:1]
    if may_be is not None:
        hint = f"; did you mean {close[0]}?" if close else ";"
        return f"there is no {what}{hint} {may_be} {', '.join(valid)}"
    if close:
        return f"there is no {what}; did you mean {close[0]}?"
    section = name.rpartition(".")[0]
    siblings = [key for key in valid if key.rpartition(".")[0] == section] or list(GROUPS)
    return f"there is no {what}; there are {', '.join(siblings)}"
