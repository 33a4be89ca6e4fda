"""A run's TensorBoard page: settings, curves, statistics, gradients and figures."""

import threading
from typing import Any

import yaml
from torch import nn
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from bnrnn.nn.feature_norm import FeatureNorm
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.statistics import StepStatistics
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.record import Metric, Record, Settings
from bnrnn.settings import compose
from bnrnn.settings.same import flatten

_GAMMA, _VARIANCE = "gamma_mean", "population_variance"  # tags of scalars
_USUAL = ("optimizer.lr", "seed", "model.hidden_size", "task.batch_size")
_NOT_COMPARED = ("data_dir", "outputs", "resume", "optimizer.name")


class TensorBoard:
    """Writes TensorBoard's events of a run. Every method raises OSError if the disk is full."""

    def __init__(self, run: RunDirectory, first_step: int) -> None:
        """Open the events; TensorBoard hides earlier events of steps after `first_step`."""
        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(run.tensorboard), purge_step=purge_step)

    def describe(self, settings: Settings, metric: Metric) -> None:
        """Write the settings, the layout of the overview, and the row in the table of a sweep."""
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

    def write(self, record: Record) -> None:
        # Group by metric, so that a page shows, say, the accuracy of all splits together.
        kind = record.statistics
        curve = record.split if kind is None else f"{record.split}_{kind}"
        for name, value in record.values.items():
            if name not in ("epoch", "seconds"):
                self._writer.add_scalar(f"{name}/{curve}", value, record.step)

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
        self._writer.flush()

    def write_figures(self, step: int, figures: dict[str, Any]) -> None:
        for name, figure in figures.items():
            self._writer.add_figure(name, figure, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


_print_traceback = threading.excepthook


def _except_of_the_writer(failed: threading.ExceptHookArgs) -> None:
    # TensorBoard writes in a thread. It keeps an OSError for the next call, which raises it again.
    of_the_writer = type(failed.thread).__module__.startswith("tensorboard.")
    if not (of_the_writer and issubclass(failed.exc_type, OSError)):
        _print_traceback(failed)


threading.excepthook = _except_of_the_writer


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
