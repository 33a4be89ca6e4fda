"""Settings as plain data, and which of them make two runs two runs."""

import dataclasses
from typing import Any

from bnrnn.settings.schema import FREE, Config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, for YAML, JSON and checkpoints."""
    return dataclasses.asdict(config)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"task": {"length": 100}} -> {"task.length": 100}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def free_settings(config: Any, prefix: str = "", free: bool = False) -> list[str]:
    """The flat keys that a resumed run may change: where things are and how long it goes on."""
    found = []
    for field in dataclasses.fields(config):
        value, may_change = getattr(config, field.name), free or FREE in field.metadata
        if dataclasses.is_dataclass(value):
            found += free_settings(value, f"{prefix}{field.name}.", may_change)
        elif may_change:
            found.append(prefix + field.name)
    return found


def differences(ours: Config, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that make two runs different runs: key -> (ours, saved); None: not there."""
    free, here, there = free_settings(ours), flatten(to_dict(ours)), flatten(saved)
    return {
        key: (here.get(key), there.get(key))
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and key not in free
    }
