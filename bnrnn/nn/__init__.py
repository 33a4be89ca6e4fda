from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.statistics import StepStatistics, batch_statistics, calibrate

__all__ = ["BNLSTM", "StepStatistics", "batch_statistics", "calibrate"]
