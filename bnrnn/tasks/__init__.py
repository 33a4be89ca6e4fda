"""One class per kind of task. `build_task` selects it by its settings; `register` adds one."""

from collections.abc import Callable
from pathlib import Path

from bnrnn.settings import compose, schema
from bnrnn.settings.schema import Config, TaskConfig
from bnrnn.tasks.base import Batch, Loss, Progress, Sums, Task, classify
from bnrnn.tasks.characters import CharacterModel, CharacterStackTask, CharacterTask
from bnrnn.tasks.frames import FrameTask, SpeechModel
from bnrnn.tasks.pixels import PixelModel, PixelTask
from bnrnn.tasks.questions import QuestionTask
from bnrnn.tasks.words import WordTask

_BUILDERS: dict[type[TaskConfig], Callable[[Config], Task]] = {
    schema.PixelConfig: lambda c: PixelTask(c.task, c.seed, Path(c.data_dir)),  # type: ignore
    schema.CharacterConfig: lambda c: CharacterTask(c.task, c.seed, Path(c.data_dir)),  # type: ignore
    schema.CharacterStackTaskConfig: lambda c: CharacterStackTask(
        c.task, c.seed, Path(c.data_dir)  # type: ignore
    ),
    schema.QuestionConfig: lambda c: QuestionTask(
        c.task, c.seed, Path(c.data_dir), c.data.synthetic  # type: ignore
    ),
    schema.WordConfig: lambda c: WordTask(c.task, c.seed, Path(c.data_dir)),  # type: ignore
    schema.FrameConfig: lambda c: FrameTask(c.task, c.data, c.seed, Path(c.data_dir)),  # type: ignore
}  # fmt: skip


def register(settings: TaskConfig, build: Callable[[Config], Task]) -> None:
    """Register a task of another package under `bnrnn task=NAME`.

    Args:
        settings: an instance of the task's own subclass of `TaskConfig`, with `name` set to NAME.
        build: loads the data and returns the task; `config.task` has the class of `settings`.
    """
    _BUILDERS[type(settings)] = build
    compose.add(settings.name, settings, "task")


def build_task(config: Config) -> Task:
    """Load the data of `config.task`.

    Raises:
        DataError: the data are missing, damaged, or too short for the settings.
    """
    return _BUILDERS[type(config.task)](config)


__all__ = [
    "Batch", "CharacterModel", "CharacterStackTask", "CharacterTask", "FrameTask", "Loss",
    "PixelModel", "PixelTask", "Progress", "QuestionTask", "SpeechModel", "Sums", "Task",
    "WordTask", "build_task", "classify", "register",
]  # fmt: skip
