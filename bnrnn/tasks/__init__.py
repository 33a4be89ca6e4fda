"""One class a kind of task; `build_task` finds it by its settings, `register` adds another."""

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
    """Let `bnrnn task=NAME` choose a task of another package.

    Args:
        settings: of a dataclass of its own, which extends `TaskConfig`; `name` is NAME.
        build: loads the data; `config.task` is of the class of `settings`.
    """
    _BUILDERS[type(settings)] = build
    compose.add(settings.name, settings, "task")


def build_task(config: Config) -> Task:
    """Load the data of `config.task`.

    Raises:
        DataError: they are missing, damaged, or too short for the settings.
    """
    return _BUILDERS[type(config.task)](config)


__all__ = [
    "Batch", "CharacterModel", "CharacterStackTask", "CharacterTask", "FrameTask", "Loss",
    "PixelModel", "PixelTask", "Progress", "QuestionTask", "SpeechModel", "Sums", "Task",
    "WordTask", "build_task", "classify", "register",
]  # fmt: skip
