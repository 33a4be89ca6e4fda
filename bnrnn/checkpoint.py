"""Checkpoints: tensors and plain data, whole or not there, never code.

A checkpoint is one `torch.save` of a dictionary:

    format      the version of this layout
    config      the run's settings, nested dictionaries
    model       state_dict, statistics included
    task        what makes the model mean the same: the pixel order, the symbols
    data        a fingerprint of what it was trained on; None: the data have one form only
    training    optimizer, loop state and random number generators; not in `best.pt`
    calibrated  how many training batches the population statistics were averaged over; None: they
                are the running averages of training
"""

import io
from pathlib import Path
from typing import Any

import torch

from bnrnn.errors import CheckpointError
from bnrnn.files import write_atomic

FORMAT = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """
    Raises:
        OutputError: it cannot be written; what was there before is untouched.
    """
    # Serialised in memory first: torch's own writer aborts the process when a disk fills under it.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: missing, cut short, of another format, or not plain data. Nothing in the
            file is ever executed.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint") from None
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        kind = "holds more than tensors and plain data, and was not loaded" if (
            "weights_only" in str(error).lower() or "Unsupported" in str(error)
        ) else "is damaged or cut short"  # fmt: skip
        raise CheckpointError(f"{path} {kind}: restore it or start the run anew") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found}, this bnrnn reads format {FORMAT}: use the "
            "version that wrote it"
        )
    missing = {"config", "model", "task"} - content.keys()
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}: it is no checkpoint")
    return content


def load_model(model: torch.nn.Module, content: dict[str, Any], path: Path) -> None:
    """
    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise CheckpointError(f"{path} is of another model: {first}") from error


def random_state() -> dict[str, Any]:
    """The generators that dropout and noise draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
