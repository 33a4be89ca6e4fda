"""What a run shows while it goes on: bars on a terminal, and a line for each validation."""

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
    """A progress bar over `items`, or one to update by hand; none where stderr is no terminal.

    Args:
        shown: False in all but the first of the processes that train one model.
        options: tqdm's.
    """
    return tqdm(items, desc=name, **_where(shown), **options)


class TrainingBar(tqdm):
    """Epoch, training metric, steps, steps a second and time left of a run.

    The rate is the mean since the start of the bar, validations included: the time left holds.
    """

    metric = ""  # name and value, once they have been measured

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
        """tqdm's hook for what `bar_format` names."""
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
    """A line as wide as those of the run's other validations, of 100 columns at most.

    Args:
        values: of the metric, by kind of statistics.
        is_best: None where no model is chosen by its validation.
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
    """Eight columns: `  1.3871`, `12345.68`, ` 1.2e+06`."""
    for decimals in (4, 2):
        if len(text := f"{value:8.{decimals}f}") <= 8:
            return text
    return f"{value:8.1e}"


def _where(shown: bool) -> dict[str, Any]:
    # tqdm's disable=None: no bar where stderr is no terminal.
    return {"disable": None if shown else True, "dynamic_ncols": True}
