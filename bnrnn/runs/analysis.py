"""Analysis results as types: the `result.json` of a folder `<analysis>/<stamp>`.

The field "analysis" gives the kind; analyses of a trained model name it in `of`.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from bnrnn.errors import CheckpointError
from bnrnn.runs.record import Count, decode_json, dump_json


@dataclass(frozen=True)
class Analysed:
    """The trained model that was analysed."""

    task: str
    data: str
    data_title: str
    model: str
    model_title: str
    gamma_init: float
    hidden_size: int
    seed: int
    step: Count
    calibrated: int | None
    scale: str | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The provenance of a result; empty until the command has finished."""

    of: Analysed | None = None
    wall_seconds: float = 0.0
    bnrnn: str = ""
    commit: str | None = None
    python: str = ""
    torch: str = ""
    numpy: str = ""
    machine: str = ""
    threads: int = 0
    command: str = ""


@dataclass(frozen=True)
class Band:
    """log10 of the gradient norm over t, for one W_h and one γ; None: 0 or not finite."""

    matrix: str
    gamma: float
    median: list[float | None]
    lowest: list[float | None]
    highest: list[float | None]


@dataclass(frozen=True)
class GradientFlow(Origin):
    """Figure 1a."""

    analysis: ClassVar[str] = "gradient_flow"
    gammas: list[float]
    matrices: list[str]
    repeats: int
    batch_size: int
    hidden_size: int
    noise: float
    seed: int
    t: list[Count]
    curves: list[Band]


@dataclass(frozen=True)
class TanhDerivative(Origin):
    """Figure 1b: one value for each standard deviation."""

    analysis: ClassVar[str] = "tanh_derivative"
    deviations: list[float]
    mean: list[float]
    lower_quartile: list[float]
    upper_quartile: list[float]


@dataclass(frozen=True)
class Lengths(Origin):
    """Figure 3b: statistics -> test bits per character, one value for each length."""

    analysis: ClassVar[str] = "lengths"
    lengths: list[Count]
    batch_size: int
    characters: int
    bpc: dict[str, list[float]]


@dataclass(frozen=True)
class Units:
    """Population statistics of some units of one term, (units, t)."""

    units: list[int]
    mean: list[list[float]]
    variance: list[list[float]]


@dataclass(frozen=True)
class Population(Origin):
    """Figure 5."""

    analysis: ClassVar[str] = "population"
    seed: int
    units: int
    steps: int
    t: list[Count]
    recurrent: Units
    cell: Units


Analysis = GradientFlow | TanhDerivative | Lengths | Population
KINDS: dict[str, type[Analysis]] = {
    kind.analysis: kind for kind in (GradientFlow, TanhDerivative, Lengths, Population)
}


def write_analysis(path: Path, found: Analysis) -> None:
    """
    Raises:
        NonFiniteError: a number is not finite.
        OutputError: see `write_atomic`.
    """
    content = {"analysis": found.analysis} | msgspec.to_builtins(found)
    # Without indentation: indented JSON would put each number of a curve on its own line.
    dump_json(path, content)


def read_analysis(path: Path) -> Analysis | None:
    """Read an analysis; None if the file does not exist or is the result of a run.

    Raises:
        CheckpointError: the file is damaged, or of a kind this version does not know.
    """
    content = decode_json(path, dict[str, Any])
    if content is None or "analysis" not in content:
        return None
    kind = KINDS.get(str(content["analysis"]))
    if kind is None:
        raise CheckpointError(
            f"{path}: an analysis that this version does not know, {content['analysis']!r:.40}"
        )
    try:
        found = msgspec.convert(content, kind)
        _check_shape(found)
    except (msgspec.ValidationError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return found


def _check_shape(found: Analysis) -> None:
    """Check that each curve is as long as its x axis.

    Raises:
        ValueError: a curve has another length.
    """
    match found:
        case GradientFlow(t=t, curves=curves):
            pairs = [(t, c) for band in curves for c in (band.median, band.lowest, band.highest)]
        case TanhDerivative(deviations=x):
            pairs = [(x, getattr(found, f.name)) for f in fields(TanhDerivative)
                     if f.name in ("mean", "lower_quartile", "upper_quartile")]  # fmt: skip
        case Lengths(lengths=x, bpc=bpc):
            pairs = [(x, values) for values in bpc.values()]
        case Population(t=t, recurrent=recurrent, cell=cell):
            terms = (recurrent, cell)
            pairs = [(t, c) for u in terms for rows in (u.mean, u.variance) for c in rows]
    if not pairs or any(len(x) != len(y) or not x for x, y in pairs):
        raise ValueError("its curves have different lengths")
