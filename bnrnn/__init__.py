"""Batch-normalised recurrent networks: a drop-in BN-LSTM and the experiments of its paper."""

from importlib.metadata import PackageNotFoundError, version

from bnrnn.nn import BNLSTM, batch_statistics, calibrate

try:
    __version__ = version("bnrnn")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["BNLSTM", "__version__", "batch_statistics", "calibrate"]
