"""The optimisers' formulas and gradient clipping, compared with NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from bnrnn.optim import build_optimizer, clip_gradients, set_adam_eps
from bnrnn.settings.schema import AdamConfig, RMSPropConfig, SGDConfig


def with_gradients(norm):
    """A model whose gradients have this norm in total; two of its parameters have none."""
    model = nn.Linear(3, 2).double()
    model.unused = nn.Linear(3, 2)
    model.weight.grad = torch.full((2, 3), 2.0, dtype=torch.float64)
    model.bias.grad = torch.tensor([3.0, -4.0], dtype=torch.float64)
    for parameter in (model.weight, model.bias):
        parameter.grad *= norm / 7  # 6 * 2^2 + 3^2 + 4^2 = 7^2
    return model


@pytest.mark.parametrize(
    ("clip", "norm", "expected"),
    [
        ("norm", 2.9, 2.9), ("norm", 3.1, 3.0), ("norm", 900.0, 3.0),
        ("square_root", 3.1, 3.1), ("square_root", 8.9, 8.9),
        ("square_root", 9.1, 3 * 9.1**0.5), ("square_root", 900.0, 90.0),
    ],
)  # fmt: skip
def test_clipping(clip, norm, expected):
    model = with_gradients(norm)
    found = clip_gradients(model, SGDConfig(max_grad_norm=3, clip=clip))
    assert found.item() == pytest.approx(norm, rel=1e-12)
    # The tolerance is needed because torch divides by the norm plus 1e-6.
    np.testing.assert_allclose(model.weight.grad.numpy(), 2 * expected / 7, rtol=1e-6)
    np.testing.assert_allclose(model.bias.grad.numpy(), [3 * expected / 7, -4 * expected / 7], 1e-6)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", ["norm", "square_root"])
def test_a_norm_that_is_not_finite_shows(clip, norm):
    found = clip_gradients(with_gradients(norm), SGDConfig(max_grad_norm=3, clip=clip))
    assert not found.isfinite()


def adam(gradients, lr, beta1, beta2, eps, eps_on):
    """A parameter after each step from 0 (Kingma and Ba 2015, algorithm 1 and section 2)."""
    p = m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        if eps_on == "corrected":
            p = p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        else:
            rate = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
            p = p - rate * m / (np.sqrt(v) + eps)
        yield p


# The gradients are about as large as ε, for which the two variants differ considerably.
GRADIENTS = np.random.default_rng(0).normal(0, 0.01, (12, 3))


def take_steps(model, optimizer, config, steps):
    for step in steps:
        model.weight.grad = torch.from_numpy(GRADIENTS[[step - 1]])
        set_adam_eps(optimizer, config, step)
        optimizer.step()
        yield model.weight[0].detach().numpy()


def rmsprop(gradients, lr, decay, eps, momentum):
    """A parameter after each step from 0: Tieleman and Hinton's RMSProp (2012), with momentum."""
    p = v = step = 0.0
    for g in gradients:
        v = decay * v + (1 - decay) * g**2
        step = momentum * step + g / (np.sqrt(v) + eps)
        p = p - lr * step
        yield p


def sgd(gradients, lr, momentum):
    """A parameter after each step from 0, with momentum as in Sutskever et al. (2013)."""
    p = step = 0.0
    for g in gradients:
        step = momentum * step + g
        p = p - lr * step
        yield p


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RMSPropConfig(lr=0.1, decay=0.8, eps=0.003, momentum=0.7),
         rmsprop(GRADIENTS, 0.1, 0.8, 0.003, 0.7)),
        (SGDConfig(lr=0.1, momentum=0.7), sgd(GRADIENTS, 0.1, 0.7)),
    ],
    ids=["rmsprop", "sgd"],
)  # fmt: skip
def test_momentum_by_its_formula(config, expected):
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(config, model)
    found = [p.copy() for p in take_steps(model, optimizer, config, range(1, 13))]
    np.testing.assert_allclose(found, list(expected), rtol=1e-9)


@pytest.mark.parametrize("eps_on", ["corrected", "uncorrected"])
def test_adam_by_its_formula_across_a_resumption(eps_on):
    config = AdamConfig(lr=0.1, beta1=0.8, beta2=0.99, eps=0.003, eps_on=eps_on)
    settings = (config.lr, config.beta1, config.beta2, config.eps)
    expected = np.array(list(adam(GRADIENTS, *settings, eps_on)))
    other = {"corrected": "uncorrected", "uncorrected": "corrected"}[eps_on]
    assert abs(expected - np.array(list(adam(GRADIENTS, *settings, other)))).max() > 0.1

    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(config, model)
    found = [p.copy() for p in take_steps(model, optimizer, config, range(1, 6))]
    saved = optimizer.state_dict()
    optimizer = build_optimizer(config, model)
    optimizer.load_state_dict(saved)
    found += [p.copy() for p in take_steps(model, optimizer, config, range(6, 13))]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
