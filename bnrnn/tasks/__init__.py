"""One class a kind of task; `build_task` finds it by its settings."""

from pathlib import Path

from bnrnn.config import CharacterConfig, Config, PixelConfig
from bnrnn.tasks.base import Batch, Progress, Task
from bnrnn.tasks.characters import CharacterModel, CharacterTask
from bnrnn.tasks.pixels import PixelModel, PixelTask


def build_task(config: Config) -> Task:
    """Load the data of `config.task`.

    Raises:
        DataError: they are missing, damaged, or too short for the settings.
    """
    data_dir = Path(config.data_dir)
    if isinstance(config.task, PixelConfig):
        return PixelTask(config.task, config.seed, data_dir)
    if isinstance(config.task, CharacterConfig):
        return CharacterTask(config.task, config.seed, data_dir)
    raise TypeError(f"no task for {type(config.task).__name__}")


__all__ = [
    "Batch", "CharacterModel", "CharacterTask", "PixelModel", "PixelTask", "Progress", "Task",
    "build_task",
]  # fmt: skip
