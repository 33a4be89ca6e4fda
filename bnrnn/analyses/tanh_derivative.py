"""Figure 1b: what is left of the derivative of tanh as its input spreads."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from bnrnn.runs.analysis import TanhDerivative


def tanh_derivative(deviations: Sequence[float]) -> TanhDerivative:
    """Mean and quartiles of 1 - tanh(x)² for x ~ N(0, σ²), one of each a σ in `deviations`.

    The paper draws samples; the mean is an integral here and the quartiles are exact.
    """
    sigma = np.asarray(deviations, dtype=np.float64)
    # The trapezoid rule: its error falls exponentially with the step for so smooth an integrand
    # (below 1e-12 up to σ = 20), and beyond 9 standard deviations lies less than 1e-18.
    z = np.linspace(-9, 9, 2001)
    density = np.exp(-(z**2) / 2)
    mean = _derivative(sigma[:, None] * z) @ (density / density.sum())
    # The derivative falls with |x|: its lower quartile is where |x| has its upper one, and |x| is
    # below σ Φ⁻¹((1 + p) / 2) with probability p.
    lower, upper = (sigma * NormalDist().inv_cdf((1 + p) / 2) for p in (0.75, 0.25))
    return TanhDerivative(
        deviations=list(deviations),
        mean=_rounded(mean),
        lower_quartile=_rounded(_derivative(lower)),
        upper_quartile=_rounded(_derivative(upper)),
    )


def _derivative(x: np.ndarray) -> np.ndarray:
    return 1 - np.tanh(x) ** 2


def _rounded(values: np.ndarray) -> list[float]:
    return values.round(6).tolist()
