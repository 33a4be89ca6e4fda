"""Batch-normalised recurrent networks: a drop-in BN-LSTM, and the experiments of two papers.

The papers are "Recurrent Batch Normalization" (Cooijmans et al., ICLR 2017) and "Batch Normalized
Recurrent Neural Networks" (Laurent et al., ICASSP 2016).
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnrnn.nn.lstm import BNLSTM
    from bnrnn.nn.stabilizer import NormStabilizer, norm_stabilizer
    from bnrnn.nn.statistics import batch_statistics, calibrate
    from bnrnn.nn.synchronise import synchronise

try:
    __version__ = version("bnrnn")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BNLSTM", "NormStabilizer", "__version__", "batch_statistics", "calibrate", "norm_stabilizer",
    "synchronise",
]  # fmt: skip

_MODULES = {
    "BNLSTM": "bnrnn.nn.lstm",
    "NormStabilizer": "bnrnn.nn.stabilizer",
    "norm_stabilizer": "bnrnn.nn.stabilizer",
    "batch_statistics": "bnrnn.nn.statistics",
    "calibrate": "bnrnn.nn.statistics",
    "synchronise": "bnrnn.nn.synchronise",
}


def __getattr__(name: str) -> Any:
    """Import torch only when needed, so the command can report in one line that it has no room."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'bnrnn' has no attribute {name!r}")
