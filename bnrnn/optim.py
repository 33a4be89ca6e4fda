"""The optimisers, and what the authors' code does to gradients and to Adam's epsilon."""

import math

import torch
from torch import nn

from bnrnn.settings.schema import AdamConfig, OptimizerConfig, RMSPropConfig, SGDConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if isinstance(config, AdamConfig):
        betas = (config.beta1, config.beta2)
        return torch.optim.Adam(parameters, config.lr, betas, config.eps, fused=True)
    if isinstance(config, RMSPropConfig):
        return torch.optim.RMSprop(
            parameters, config.lr, config.decay, config.eps, momentum=config.momentum
        )
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(parameters, config.lr, config.momentum, fused=True)
    raise TypeError(f"no optimizer for {type(config).__name__}")


def clip_gradients(model: nn.Module, config: OptimizerConfig) -> torch.Tensor:
    """Scale all gradients down where their norm n over all parameters is large; returns n.

    With m = `max_grad_norm`, by `clip`:
        norm: to the norm m where n > m.
        square_root: to the norm m sqrt(n) where n > m^2, as in the authors' code for the CNN
            questions, which takes the root of what is a root already.
    """
    if config.clip == "norm":
        return nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # It never scales up, and m sqrt(n) < n is n > m^2.
    if norm.is_cpu:
        limit = config.max_grad_norm * math.sqrt(norm.item())
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    else:  # the same without a wait for the device
        limit = config.max_grad_norm * norm.sqrt()
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore
    return norm


def learning_rate(config: OptimizerConfig, epoch: int) -> float:
    """The rate of epoch `epoch` (from 1): lr d^max(epoch - n, 0), d `lr_decay`, n `lr_decay_after`.

    As in TensorFlow's `ptb_word_lm.py`. A function of the epoch alone, so that a resumed run has
    the rates of one that never stopped.
    """
    if config.lr_decay is None or config.lr_decay_after is None:
        return config.lr
    return config.lr * config.lr_decay ** max(epoch - config.lr_decay_after, 0)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, epoch: int
) -> None:
    """Before a step of epoch `epoch` (from 1)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)


def set_adam_eps(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int) -> None:
    """Before step `step` (from 1): which root of Adam's second moment v the ε is added to.

    By `eps_on`, with β_1, β_2 and the first moment m of Kingma and Ba, "Adam", ICLR 2015:
        corrected: lr m̂ / (sqrt(v̂) + ε), their algorithm 1, as in torch.
        uncorrected: lr sqrt(1 - β_2^t) / (1 - β_1^t) m / (sqrt(v) + ε), the variant at the end of
            their section 2, as in the authors' code for the CNN questions.
    """
    if isinstance(config, AdamConfig) and config.eps_on == "uncorrected":
        # The same as `corrected` with another ε at each step, for v̂ is v / (1 - β_2^t).
        for group in optimizer.param_groups:
            group["eps"] = config.eps / math.sqrt(1 - config.beta2**step)
