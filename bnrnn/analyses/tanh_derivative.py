"""Figure 1b: the derivative of tanh against the standard deviation of its input."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from bnrnn.runs.analysis import TanhDerivative


def tanh_derivative(deviations: Sequence[float]) -> TanhDerivative:
    """Compute mean and quartiles of 1 - tanh(x)² for x ~ N(0, σ²), for each σ in `deviations`.

    The paper draws samples. Here the mean is a numerical integral and the quartiles are exact.
    """
    sigma = np.asarray(deviations, dtype=np.float64)
    # Trapezoidal rule: for such a smooth integrand its error decreases exponentially with the
    # number of points (below 1e-12 up to σ = 20). Less than 1e-18 is beyond 9 standard deviations.
    z = np.linspace(-9, 9, 2001)
    density = np.exp(-(z**2) / 2)
    mean = _derivative(sigma[:, None] * z) @ (density / density.sum())
    # The derivative decreases with |x|, so its lower quartile is at the upper quartile of |x|, and
    # |x| is below σ Φ⁻¹((1 + p) / 2) with probability p.
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
