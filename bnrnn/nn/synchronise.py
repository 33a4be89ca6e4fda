"""Batch statistics over processes."""

from dataclasses import replace
from typing import TypeVar

from torch import nn

from bnrnn.nn.feature_norm import FeatureNorm
from bnrnn.nn.lstm import BNLSTM

_M = TypeVar("_M", bound=nn.Module)


def synchronise(model: _M) -> _M:
    """Let a model take its batch statistics over all processes of `torch.distributed`'s default
    group, as `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does for other batch normalisation.

    With DistributedDataParallel and an even part of a batch each, n processes then train as one
    does with the whole batch. Each time step sends two messages a normalised term, one of them in
    the backward pass, so it is for large batches and fast networks; the recurrence runs on the
    reference kernel.

    Returns:
        the same model.
    """
    for module in model.modules():
        if isinstance(module, BNLSTM):
            module.options = replace(module.options, synchronised=True)
        elif isinstance(module, FeatureNorm):
            module.synchronised = True
    return model


__all__ = ["synchronise"]
