"""The papers' equations in NumPy, in float64, step by step: the truth for tests of the cell.

They are written from the papers (Cooijmans et al. 2017, equations 2 to 8; Laurent et al. 2015; Ba
et al. 2016, equations 20 to 22; for noise those named below), not from the library, and share no
code with it. Gates are accessed by name, and statistics are computed by `mean` and `var`.
"""

import numpy as np

GATES = "ifgo"


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2  # 1 / (1 + exp(-x)) without overflow


def bn(y, gamma, beta, mean, var, eps):
    return beta + gamma * (y - mean) / np.sqrt(var + eps)


def zoneout(old, new, p, held):
    """Krueger et al. 2017: d is 1 where a unit keeps its value; without a mask it is p."""
    d = p if held is None else held.astype(float)
    return d * old + (1 - d) * new


def dropout(y, p, dropped):
    """Semeniuta et al. 2016, Gal and Ghahramani 2016: scaled in training, else the identity."""
    return y if dropped is None else (1 - dropped.astype(float)) * y / (1 - p)


def bn_lstm(
    x,
    h,
    c,
    w,
    norms,
    eps=1e-5,
    population=None,
    lengths=None,
    count_padding=False,
    sequence_eps=None,
    noise=None,
):
    """x (T, B, D); w: the parameters by name; norms: {"ih": ..., "hh": ..., "c": ...}.

    sequence_eps: ε of sequence-wise statistics; None: eps.
    noise: probabilities and masks, named as in the library's `Noise`.

    Returns output (T, B, H), h_n, c_n, and {"ih": (means, vars), ...} with a list entry per step.
    """
    steps, batch, _ = x.shape
    lengths = np.full(batch, steps) if lengths is None else lengths
    seen = {term: ([], []) for term in ("ih", "hh", "c")}
    noise = noise or {}

    def mask(name, t=None):
        of_all = noise.get(name)
        return of_all if of_all is None or t is None else of_all[t]

    def normalize(term, y, gamma, beta, t, rows):
        if norms[term] == "none":
            return y + beta
        if norms[term] == "layer":
            return bn(y, gamma, beta, y.mean(1, keepdims=True), y.var(1, keepdims=True), eps)
        if population is not None:
            means, variances = population[term]
            mean, var = means[min(t, len(means) - 1)], variances[min(t, len(means) - 1)]
        else:
            if rows.sum() > 1 or not seen[term][0]:
                mean, var = y[rows].mean(0), y[rows].var(0)
            else:  # a single sequence has no variance: use the last statistics of two or more
                mean, var = seen[term][0][-1], seen[term][1][-1]
            seen[term][0].append(mean)
            seen[term][1].append(var)
        return bn(y, gamma, beta, mean, var, eps)

    sequence_term = []
    if norms["ih"] == "sequence":
        y = np.stack([x[t] @ w["weight_ih"].T for t in range(steps)])
        if population is None:
            frames = np.concatenate([y[t][lengths > t] for t in range(steps)])
            mean, var = frames.mean(0), frames.var(0)
            seen["ih"][0].append(mean)
            seen["ih"][1].append(var)
        else:
            mean, var = population["ih"][0][0], population["ih"][1][0]
        sequence_term = bn(
            y, w["gamma_ih"], 0, mean, var, eps if sequence_eps is None else sequence_eps
        )

    output = []
    for t in range(steps):
        live = lengths > t
        rows = np.full(batch, True) if count_padding else live
        if norms["ih"] == "sequence":
            from_input = sequence_term[t]
        else:
            from_input = normalize("ih", x[t] @ w["weight_ih"].T, w.get("gamma_ih"), 0, t, rows)
        h_in = dropout(h, noise.get("hidden_dropout"), mask("dropped_hidden"))
        if norms["hh"] == "sum":  # BN(W_h h_{t-1} + W_x x_t), with the bias as β
            both = h_in @ w["weight_hh"].T + x[t] @ w["weight_ih"].T
            z = normalize("hh", both, w["gamma_hh"], w.get("bias", 0), t, rows)
        else:
            from_state = normalize("hh", h_in @ w["weight_hh"].T, w.get("gamma_hh"), 0, t, rows)
            z = from_input + from_state + w.get("bias", 0)
        gate = dict(zip(GATES, np.split(z, 4, axis=1), strict=True))
        candidate = dropout(
            np.tanh(gate["g"]), noise.get("recurrent_dropout"), mask("dropped_candidate", t)
        )
        new_c = sigmoid(gate["f"]) * c + sigmoid(gate["i"]) * candidate
        new_c = np.where(live[:, None], new_c, c)
        cell = normalize("c", new_c, w.get("gamma_c"), w.get("beta_c", 0), t, rows)
        new_h = sigmoid(gate["o"]) * np.tanh(cell)
        new_c = zoneout(c, new_c, noise.get("zoneout_cell", 0), mask("held_cell", t))
        new_h = zoneout(h, new_h, noise.get("zoneout_hidden", 0), mask("held_hidden", t))
        c = np.where(live[:, None], new_c, c)
        h = np.where(live[:, None], new_h, h)
        output.append(np.where(live[:, None], new_h, 0))
    return np.stack(output), h, c, seen
