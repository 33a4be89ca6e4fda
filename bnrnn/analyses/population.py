"""Figure 5: how population statistics change over the time steps of a sequence."""

from typing import cast

import numpy as np
from torch import nn

from bnrnn.errors import ConfigError
from bnrnn.kernels import Moments
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.statistics import StepStatistics
from bnrnn.runs.analysis import Population, Units

TERMS = {"recurrent": "hh_l0", "cell": "c_l0"}
FIRST, LATER = 30, 30  # time steps to keep: the first 30, and 30 of the later ones


def population(model: nn.Module, units: int, seed: int) -> Population:
    """Return population mean and variance of random units of the first `BNLSTM` in `model`.

    Units of the recurrent term W_h h are chosen from its 4H features (gates i, f, g, o), and units
    of the cell state from H; all of them if there are fewer than `units`.

    Returns:
        steps: T. t: the first 30 steps, and 30 more up to the last. recurrent and cell: units
        (indices), mean and variance; for each unit a list over t.

    Raises:
        ConfigError: the model does not normalise both.
    """
    found = next((module for module in model.modules() if isinstance(module, BNLSTM)), None)
    if found is None or not all(name in found.statistics for name in TERMS.values()):
        raise ConfigError(
            "population statistics of the recurrent term and the cell are of a model that "
            "normalises both, as model=bnlstm does: take a run of such a model"
        )
    generator = np.random.default_rng(seed)
    moments = {
        term: cast("StepStatistics", found.statistics[name]).population()
        for term, name in TERMS.items()
    }
    steps = len(moments["cell"].mean)
    t = list(range(steps))
    if steps > FIRST + LATER:
        t[FIRST:] = np.linspace(FIRST, steps - 1, LATER).round().astype(int).tolist()
    return Population(
        seed=seed,
        units=units,
        steps=steps,
        t=t,
        recurrent=_curves(moments["recurrent"], t, units, generator),
        cell=_curves(moments["cell"], t, units, generator),
    )


def _curves(moments: Moments, t: list[int], units: int, generator: np.random.Generator) -> Units:
    features = moments.mean.shape[1]
    chosen = np.sort(generator.choice(features, min(units, features), replace=False)).tolist()

    def curves(statistic: np.ndarray) -> list[list[float]]:
        return [[float(f"{x:.4g}") for x in row] for row in statistic[t][:, chosen].T.tolist()]

    return Units(
        units=chosen,
        mean=curves(moments.mean.cpu().numpy()),
        variance=curves(moments.var.cpu().numpy()),
    )
