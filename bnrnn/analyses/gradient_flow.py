"""Figure 1a: gradient norm against time step in a batch-normalised tanh RNN, for several γ.

The paper's argument for a small γ: with γ = 1, the unit variance of BN drives tanh into saturation
and the gradient vanishes. This holds for W_h = I, as in the authors' code. For orthogonal W_h the
effect is reversed: a small γ preserves the gradient norm, and a large γ makes it explode.

The paper does not state which network its plot shows. Its curves have the same order and ends as
ours for W_h = I. For γ from 0.6 to 0.8, however, they are several decades below our medians, and
over much of their length below every draw we made. Another batch or other noise does not explain
0.7 and 0.8.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnrnn.runs.analysis import Band, GradientFlow
from bnrnn.tasks.base import Progress

CLASSES = 10
EVERY = 4  # keep every 4th time step


def gradient_flow(
    images: np.ndarray,
    labels: np.ndarray,
    gammas: Sequence[float],
    matrices: Sequence[str],
    repeats: int,
    hidden_size: int = 100,
    noise: float = 0.1,
    seed: int = 0,
    progress: Progress = iter,
) -> GradientFlow:
    """Compute the gradient norm of the mean loss with respect to h_t, before training.

    Args:
        images: (B, T) uint8, one pixel per step; the paper: 100 images in pixel order.
        labels: (B,) integers, 0 to 9.
        matrices: W_h, each "identity" (the authors' code) or "orthogonal".
        repeats: how often weights and noise are drawn; repeat r uses seed `seed` + r.
        noise: standard deviation of h_0. It must be positive, because the first pixels are equal in
            all images.

    Returns:
        t: every 4th step and the last. curves: for each matrix and γ, log10 of the norm (over
        units, then averaged over the batch) at these t: median, minimum and maximum over the
        repeats. None: the norm is 0 or not finite.
    """
    # float64: the gradient changes by more than a hundred decades.
    pixels = torch.from_numpy(images.T / 255)
    target = torch.from_numpy(labels.astype(np.int64))
    last = len(pixels) - 1
    shown = [*range(0, last, EVERY), last]
    found: dict[tuple[str, float], list[np.ndarray]] = {
        (matrix, gamma): [] for matrix in matrices for gamma in gammas
    }
    for matrix, gamma, repeat in progress(
        [(*key, repeat) for key in found for repeat in range(repeats)]
    ):
        weights = _draw(matrix, len(images), hidden_size, noise, seed + repeat)
        gradients = hidden_gradients(pixels, target, *weights, gamma)
        found[matrix, gamma].append(log_norms(gradients)[shown].numpy())
    return GradientFlow(
        gammas=list(gammas),
        matrices=list(matrices),
        repeats=repeats,
        batch_size=len(images),
        hidden_size=hidden_size,
        noise=noise,
        seed=seed,
        t=shown,
        curves=[
            Band(
                matrix,
                gamma,
                median=_rounded(np.median(logs, axis=0)),
                lowest=_rounded(np.min(logs, axis=0)),
                highest=_rounded(np.max(logs, axis=0)),
            )
            for (matrix, gamma), logs in found.items()
        ],
    )


def hidden_gradients(
    pixels: Tensor, target: Tensor, w_h: Tensor, w_x: Tensor, w_y: Tensor, h_0: Tensor, gamma: float
) -> Tensor:
    """Compute d(mean loss)/d h_t for h_t = tanh(BN(W_h h_{t-1} + W_x x_t; γ, 0)).

    The loss is that of a softmax on the last h.

    Args:
        pixels: (T, B); target: (B,).
        w_h: (H, H); w_x: (H, 1); w_y: (classes, H); h_0: (B, H).

    Returns:
        (T, B, H) for h_1 to h_T; h_1 is the state after the first pixel.
    """
    scale = torch.full((len(w_h),), gamma, dtype=w_h.dtype)
    hidden = h_0.requires_grad_()  # the weights need no gradient; they are not trained here
    states = []
    for frame in pixels[:, :, None]:
        normalized = F.batch_norm(
            hidden @ w_h.T + frame @ w_x.T, None, None, scale, training=True, eps=1e-5
        )
        hidden = torch.tanh(normalized)
        states.append(hidden)
    loss = F.cross_entropy(hidden @ w_y.T, target)
    return torch.stack(torch.autograd.grad(loss, states))


def log_norms(gradients: Tensor) -> Tensor:
    """Return log10 of the norm over units, averaged over the batch: (T, B, H) -> (T,); 0: -inf."""
    # The square of a number below 1e-160 is 0 in float64: divide each step by its largest element.
    largest = gradients.abs().amax((1, 2))
    smallest = torch.finfo(gradients.dtype).tiny
    scaled = gradients / largest.clamp(min=smallest)[:, None, None]
    return largest.log10() + torch.linalg.vector_norm(scaled, dim=2).mean(1).log10()


def _draw(
    matrix: str, batch: int, hidden_size: int, noise: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw W_h, W_x, W_y and h_0; only W_h depends on `matrix`."""
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(rows: int, columns: int) -> Tensor:
        empty = torch.empty(rows, columns, dtype=torch.float64)
        return nn.init.orthogonal_(empty, generator=generator)

    w_x, w_y = orthogonal(hidden_size, 1), orthogonal(CLASSES, hidden_size)
    h_0 = noise * torch.randn(batch, hidden_size, dtype=torch.float64, generator=generator)
    identity = torch.eye(hidden_size, dtype=torch.float64)
    w_h = identity if matrix == "identity" else orthogonal(hidden_size, hidden_size)
    return w_h, w_x, w_y, h_0


def _rounded(logs: np.ndarray) -> list[float | None]:
    return [round(x, 2) if np.isfinite(x) else None for x in logs.tolist()]
