"""The output of a run in progress: bars on a terminal, and a line for each validation."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(
    items: Iterable[Any] | None = None,
    name: str | None = None,
    *,
    shown: bool = True,
    **options: Any,
) -> tqdm:
    """Return a bar over `items`, or one to update by hand; it is hidden if stderr is no terminal.

    Args:
        shown: whether to show the bar; False in all processes of a run except the first.
        options: passed to tqdm.
    """
    return tqdm(items, desc=name, **_where(shown), **options)


class TrainingBar(tqdm):
    """A bar with the epoch, training metric, steps, steps per second and remaining time of a run.

    The rate is the mean since the start of the bar. It includes validations, so that the remaining
    time includes them too.
    """

    metric = ""  # name and value, empty before the first measurement

    def __init__(self, step: int, total: int, steps_per_epoch: int, *, shown: bool = True) -> None:
        self._steps_per_epoch = steps_per_epoch
        super().__init__(
            initial=step,
            total=total,
            unit=" steps",
            smoothing=0,
            bar_format="epoch {epoch}  {metric}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, "
            "{rate_noinv_fmt}, {remaining} left",
            **_where(shown),
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return the values of the fields in `bar_format`; tqdm reads this property."""
        found = dict(super().format_dict)
        epochs = -(-found["total"] // self._steps_per_epoch)
        epoch = min(found["n"] // self._steps_per_epoch + 1, epochs)
        return found | {"epoch": f"{epoch}/{epochs}", "metric": self.metric}

    def measured(self, name: str, value: float) -> None:
        self.metric = f"{name} {number(value)}  "


def validation_line(
    step: int,
    total: int,
    epoch: float,
    seconds: float,
    metric: str,
    values: dict[str, float],
    is_best: bool | None,
) -> str:
    """Return a line of the same width for all validations of a run, at most 100 columns.

    Args:
        values: the metric for each kind of statistics.
        is_best: None if no model is selected by its validation.
    """
    parts = [
        f"step {step:{max(6, len(str(total)))}}",
        f"epoch {epoch:6.2f}",
        f"{seconds / 60:6.1f} min",
        f"valid {metric:.10} " + "  ".join(f"{number(v)} {kind}" for kind, v in values.items()),
    ]
    if is_best is not None:
        parts.append("best" if is_best else "   -")
    return "  ".join(parts)


def number(value: float) -> str:
    """Format a number in eight columns: `  1.3871`, `12345.68`, ` 1.2e+06`."""
    for decimals in (4, 2):
        if len(text := f"{value:8.{decimals}f}") <= 8:
            return text
    return f"{value:8.1e}"


def _where(shown: bool) -> dict[str, Any]:
    # With disable=None, tqdm shows no bar if stderr is not a terminal.
    return {"disable": None if shown else True, "dynamic_ncols": True}
