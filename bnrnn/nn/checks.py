"""The checks of a `BNLSTM`'s arguments; where `torch.nn.LSTM` has the same check, its message."""

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from bnrnn.kernels.interface import in_functorch_transform

State = tuple[Tensor, Tensor]


def can_read(tensor: Tensor) -> bool:
    """Whether the program can read the values of a tensor now.

    It cannot while it is compiled or transformed by `torch.func`, and meta and fake tensors have
    no values.
    """
    if torch.compiler.is_compiling() or in_functorch_transform():
        return False
    return not tensor.is_meta and not hasattr(tensor, "fake_mode")


def check_arguments(
    input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool,
    dropout: float,
) -> None:  # fmt: skip
    """
    Raises:
        TypeError, ValueError: an argument of the constructor is invalid.
    """
    is_number = isinstance(dropout, numbers.Number) and not isinstance(dropout, bool)
    if not is_number or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element "
            "being zeroed"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
            f"expects num_layers greater than 1, but got dropout={dropout} and num_layers=1",
            stacklevel=3,
        )
    for name, value, kind in (
        ("bias", bias, bool), ("batch_first", batch_first, bool), ("input_size", input_size, int),
        ("hidden_size", hidden_size, int), ("num_layers", num_layers, int),
    ):  # fmt: skip
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError(
                f"{name} should be of type {kind.__name__}, got: {type(value).__name__}"
            )
        if kind is int and value <= 0:
            raise ValueError(f"{name} must be greater than zero")


def is_batched(input: Tensor, hx: State | None) -> bool:
    """Whether the input is a batch of sequences, not a single one.

    Raises:
        ValueError: it is neither, or its elements are neither floating-point numbers nor integers.
        RuntimeError: hx is for the other.
    """
    if input.is_floating_point():
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
    else:
        if input.dtype == torch.bool or input.is_complex():
            raise ValueError(f"RNN input must be floating-point or integers, got {input.dtype}")
        if input.dim() != 2:
            raise ValueError(
                f"integers must be (T, B), the indices of one-hot vectors, got {input.dim()}D: "
                "convert other inputs to floating point"
            )
        batched = True
    if hx is not None and any(state.dim() != 2 + batched for state in hx):
        kind, wanted = ("batched 3-D", "3-D") if batched else ("unbatched 2-D", "2-D")
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {wanted} but got "
            f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )
    return batched


def as_lengths(lengths: Tensor | Sequence[int] | None) -> Tensor | None:
    """
    Raises:
        ValueError: they are not integers.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    return lengths


def check_states(module: Any, hx: State | None, batch: int) -> None:
    """
    Raises:
        RuntimeError: the shape of a state is wrong.
    """
    expected = (module.num_layers * module.num_directions, batch, module.hidden_size)
    for i, state in enumerate(hx or ()):
        if tuple(state.shape) != expected:
            raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {list(state.shape)}")


def check_call(
    module: Any, weight: Tensor, x: Tensor, hx: State | None, lengths: Tensor | None,
    first_step: int, in_autocast: bool,
) -> None:  # fmt: skip
    """Check the arguments of a call; x is (T, B, D), or (T, B).

    Raises:
        RuntimeError, ValueError, TypeError, IndexError: see `BNLSTM.forward`.
    """
    others = [("parameter", weight), *(("hidden", state) for state in hx or ())]
    for name, tensor in others:
        if tensor.device != x.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at "
                f"{x.device} and {name} tensor at {tensor.device}"
            )
    dtypes = [x.dtype] if x.is_floating_point() else []
    for dtype in dtypes + [state.dtype for state in hx or ()]:
        if dtype != weight.dtype and not in_autocast:
            raise ValueError(
                f"RNN input dtype ({dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({dtype})"
            )
    if x.is_floating_point() and x.shape[2] != module.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {module.input_size}, got "
            f"{x.shape[2]}"
        )
    steps, batch = x.shape[:2]
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if not x.is_floating_point() and x.is_cpu and x.numel() > 0:
        _check_indices(x, module.input_size)
    if lengths is not None:
        _check_lengths(lengths, steps, batch)
    if isinstance(first_step, bool) or not isinstance(first_step, (int, torch.SymInt)):
        raise TypeError(f"first_step must be an integer, got {first_step!r}")
    if first_step < 0 or (first_step > 0 and module.bidirectional):
        raise ValueError("first_step must be 0, or positive in a unidirectional module")


def check_batch(module: Any, batch: int) -> None:
    """
    Raises:
        ValueError: the batch has too few sequences for its statistics.
    """
    if batch == 1 and module.needs_batch and not module.options.synchronised:
        raise ValueError(
            "a batch of one sequence has no per-step batch statistics: use at least two, "
            "or evaluation mode with population statistics"
        )


def _check_indices(x: Tensor, size: int) -> None:
    if torch.compiler.is_compiling():
        return
    least, most = x.min(), x.max()
    if can_read(least) and not (int(least) >= 0 and int(most) < size):
        raise IndexError(f"one-hot indices must be in 0..{size - 1}, got {least}..{most}")


def _check_lengths(lengths: Tensor, steps: int, batch: int) -> None:
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths must be ({batch},), got {tuple(lengths.shape)}")
    # Only on the CPU: elsewhere, reading the lengths would wait for the device.
    if not lengths.is_cpu or torch.compiler.is_compiling() or batch == 0:
        return
    shortest, longest = lengths.min(), lengths.max()
    if can_read(shortest):
        shortest, longest = int(shortest), int(longest)
        if shortest < 1 or longest > steps:
            raise ValueError(f"lengths must be in 1..{steps}, got {shortest}..{longest}")


def check_batches(batches: Any) -> None:
    """
    Raises:
        TypeError: it is one batch.
    """
    if isinstance(batches, Tensor | PackedSequence):
        raise TypeError("batches must be an iterable of batches, such as a list, not one tensor")
