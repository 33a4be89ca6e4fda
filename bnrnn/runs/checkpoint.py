"""Checkpoints: tensors and plain data, written atomically, never code.

A checkpoint is one `torch.save` of a dictionary:

    format      the version of this layout
    config      the run's settings, as nested dictionaries
    model       state_dict, including the statistics
    task        data that the model depends on: the pixel order, the symbols
    data        a fingerprint of the training data; None: there is only one version of the data
    step        the number of training steps done
    training    optimizer, loop state, carried state and random number generators; not in `best.pt`
    calibrated  the number of training batches that the population statistics average over; None:
                they are the running averages of training
"""

import io
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from bnrnn.errors import CheckpointError, NonFiniteError
from bnrnn.runs.files import write_atomic
from bnrnn.runs.record import Count

FORMAT = 1
_KINDS: dict[str, Any] = {
    "config": dict, "model": dict, "task": dict, "data": (str, type(None)), "step": int,
    "calibrated": (int, type(None)),
}  # fmt: skip
_T = TypeVar("_T")


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        OutputError: it cannot be written; an existing file is unchanged.
    """
    # Serialise in memory first: torch's own writer aborts the process if the disk fills up.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint, without executing anything in it.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or not plain data.
    """
    try:
        _check_size(path)
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch raises many types for a damaged file
        kind = "holds more than tensors and plain data, and was not loaded" if (
            "weights_only" in str(error).lower() or "Unsupported" in str(error)
        ) else "is damaged or cut short"  # fmt: skip
        if isinstance(error, OSError) and error.strerror:
            kind = f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path} {kind}: restore it or start the run again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found!s:.20}, this bnrnn reads format {FORMAT}: use "
            "the version that wrote it"
        )
    missing = _KINDS.keys() - content.keys()
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}: it is not a checkpoint")
    for part, kind in _KINDS.items():
        if not isinstance(content[part], kind):
            raise damaged(path, f"its {part} is a {type(content[part]).__name__}")
    typed(path, [content[part] or 0 for part in ("step", "calibrated")], list[Count])
    return content


def _check_size(path: Path) -> None:
    """Refuse files that `torch.save` does not write.

    These are other file types, and zip files with compressed entries, which could expand from a
    kilobyte to gigabytes.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: the file is refused.
    """
    if not path.is_file():
        if path.exists():
            raise ValueError("not a regular file")
        path.stat()  # raises the reason if the file cannot be found
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = path.stat().st_size
    if sum(entry.file_size for entry in entries) > size or any(
        entry.compress_type != zipfile.ZIP_STORED for entry in entries
    ):
        raise ValueError("it expands beyond its size")


def damaged(path: Path, what: object) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {' '.join(str(what).split())[:200]}; restore it or start the run again"
    )


def typed(path: Path, part: Any, kind: type[_T]) -> _T:
    """Convert plain data of a checkpoint to the type `kind`.

    Raises:
        CheckpointError: the data do not match the type.
    """
    try:
        return msgspec.convert(part, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise damaged(path, error) from error


def load_model(model: torch.nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load the weights and statistics of a checkpoint into a model.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
        NonFiniteError: a weight or statistic is not finite.
    """
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise CheckpointError(f"{path} is of another model: {first}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise damaged(path, f"its model is not a state_dict ({error})") from error
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise NonFiniteError(
                f"{path} is not finite in {name}: restore it, or start the run again with a lower "
                "optimizer.lr"
            )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, step: int, path: Path) -> None:
    """Load the saved state of an optimizer at `step`; its options remain those of the settings.

    Raises:
        CheckpointError: the state does not fit this optimizer and its parameters.
    """
    state = saved.get("state") if isinstance(saved, dict) else None
    options = optimizer.state_dict()["param_groups"]
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    if not isinstance(state, dict) or not state.keys() <= parameters.keys():
        raise damaged(path, "its optimizer is of another model")
    # A model may have parameters without a gradient, and they have no state; but not all of them.
    if step and not state and _after_a_step(optimizer, parameters[0]):
        raise damaged(path, "its optimizer has lost its state")
    for number, found in state.items():
        expected = _after_a_step(optimizer, parameters[number])
        if not isinstance(found, dict) or found.keys() != expected.keys():
            raise damaged(path, "its optimizer is of another kind")
        for name, value in found.items():
            if not _alike(value, expected[name], parameters[number].shape):
                raise damaged(path, f"{name} of its optimizer is not that of this model")
    optimizer.load_state_dict({"state": state, "param_groups": options})


def _after_a_step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the state that this kind of optimizer has of a vector after a step."""
    vector = parameter.new_zeros(1, requires_grad=True)
    vector.grad = torch.zeros_like(vector)
    fresh = type(optimizer)([vector], **optimizer.defaults)
    fresh.step()
    return fresh.state[vector]


def _alike(value: Any, expected: Tensor, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and (value.dtype, value.layout, value.shape) == (
        expected.dtype, expected.layout, shape if expected.ndim else expected.shape,
    )  # fmt: skip


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators for dropout and noise."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Any, device: torch.device, path: Path) -> dict[str, Any]:
    """Restore the generators and return their state.

    Raises:
        CheckpointError: it is not a state of random number generators.
    """
    try:
        torch.set_rng_state(state["cpu"].cpu())
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise damaged(path, f"its random state is not valid ({error})") from error
    return state
