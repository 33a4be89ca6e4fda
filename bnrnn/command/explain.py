"""Explain Hydra's and OmegaConf's errors in one line: the key, its values, the nearest valid name.

This module parses the messages of Hydra 1.3 and OmegaConf 2.3; `tests/test_wrong_settings.py` pins
them.
"""

import difflib
import re

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from bnrnn.settings.compose import GROUPS, keys, options

_TYPES = {
    "Integer": "an integer", "Float": "a number", "Boolean": "true or false", "String": "text",
    "int": "an integer", "float": "a number", "bool": "true or false", "str": "text",
    "string": "text",
    "List": "a list, such as [1,2]",
}  # fmt: skip
_WRONG_TYPE = (
    r"Value '(?P<value>.*)' of type '[\w.]+' (?:could not be converted to|is not a subclass of|"
    r"is incompatible with type hint) '?(?P<type>\w+)",
    r"Incompatible value '(?P<value>.*)' for field of type '(?P<type>\w+)'",
    r"(?:Invalid type assigned|Invalid value assigned): (?P<value>\w+) is not a (?P<type>List)",
    r"Cannot convert '(?P<value>\w+)' to (?P<type>\w+)",
)


def explain(error: BaseException, arguments: list[str]) -> str:
    """Return the explanation of an error in one line.

    Args:
        error: the exception that Hydra raised for `arguments`.
        arguments: the command line after the program's name.
    """
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    key = re.search(r"full_key: ([\w.]+)", text)
    name = key[1] if key else _interpolated(arguments) or "a setting"

    if match := re.search(r"In 'task/(\w+)':.*Key '\w+' not in '(?:\w*Config)'", text, re.DOTALL):
        model = [a for a in arguments if a.startswith("model=")] or ["its model"]
        kind = "attentive_…" if match[1].startswith("cnn") else "lstm, bnlstm, bn_input…"
        return f"task={match[1]} takes model={kind}, not {model[-1]}"

    if match := re.search(r"Could not find '(hydra/\w+|\w+)/([^']*)'", text):
        group, choice = match.groups()
        if group in GROUPS:
            return unknown_choice(group, choice)
        extra = "joblib: pip install 'bnrnn[joblib]'; submitit_slurm: pip install 'bnrnn[slurm]'"
        return f"there is no {group}={choice} here ({extra})"

    if match := re.search(r"Could not override '([^']+)'", text):
        # Hydra also raises this for a key below a setting that is not a group: model.gamma.x.
        return unknown_setting(match[1].partition("@")[0], arguments)

    if match := re.search(r"Could not append to config.*?'?([\w./]+)'? is already", text):
        return f"{match[1]} is written without +"

    if match := re.search(r"Key '([^']+)' (?:not in|is not in struct)", text):
        return unknown_setting(key[1] if key else match[1], arguments)

    for pattern in _WRONG_TYPE:
        if match := re.search(pattern, text, re.DOTALL):
            value = "null" if match["value"] == "None" else match["value"]
            return f"{name} must be {_TYPES.get(match['type'], match['type'])}, got {value!r}"

    if match := re.search(r"field '([\w.]+)' is not Optional", text):
        return f"{key[1] if key else match[1]} must have a value, got 'null'"

    if match := re.search(r"Interpolation key '([^']*)' not found", text):
        return f"{name}: there is no setting {match[1]!r} to take the value of"

    if match := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return f"{match[1]} has several values: a sweep over them needs -m"

    if match := re.search(r"Multiple values for (\w+)", text):
        return f"{match[1]} is given twice: give it once"

    if match := re.search(r"Environment variable '([^']*)' not found", text):
        return f"{name}: there is no environment variable {match[1]}"

    first = " ".join(text.partition("\n")[0].split())
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return f"{name}: {first}" if key else first
    return f"cannot compose the settings: {first or type(error).__name__}"


def _interpolated(arguments: list[str]) -> str | None:
    """Return the setting whose value refers to another setting."""
    return next((a.partition("=")[0] for a in arguments if "=" in a and "${" in a), None)


def unknown_choice(group: str, name: str) -> str:
    return _unknown(f"{group}={name}", name, options(group), f"{group} may be")


def unknown_setting(key: str, arguments: list[str]) -> str:
    return _unknown(f"setting {key!r}", key, _valid_keys(arguments), None)


def _valid_keys(arguments: list[str]) -> list[str]:
    """Return all dotted settings of the options that `arguments` choose, and all groups."""
    chosen = [
        argument for argument in arguments
        if argument.partition("=")[0] in GROUPS and "," not in argument
    ]  # fmt: skip
    try:
        return [*keys(*chosen), *GROUPS]
    except (HydraException, OmegaConfBaseException):
        return [*keys(), *GROUPS]


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
