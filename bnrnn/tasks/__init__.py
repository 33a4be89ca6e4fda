"""One class a kind of task; `build_task` finds it by its settings."""

from pathlib import Path

from bnrnn.config import CharacterConfig, Config, PixelConfig, QuestionConfig
from bnrnn.tasks.base import Batch, Progress, Task
from bnrnn.tasks.characters import CharacterModel, CharacterTask
from bnrnn.tasks.pixels import PixelModel, PixelTask
from bnrnn.tasks.questions import QuestionTask


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
    if isinstance(config.task, QuestionConfig):
        return QuestionTask(config.task, config.seed, data_dir, config.data.synthetic)
    raise TypeError(f"no task for {type(config.task).__name__}")


__all__ = [
    "Batch", "CharacterModel", "CharacterTask", "PixelModel", "PixelTask", "Progress",
    "QuestionTask", "Task", "build_task",
]  # fmt: skip
