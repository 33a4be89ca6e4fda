"""The metrics of a run in progress: `metrics.jsonl` and TensorBoard."""

import os
from typing import Any

import yaml
from torch import nn
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from bnrnn.errors import CheckpointError, OutputError
from bnrnn.nn.feature_norm import FeatureNorm
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.statistics import StepStatistics
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.record import Metric, Record, Settings, read_records, write_records
from bnrnn.settings import compose
from bnrnn.settings.same import flatten

_GAMMA, _VARIANCE = "gamma_mean", "population_variance"  # tags of scalars
_USUAL = ("optimizer.lr", "seed", "model.hidden_size", "task.batch_size")
_NOT_COMPARED = ("data_dir", "outputs", "resume", "optimizer.name")


class MetricsWriter:
    """Writes one JSON object per line, and the same values to TensorBoard.

    Every line has `step` and `split` ("train" or "valid"; "test" at the end). A validation also has
    `statistics` ("population" or "batch").
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: Settings,
        metric: Metric,
        first_step: int = 0,
        validated: int = -1,
        count: int = 0,
    ) -> None:
        """Open the metrics of a run, and drop records that are newer than its checkpoint.

        Args:
            metric: the metric that selects the model.
            first_step, validated, count: the checkpoint's step, the step of its last validation,
                and its number of records. A killed process may have written records beyond them;
                they are dropped, because training writes them again.

        Raises:
            CheckpointError: there are fewer records than the checkpoint had.
            OutputError: the records cannot be written.
        """
        kept = up_to(read_records(run.metrics), first_step, validated)
        if len(kept) < count:
            raise CheckpointError(
                f"{run.metrics} has lost {count - len(kept)} of the {count} records that "
                f"{run.last.name} was saved with: restore both from one copy, or "
                "start the run again"
            )
        self.count = len(kept)  # records written, of training and validation
        write_records(run.metrics, kept)
        try:
            self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
            self._writer = SummaryWriter(
                str(run.tensorboard), purge_step=first_step + 1 if first_step else None
            )
            if first_step == 0:
                self._describe(settings, metric)
        except OSError as error:
            raise OutputError(f"cannot write to {run.path}: {error.strerror}") from error

    def _describe(self, settings: Settings, metric: Metric) -> None:
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", f"```yaml\n{text}```".encode(errors="replace").decode())
        name = metric.name
        curves = [f"{name}/valid_population", f"{name}/valid_batch", f"{name}/train"]
        # Three questions: does training converge, are gradients sane, is the normalisation sane?
        self._writer.add_custom_scalars({
            "Overview": {
                metric.title: ["Multiline", curves],
                "gradient norm": ["Multiline", ["grad_norm/train"]],
                "mean of each γ": ["Multiline", [f"{_GAMMA}/.*"]],
                "smallest population variance of each term": ["Multiline", [f"{_VARIANCE}/.*"]],
            }
        })  # fmt: skip
        results = {f"{name}/valid_population": 0, f"{name}/test_population": 0}
        for summary in hparams(_compared(settings), results):
            self._writer._get_file_writer().add_summary(summary)

    def write(
        self, step: int, split: str, values: dict[str, float], statistics: str | None = None
    ) -> None:
        """Write one record.

        Raises:
            OutputError: the disk is full.
        """
        record = Record(step, split, values, statistics)
        # Group by metric, so that a page shows, say, the accuracy of all splits together.
        curve = split if statistics is None else f"{split}_{statistics}"
        try:
            self._file.write(record.to_json() + "\n")
            self._file.flush()
            for name, value in values.items():
                if name not in ("epoch", "seconds"):
                    self._writer.add_scalar(f"{name}/{curve}", value, step)
        except OSError as error:
            raise _full(self._file.name, error) from error
        self.count += 1

    def write_parameters(self, step: int, model: nn.Module) -> None:
        """Write the histogram and mean of every γ, and each term's smallest population variance.

        The histograms show whether γ changes and how it is distributed over units. The smallest
        variance is over units and time steps: normalising a term whose variance is close to ε
        amplifies noise.
        """
        for name, module in model.named_modules():
            if isinstance(module, StepStatistics) and len(module.var):
                self._writer.add_scalar(f"{_VARIANCE}/{name}", module.var.min().item(), step)
            if isinstance(module, (BNLSTM, FeatureNorm)):
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    if parameter_name.startswith("gamma"):
                        tag = f"gamma/{name}.{parameter_name}"
                        self._writer.add_histogram(tag, parameter.detach().cpu(), step)
                        mean = parameter.detach().mean().item()
                        self._writer.add_scalar(f"{_GAMMA}/{name}.{parameter_name}", mean, step)
        self._flush()

    def write_figures(self, step: int, figures: dict[str, Any]) -> None:
        for name, figure in figures.items():
            self._writer.add_figure(name, figure, step)
        self._flush()

    def sync(self) -> None:
        """Flush all records to disk, before a checkpoint that depends on them.

        Raises:
            OutputError: the disk is full.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _full(self._file.name, error) from error

    def _flush(self) -> None:
        try:
            self._writer.flush()
        except OSError as error:
            raise _full("TensorBoard's events", error) from error

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._file.close()
            self._writer.close()
        except OSError as error:
            if exc[0] is None:  # an error that is already being raised says more
                raise _full(self._file.name, error) from error


def _compared(settings: Settings) -> dict[str, bool | int | float | str]:
    """Return the settings in TensorBoard's table of a sweep.

    These are the common settings, and all that differ from the defaults of `task=` and `model=`.
    """
    flat = flatten(settings)
    shown = {key.rpartition(".")[2]: flat[key] for key in _USUAL if key in flat}
    shown |= {kind: flat[f"{kind}.name"] for kind in ("model", "optimizer")}
    usual = compose.defaults(f"task={flat['task.name']}", f"model={flat['model.name']}")
    shown |= {
        key: value
        for key, value in flat.items()
        if key in usual and value != usual[key] and key not in (*_USUAL, *_NOT_COMPARED)
    }
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in shown.items()
    }


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


def _full(name: str, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {name}: {error.strerror}; free some space or choose another place with "
        "outputs=DIR"
    )


def up_to(records: list[Record], step: int, validated: int) -> list[Record]:
    """Return the training records up to `step` and the validations up to `validated`; no test."""
    last = {"train": step, "valid": validated}
    return [record for record in records if record.step <= last.get(record.split, -1)]


def format_values(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
