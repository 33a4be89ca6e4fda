"""Settings as plain data, and the settings in which two runs differ."""

import dataclasses
from typing import Any

from bnrnn.settings.schema import FREE, Config


def to_dict(config: Config) -> dict[str, Any]:
    """Convert to nested plain dicts, for YAML, JSON and checkpoints."""
    return dataclasses.asdict(config)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"task": {"length": 100}} to {"task.length": 100}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def free_settings(config: Any, prefix: str = "", free: bool = False) -> list[str]:
    """Return the flat keys that a resumed run may change, such as paths and its length."""
    found = []
    for field in dataclasses.fields(config):
        value, may_change = getattr(config, field.name), free or FREE in field.metadata
        if dataclasses.is_dataclass(value):
            found += free_settings(value, f"{prefix}{field.name}.", may_change)
        elif may_change:
            found.append(prefix + field.name)
    return found


def differences(ours: Config, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two runs differ: key -> (ours, saved); None: missing."""
    free, here, there = free_settings(ours), flatten(to_dict(ours)), flatten(saved)
    return {
        key: (here.get(key), there.get(key))
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and key not in free
    }
