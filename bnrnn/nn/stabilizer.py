"""The norm stabiliser: a loss term that keeps the norm of the hidden state constant over time.

Krueger and Memisevic, "Regularizing RNNs by Stabilizing Activations", ICLR 2016, equation 2.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bnrnn.nn import share
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.statistics import recomputes


def norm_stabilizer(output: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The mean of (|h_t| - |h_{t-1}|)² over sequences and steps, from the second step on.

    Args:
        output: (T, B, H), the hidden states of all steps.
        lengths: (B,), the lengths of padded sequences; padding does not count.

    Returns:
        a scalar; 0 if there is only one step.
    """
    norms = torch.linalg.vector_norm(output, dim=2)
    squares = (norms[1:] - norms[:-1]).square()
    if lengths is None:
        return share.mean(squares.sum(), max(1, squares.numel()))
    steps = torch.arange(1, len(output), device=output.device)
    counted = steps[:, None] < lengths.to(output.device)
    return share.mean(torch.where(counted, squares, 0.0).sum(), counted.sum().clamp(min=1))


class NormStabilizer:
    """Watches the `BNLSTM`s of a model and returns the stabiliser's term of the loss::

        stabilizer = NormStabilizer(model, 50.0)
        loss = criterion(model(batch), target) + stabilizer.take()

    It sees the output of each module: the last layer, with both directions together. In a segment
    that `torch.utils.checkpoint` recomputes, it needs `use_reentrant=False`: the reentrant
    implementation runs the forward pass without gradients.

    Args:
        strength: β in the paper; with 0, nothing is watched or added.
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.strength, self._terms = strength, []
        for module in model.modules() if strength > 0 else ():
            if isinstance(module, BNLSTM):
                module.register_forward_hook(self._see, with_kwargs=True)

    def take(self) -> Tensor | float:
        """The loss term of all training passes since the last call."""
        terms, self._terms = self._terms, []
        return self.strength * sum(terms) if terms else 0.0

    def _see(self, module: BNLSTM, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        if not module.training:
            return
        output, lengths = result[0], kwargs.get("lengths", args[2] if len(args) > 2 else None)
        if isinstance(output, PackedSequence):
            output, lengths = nn.utils.rnn.pad_packed_sequence(output)
        elif output.dim() == 2:
            output = output[:, None]
        elif module.batch_first:
            output = output.transpose(0, 1)
        term = norm_stabilizer(output, lengths)  # a recomputation must save the same tensors
        if not recomputes():
            self._terms.append(term)


__all__ = ["NormStabilizer", "norm_stabilizer"]
