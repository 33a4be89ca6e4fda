"""The metrics of a run in progress: `metrics.jsonl` and TensorBoard."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from bnrnn.errors import CheckpointError, OutputError
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.files import cannot_write
from bnrnn.runs.record import Metric, Record, Settings, read_records, write_records
from bnrnn.runs.tensorboard import TensorBoard


class MetricsWriter:
    """Writes one JSON object per line, and the same values to TensorBoard.

    Every line has `step` and `split` ("train" or "valid"; "test" at the end). A validation also has
    `statistics` ("population" or "batch"). Every method raises OutputError if the disk is full.
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: Settings,
        metric: Metric,
        first_step: int,
        kept: list[Record],
    ) -> None:
        """Open the metrics of a run after `first_step`, with the records `kept` of it so far.

        Args:
            metric: the metric that selects the model.

        Raises:
            OutputError: the records cannot be written.
        """
        self.count = len(kept)  # records written, of training and validation
        write_records(run.metrics, kept)
        with contextlib.ExitStack() as opened:
            with _explained(run.path):
                self._file = opened.enter_context(open(run.metrics, "a", encoding="utf-8"))
                self._board = TensorBoard(run, first_step)
                opened.callback(self._board.close)
                if first_step == 0:
                    self._board.describe(settings, metric)
            self._opened = opened.pop_all()

    def write(
        self, step: int, split: str, values: dict[str, float], statistics: str | None = None
    ) -> None:
        record = Record(step, split, values, statistics)
        with _explained(Path(self._file.name)):
            self._file.write(record.to_json() + "\n")
            self._file.flush()
            self._board.write(record)
        self.count += 1

    def write_parameters(self, step: int, model: nn.Module) -> None:
        with _explained(Path("TensorBoard's events")):
            self._board.write_parameters(step, model)

    def write_figures(self, step: int, figures: dict[str, Any]) -> None:
        with _explained(Path("TensorBoard's events")):
            self._board.write_figures(step, figures)

    def sync(self) -> None:
        """Flush all records to disk, before a checkpoint that depends on them."""
        with _explained(Path(self._file.name)):
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._opened.close()
        except OSError as error:
            if exc[0] is None:  # an error that is already being raised says more
                raise OutputError(cannot_write(Path(self._file.name), error)) from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(cannot_write(path, error)) from error


class NoMetrics:
    """Writes nothing: only one process of a run writes metrics."""

    count = 0

    def write(self, *record: object) -> None: ...

    def write_parameters(self, step: int, model: nn.Module) -> None: ...

    def write_figures(self, step: int, figures: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *exc: object) -> None: ...


def kept_records(run: RunDirectory, step: int, validated: int, count: int) -> list[Record]:
    """Return the records of a run up to its checkpoint.

    A killed process may have written more, which training writes again.

    Args:
        step, validated, count: the checkpoint's step, the step of its last validation, and its
            number of records.

    Raises:
        CheckpointError: there are fewer records than the checkpoint had.
    """
    kept = up_to(read_records(run.metrics), step, validated)
    if len(kept) < count:
        raise CheckpointError(
            f"{run.metrics} has lost {count - len(kept)} of the {count} records that "
            f"{run.last.name} was saved with: restore both from one copy, or start the run again"
        )
    return kept


def up_to(records: list[Record], step: int, validated: int) -> list[Record]:
    """Return the training records up to `step` and the validations up to `validated`; no test."""
    last = {"train": step, "valid": validated}
    return [record for record in records if record.step <= last.get(record.split, -1)]


def format_values(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
