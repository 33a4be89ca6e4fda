"""Batch statistics over processes."""

from dataclasses import replace
from typing import TypeVar

from torch import nn

from bnrnn.nn.feature_norm import FeatureNorm
from bnrnn.nn.lstm import BNLSTM

_M = TypeVar("_M", bound=nn.Module)


def synchronise(model: _M) -> _M:
    """Make a model take batch statistics over all processes of `torch.distributed`'s default group.

    This corresponds to `torch.nn.SyncBatchNorm.convert_sync_batchnorm` for other batch
    normalisation. Under DistributedDataParallel, n processes with equal parts of a batch then train
    like one process with the whole batch. Each time step sends two messages per normalised term,
    one of them in the backward pass, so this is for large batches and fast networks. The recurrence
    runs on the reference kernel.

    Returns:
        the same model, modified in place.
    """
    for module in model.modules():
        if isinstance(module, BNLSTM):
            module.options = replace(module.options, synchronised=True)
        elif isinstance(module, FeatureNorm):
            module.synchronised = True
    return model


__all__ = ["synchronise"]
