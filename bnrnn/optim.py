"""The optimisers, with the gradient clipping and the Adam epsilon of the authors' code."""

import math

import torch
from torch import nn

from bnrnn.settings.schema import AdamConfig, OptimizerConfig, RMSPropConfig, SGDConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if isinstance(config, AdamConfig):
        betas = (config.beta1, config.beta2)
        return torch.optim.Adam(parameters, config.lr, betas=betas, eps=config.eps, fused=True)
    if isinstance(config, RMSPropConfig):
        return torch.optim.RMSprop(
            parameters, config.lr, alpha=config.decay, eps=config.eps, momentum=config.momentum
        )
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, fused=True)
    raise TypeError(f"no optimizer for {type(config).__name__}")


def clip_gradients(model: nn.Module, config: OptimizerConfig) -> torch.Tensor:
    """Scale all gradients down if their norm n over all parameters is large; return n.

    `clip` selects the rule, with m = `max_grad_norm`:
        norm: if n > m, scale to norm m.
        square_root: if n > m^2, scale to norm m sqrt(n). The authors' code for the CNN questions
            does this; it takes the square root of the norm a second time.
    """
    if config.clip == "norm":
        return nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # clip_grads_with_norm_ never scales up, and m sqrt(n) < n is equivalent to n > m^2.
    if norm.is_cpu:
        limit = config.max_grad_norm * math.sqrt(norm.item())
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    else:  # the same without waiting for the device
        limit = config.max_grad_norm * norm.sqrt()
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore
    return norm


def learning_rate(config: OptimizerConfig, epoch: int) -> float:
    """lr d^max(epoch - n, 0), with d `lr_decay` and n `lr_decay_after`; epochs count from 1.

    This is the schedule of TensorFlow's `ptb_word_lm.py`. It depends only on the epoch, so a
    resumed run has the same learning rates as an uninterrupted run.
    """
    if config.lr_decay is None or config.lr_decay_after is None:
        return config.lr
    return config.lr * config.lr_decay ** max(epoch - config.lr_decay_after, 0)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, epoch: int
) -> None:
    """Set the learning rate for the steps of epoch `epoch` (from 1)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)


def set_adam_eps(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int) -> None:
    """Set Adam's ε for step `step` (from 1), according to `eps_on`.

    In the notation of Kingma and Ba, "Adam", ICLR 2015, the update is
        corrected: lr m̂ / (sqrt(v̂) + ε), their algorithm 1, as in torch.
        uncorrected: lr sqrt(1 - β_2^t) / (1 - β_1^t) m / (sqrt(v) + ε), the variant at the end of
            their section 2, as in the authors' code for the CNN questions.
    """
    if isinstance(config, AdamConfig) and config.eps_on == "uncorrected":
        # v̂ is v / (1 - β_2^t), so this equals `corrected` with a different ε at each step.
        for group in optimizer.param_groups:
            group["eps"] = config.eps / math.sqrt(1 - config.beta2**step)
