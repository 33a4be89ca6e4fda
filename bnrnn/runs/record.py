"""The format of a run directory as types, and its only reader and writer.

    run.json       `Subject`: a description of the run by its task, written at step 0
    config.yaml    the settings, as nested plain dictionaries
    metrics.jsonl  one `Record` per line
    result.json    `Result`: the final numbers and their provenance
    failed.json    `Failure`: the error that stopped the run

For results of analyses see `bnrnn.runs.analysis`.

A reader of these files needs no knowledge of tasks and models: a run contains the names of its
data, model and metric. Types, sizes and nesting depth are checked on reading, and nothing is
executed.
"""

import copy
import functools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

from bnrnn.errors import CheckpointError, NonFiniteError
from bnrnn.runs.files import read_bounded, write_atomic
from bnrnn.settings.schema import MOST

FORMAT = 1
MOST_BYTES = 16 << 20  # of a file that is read whole
_SHORT = 16 << 10  # characters of settings that are cached; a run's settings have 3,000
MOST_METRICS_BYTES = 256 << 20  # a million records

_T = TypeVar("_T")
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Scalar = str | bool | int | float | None
Settings = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """The metric that selects a model: its key in the records, and its title and unit."""

    name: str
    title: str
    lower_is_better: bool
    unit: str = ""  # "%"; empty if the title is the unit, as for bits per character
    factor: float = 1.0  # converts the recorded value to the unit
    decimals: Annotated[int, msgspec.Meta(ge=0, le=12)] = 3

    @property
    def label(self) -> str:
        """Return the label for an axis or the head of a column."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def show(self, value: float, decimals: int | None = None) -> str:
        """Format a value in the unit as `98.90 % accuracy`."""
        return " ".join(filter(None, [self.number(value, decimals), self.unit, self.title]))

    def number(self, value: float, decimals: int | None = None) -> str:
        """Format a value in the unit as `98.90`."""
        decimals = self.decimals if decimals is None else decimals
        return f"{value:.{decimals}f}" if abs(value) < 1e9 else f"{value:.3g}"

    def best(self, values: Iterable[float]) -> float:
        return min(values) if self.lower_is_better else max(values)


ACCURACY = Metric("accuracy", "accuracy", False, "%", 100.0, 2)
ERROR = Metric("error", "error", True, "%", 100.0, 2)
PERPLEXITY = Metric("perplexity", "perplexity", True, decimals=2)
BITS_PER_CHARACTER = Metric("bpc", "bits per character", True)


@dataclass(frozen=True)
class Subject:
    """A description of a run; its task and model provide it when the run begins."""

    task: str
    data: str  # short name; equal for runs on the same data, and only for those
    data_title: str
    description: str  # describes the data in one line
    whole_data: bool  # False: only part of the published data; results do not compare
    model: str
    model_title: str
    metric: Metric
    steps_per_epoch: Count
    total_steps: Count
    free_settings: list[str]  # settings that may change when the run is resumed
    format: int = FORMAT


@dataclass(frozen=True)
class Record:
    """One line of metrics."""

    step: Count
    split: str  # "train", "valid" or "test"
    values: dict[str, float]
    statistics: str | None = None  # "population" or "batch", for a validation or test

    def to_json(self) -> str:
        labels = {} if self.statistics is None else {"statistics": self.statistics}
        values = {k: v if math.isfinite(v) else None for k, v in self.values.items()}  # not NaN
        return json.dumps({"step": self.step, "split": self.split, **labels, **values})


@dataclass(frozen=True)
class Result:
    """The scores of the best model on validation, with population statistics; its provenance."""

    valid: dict[str, float]
    test: dict[str, float]
    best_step: Count
    calibrated: Count | None  # training batches that the population statistics average over
    task: str
    model: str
    seed: int
    data: str  # description
    whole_data: bool
    steps: Count
    max_steps: Count  # as the settings allowed
    epochs: float
    wall_seconds: float
    train_seconds: float
    kernel: str
    bnrnn: str
    commit: str | None
    python: str
    torch: str
    numpy: str
    machine: str
    threads: Count
    command: str
    commits: list[str] = field(default_factory=list)  # of all processes of the run, in order
    machines: list[str] = field(default_factory=list)
    processes: Count = 1

    @property
    def milliseconds_per_step(self) -> float:
        return 1000 * self.train_seconds / self.steps if self.steps else math.nan


@dataclass(frozen=True)
class Failure:
    error: str
    exit_code: int = 1


@dataclass(frozen=True)
class Run:
    """The content of a run directory. `result` is None before the first test."""

    path: Path
    settings: Settings
    subject: Subject
    records: list[Record]
    result: Result | None = None
    failure: Failure | None = None
    held: bool = False  # a process is training in it
    resumable: bool = False  # it has a checkpoint

    @property
    def data(self) -> str:
        return self.subject.data

    @property
    def model(self) -> str:
        return self.subject.model

    @property
    def metric(self) -> Metric:
        return self.subject.metric

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def scale(self) -> str | None:
        return self.settings.get("scale")

    @property
    def state(self) -> str:
        """running, finished, failed, stopped (can be resumed) or unfinished (cannot)."""
        if self.held:
            return "running"
        if self.is_finished:
            return "finished"
        if self.failure is not None:
            return "failed"
        return "stopped" if self.resumable else "unfinished"

    @property
    def is_finished(self) -> bool:
        return self.suffices(self.subject.total_steps, self.settings.get("patience"))

    def suffices(self, steps: int, patience: int | None) -> bool:
        """Return whether a run of `steps` steps with this patience would end with the result."""
        result = self.result
        if result is None or result.max_steps < steps:
            return False
        validated = {r.step for r in self.records if r.split == "valid"}
        stale = sum(step > result.best_step for step in validated)
        return result.steps >= steps or (patience is not None and stale >= patience)

    @property
    def step(self) -> int:
        """The last recorded step."""
        return max((record.step for record in self.records), default=0)

    def values(self, name: str, split: str, statistics: str | None) -> dict[int, float]:
        """Return step -> recorded value."""
        return {
            record.step: record.values[name]
            for record in self.records
            if record.split == split and record.statistics == statistics and name in record.values
        }

    def curve(self, statistics: str = "population") -> tuple[list[int], list[float]]:
        """Return the steps and the validation metric in its unit; [] if there is none."""
        found = self.values(self.metric.name, "valid", statistics)
        return list(found), [value * self.metric.factor for value in found.values()]

    def paper_like_curve(self) -> tuple[list[int], list[float]]:
        """Return the curve with batch statistics if the model normalises, as the paper's curves."""
        by_batch = self.curve("batch")
        return by_batch if by_batch[0] else self.curve()

    def best_step(self) -> int | None:
        """The step of the selected validation with population statistics.

        The run selects the best validation or the last one; None before the first.
        """
        if self.result is not None:
            return self.result.best_step
        steps, values = self.curve()
        if self.settings.get("selection") == "last":
            return max(steps, default=None)
        finite = {v: s for s, v in zip(steps, values, strict=True) if math.isfinite(v)}
        return finite[self.metric.best(finite)] if finite else None

    def final(self, split: str) -> float:
        """Return the best model's score on "test" or "valid", with population statistics."""
        assert self.result is not None
        values = self.result.test if split == "test" else self.result.valid
        return values[self.metric.name] * self.metric.factor


# ---------------------------------------------------------------- writing


def write_json(path: Path, content: Any) -> None:
    """Write a dataclass or plain data as indented JSON.

    Raises:
        NonFiniteError: a number is not finite; JSON has no such numbers.
        OutputError: see `write_atomic`.
    """
    plain = content if isinstance(content, dict) else asdict(content)
    dump_json(path, plain, indent=2, ensure_ascii=False)


def dump_json(path: Path, plain: Any, **options: Any) -> None:
    try:
        text = json.dumps(plain, allow_nan=False, **options) + "\n"
    except ValueError as error:
        raise NonFiniteError(
            f"{path} was not written, because a number in it is not finite: start the run again "
            "with a lower optimizer.lr"
        ) from error
    # Bytes of a path that are not UTF-8 are surrogates here; JSON escapes them as \udcff.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_settings(path: Path, settings: Settings) -> None:
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_atomic(path, text.encode())


def write_records(path: Path, records: Iterable[Record]) -> None:
    write_atomic(path, "".join(record.to_json() + "\n" for record in records).encode())


# ---------------------------------------------------------------- reading


def decode_json(path: Path, kind: type[_T], most: int = MOST_BYTES) -> _T | None:
    """Read a JSON file as the type `kind`; None if there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or its content does not match the type.
    """
    try:
        return msgspec.json.decode(read_bounded(path, most), type=kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise CheckpointError(f"{path} is damaged: {_line(error)}") from error


def read_subject(path: Path) -> Subject | None:
    subject = decode_json(path, Subject)
    if subject is not None and subject.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {subject.format}, this bnrnn reads format {FORMAT}: use the "
            "version that wrote it"
        )
    return subject


class _PlainLoader(yaml.SafeLoader):
    """YAML without anchors: a kilobyte of nested aliases can expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]


@functools.lru_cache(200)
def _parsed(text: str) -> Any:
    """Parse and cache: PyYAML is slow, and a command reads a run's settings several times."""
    return yaml.load(text, _PlainLoader)


def read_settings(path: Path) -> Settings | None:
    """Read the settings of a run; None if there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or its content is not valid settings.
    """
    try:
        text = read_bounded(path, MOST_BYTES).decode()
        found = copy.deepcopy(_parsed(text)) if len(text) < _SHORT else _parsed.__wrapped__(text)
        settings = msgspec.convert(found, Settings)
        msgspec.convert(found, _Needed)
        _check_plain(settings)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    except (yaml.YAMLError, msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {_line(error)}") from error
    return settings


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class _Needed:
    """The settings that every reader relies on."""

    seed: int
    task: _Named
    model: _Named
    scale: str | None = None
    patience: Count | None = None


def _check_plain(settings: Settings, depth: int = 0) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            if depth > 2:
                raise ValueError(f"{key} is nested too deeply")
            _check_plain(msgspec.convert(value, Settings), depth + 1)
        else:
            msgspec.convert(value, Scalar | list[Scalar])


def read_records(path: Path) -> list[Record]:
    """Read all complete lines; skip a last line that was truncated by a kill.

    Raises:
        CheckpointError: a line is not a record.
    """
    return list(_records(path))


def _records(path: Path) -> Iterator[Record]:
    try:
        content = read_bounded(path, MOST_METRICS_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from error
    decoder = msgspec.json.Decoder(dict[str, int | float | str | None])
    *lines, _ = content.split(b"\n")  # after the last newline: nothing, or a truncated line
    for number, line in enumerate(lines, start=1):
        try:
            fields = decoder.decode(line)
            labels = {k: fields.pop(k) for k in ("step", "split", "statistics") if k in fields}
            values = {k: math.nan if v is None else v for k, v in fields.items()}
            yield msgspec.convert({**labels, "values": values}, Record)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise CheckpointError(
                f"{path} is damaged: line {number} is not a record ({_line(error)})"
            ) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
