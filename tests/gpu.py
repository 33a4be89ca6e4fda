"""Run problems of the CPU tests on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.accuracy import mapped

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def on_gpu(recurrence: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it computes on a GPU from and to CPU tensors, with gradients."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _moved((args, kwargs), "cuda")
        return _moved(recurrence(*args, **kwargs), "cpu")

    return run


def _moved(values: Any, device: str) -> Any:
    return mapped(values, lambda x: x.to(device), leaves=False)
