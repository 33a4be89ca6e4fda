"""What a run measures, as it goes: `metrics.jsonl`, TensorBoard, and lines for a person."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

from bnrnn.config import Config, to_dict
from bnrnn.errors import OutputError
from bnrnn.files import write_atomic
from bnrnn.nn import BNLSTM
from bnrnn.nn.feature_norm import FeatureNorm
from bnrnn.rundir import RunDirectory

UNITS = {"bpc": "bits per character", "error": "error rate"}


class MetricsWriter:
    """Writes one JSON object a line, and the same to TensorBoard.

    Every line has `step` and `split` ("train" or "valid"; "test" at the end), a validation also
    `statistics` ("population" or "batch").
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        metric: str,
        first_step: int = 0,
        validated: int = -1,
    ) -> None:
        """
        Args:
            metric: what the model is selected by.
            first_step, validated: the steps a checkpoint has done and has validated. What a
                process that was killed wrote beyond them will be written again, and is dropped.
        """
        drop_after(run.metrics, first_step, validated)
        try:
            self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
            self._writer = SummaryWriter(
                str(run.tensorboard), purge_step=first_step + 1 if first_step else None
            )
        except OSError as error:
            raise OutputError(f"cannot write to {run.path}: {error.strerror}") from error
        if first_step == 0:
            text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", f"```yaml\n{text}```")
            self._writer.add_custom_scalars({
                "Overview": {
                    UNITS.get(metric, metric): ["Multiline", [
                        f"{metric}/valid_population", f"{metric}/valid_batch", f"{metric}/train",
                    ]],
                    "gradient norm": ["Multiline", ["grad_norm/train"]],
                }
            })  # fmt: skip

    def write(self, step: int, split: str, values: dict[str, float], **labels: str) -> None:
        """
        Raises:
            OutputError: the disk is full.
        """
        record = {"step": step, "split": split, **labels, **values}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self._file.name}: {error.strerror}") from error
        # By metric, so that the page opens on accuracy or bits per character, all splits together.
        curve = "_".join([split, *labels.values()])
        for name, value in values.items():
            if name not in ("epoch", "seconds"):
                self._writer.add_scalar(f"{name}/{curve}", value, step)

    def write_parameters(self, step: int, model: nn.Module) -> None:
        """Histograms of every γ: whether it moves, and how its units spread, is worth seeing."""
        for name, module in model.named_modules():
            if isinstance(module, (BNLSTM, FeatureNorm)):
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    if parameter_name.startswith("gamma"):
                        tag = f"gamma/{name}.{parameter_name}"
                        self._writer.add_histogram(tag, parameter.detach().cpu(), step)
        self._writer.flush()

    def write_figures(self, step: int, figures: dict[str, Any]) -> None:
        for name, figure in figures.items():
            self._writer.add_figure(name, figure, step)
        self._writer.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._writer.close()


def drop_after(path: Path, step: int, validated: int) -> None:
    """Keep the training up to `step` and the validations up to `validated`; no test, and no line
    that a kill cut short."""
    if not path.exists():
        return
    last = {"train": step, "valid": validated, "test": -1}
    kept = [record for record in read(path) if record["step"] <= last[record["split"]]]
    content = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomic(path, content.encode())


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without a last line that was cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def format_values(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


__all__ = ["UNITS", "MetricsWriter", "drop_after", "format_values", "read"]
