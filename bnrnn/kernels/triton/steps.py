"""The time steps as two Triton kernels, forward and backward.

A block is BLOCK_U hidden units with their four gates and the whole batch, so batch statistics are
sums within one program. A program runs one or more blocks, one after the other. Between two steps,
programs exchange only h_t (forward) or the gradient of W_h h_{t-1} (backward).

These constants select how the kernels run:

    PERSISTENT: one launch covers all steps, with a barrier over the grid after each. All programs
        must be resident at once, which launch_cooperative_grid=True ensures. Otherwise a launch
        covers one step, and its end is the barrier.
    PRODUCT: the kernel multiplies by W_h itself. Otherwise the caller does, before each launch.

Feature 4 u + gate, of the 4H features, is gate `gate` of unit u; the rows of W_h have the same
order. A block's features are therefore contiguous: reshaping (B, 4 BLOCK_U) to (B, BLOCK_U, 2, 2)
and splitting it twice gives the gates.

The gradients, with y_hat the normalised y of a slot, n the number of rows that count, and d for a
gradient, are

    dγ = Σ_b dy y_hat        dβ = Σ_b dy
    d(y before BN) = γ / sqrt(var + ε) (dy − (dβ + y_hat dγ) / n)
"""

# ruff: noqa: N803  (constants are in capitals, by Triton's convention)
# pyright: basic, reportAttributeAccessIssue=false

import triton
import triton.language as tl

NONE, BATCH, GIVEN = 0, 1, 2  # values of NORM_HH and NORM_C: the statistics a slot uses


@triton.jit
def grid_barrier(counter, target):
    """Wait until the programs have arrived here `target` times in total."""
    tl.debug_barrier()  # all threads of this program must have stored their results
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _tanh(x):
    # Triton has no tanh; this one is exact where it saturates.
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _to_tf32(x):
    """Round to the nearest number with 10 fraction bits. Tensor cores would truncate instead, and
    products of truncated factors are biased towards zero."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # leave NaN alone: its bits would overflow


@triton.jit
def _split_gates(z, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr):
    i_g, f_o = tl.split(tl.reshape(z, (BLOCK_B, BLOCK_U, 2, 2)))
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return i, f, g, o


@triton.jit
def _join_gates(i, f, g, o, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr):
    return tl.reshape(tl.join(tl.join(i, g), tl.join(f, o)), (BLOCK_B, 4 * BLOCK_U))


@triton.jit
def _moments(y, counted, n, alone, mean_rows, var_rows, at, before, mask, UNEVEN: tl.constexpr):
    """Compute mean and biased variance of the columns of y over the counted rows; store at `at`.

    If `alone` (possible only if UNEVEN), reuse those of the previous step, stored at `before`.
    """
    mean = tl.sum(tl.where(counted, y, 0.0), 0) / n
    off = tl.where(counted, y - mean[None, :], 0.0)
    var = tl.sum(off * off, 0) / n
    if UNEVEN:
        mean = tl.where(alone, tl.load(mean_rows + before, mask & alone, other=0.0), mean)
        var = tl.where(alone, tl.load(var_rows + before, mask & alone, other=0.0), var)
    tl.store(mean_rows + at, mean, mask)
    tl.store(var_rows + at, var, mask)
    return mean, var


@triton.jit(do_not_specialize=["keep", "first", "last", "batch", "rows_hh", "rows_c"])
def forward_steps(
    x,  # (T, B, 4H): BN(W_x x_t) + b
    weight_hh,  # (4H, WIDTH): WIDTH is H rounded up to whole BLOCK_K, zeros beyond H
    product,  # (B, 4H): W_h h_{t-1} if not PRODUCT
    # h_{-1}, h_0 ... as the product takes them: (T + 1, B, WIDTH) if keep, else (2, B, WIDTH);
    # zeros beyond H
    states,
    cells,  # c_{-1}, c_0 ...: (T + 1, B, H) if keep, else (2, B, H)
    output,  # (T, B, H)
    # W_h h_{t-1}, normalised but not scaled: (T, B, 4H) if keep, else (B, 4H) for the last step
    hats,
    gamma_hh, gamma_c, beta_c,
    mean_hh, var_hh, mean_c, var_c,  # (rows, features): written if BATCH, read if GIVEN
    lengths,  # (B,)
    counter,  # (1,) int32, zero
    keep,  # for the backward pass; not a constant, as different code might round differently
    first, last,  # the steps of this launch
    batch, hidden, width, rows_hh, rows_c,
    EPS: tl.constexpr, NORM_HH: tl.constexpr, NORM_C: tl.constexpr, BETA_C: tl.constexpr,
    LENGTHS: tl.constexpr, COUNT_PADDING: tl.constexpr,
    PERSISTENT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BLOCK_B)
    in_b = b < batch
    size = batch.to(tl.int64) * hidden
    runs_for = tl.full((BLOCK_B,), 0, tl.int32)
    if LENGTHS:
        runs_for = tl.load(lengths + b, in_b, other=0).to(tl.int32)

    for t in range(first, last):
        step = t  # the assignment makes a tensor: when interpreted, t is an int without .to
        here = tl.where(keep != 0, step, step % 2)
        there = tl.where(keep != 0, step + 1, (step + 1) % 2)
        step_of_hats = tl.where(keep != 0, step, 0).to(tl.int64)
        step = step.to(tl.int64)
        h_before = states + here.to(tl.int64) * (batch * width)
        c_before = cells + here.to(tl.int64) * size

        live = in_b
        if LENGTHS:
            live = in_b & (t < runs_for)
        counted = in_b
        n = batch.to(ACC)
        alone = step < 0
        if LENGTHS and not COUNT_PADDING:
            counted = live
            running = tl.sum(live.to(tl.int32), 0)
            n = tl.maximum(running, 1).to(ACC)
            alone = (running < 2) & (step > 0)

        for block in range(tl.program_id(0), tl.cdiv(hidden, BLOCK_U), tl.num_programs(0)):
            u = block * BLOCK_U + tl.arange(0, BLOCK_U)
            feature = block * (4 * BLOCK_U) + tl.arange(0, 4 * BLOCK_U)
            in_u, in_f = u < hidden, feature < 4 * hidden
            of_unit = in_b[:, None] & in_u[None, :]
            of_feature = in_b[:, None] & in_f[None, :]
            at_unit = b[:, None] * hidden + u[None, :]
            at_feature = b[:, None] * (4 * hidden) + feature[None, :]
            at_state = b[:, None] * width + u[None, :]
            gamma_h = tl.full((4 * BLOCK_U,), 1.0, ACC)
            if NORM_HH != 0:
                gamma_h = tl.load(gamma_hh + feature, in_f, other=0.0).to(ACC)
            gamma_y = tl.full((BLOCK_U,), 1.0, ACC)
            if NORM_C != 0:
                gamma_y = tl.load(gamma_c + u, in_u, other=0.0).to(ACC)
            beta_y = tl.full((BLOCK_U,), 0.0, ACC)
            if BETA_C:
                beta_y = tl.load(beta_c + u, in_u, other=0.0).to(ACC)

            # W_h h_{t-1}
            if PRODUCT:
                a = tl.zeros((BLOCK_B, 4 * BLOCK_U), ACC)
                for k0 in range(0, width, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    at_h = b[:, None] * width + k[None, :]
                    at_w = feature[None, :] * width + k[:, None]
                    h = tl.load(h_before + at_h, in_b[:, None], other=0.0)
                    w = tl.load(weight_hh + at_w, in_f[None, :], other=0.0)
                    if WIDEN:
                        h, w = h.to(ACC), w.to(ACC)
                    a = tl.dot(h, w, a, input_precision=PRECISION, out_dtype=ACC)
            else:
                a = tl.load(product + at_feature, of_feature, other=0.0).to(ACC)

            if NORM_HH == 1:
                at = step * (4 * hidden) + feature
                mean, var = _moments(
                    a, counted[:, None], n, alone, mean_hh, var_hh, at, at - 4 * hidden, in_f,
                    LENGTHS and not COUNT_PADDING,
                )  # fmt: skip
                a = (a - mean[None, :]) * tl.rsqrt(var + EPS)[None, :]
            if NORM_HH == 2:
                at = tl.minimum(step, rows_hh - 1) * (4 * hidden) + feature
                mean = tl.load(mean_hh + at, in_f, other=0.0).to(ACC)
                var = tl.load(var_hh + at, in_f, other=1.0).to(ACC)
                a = (a - mean[None, :]) * tl.rsqrt(var + EPS)[None, :]
            tl.store(hats + step_of_hats * (4 * size) + at_feature, a, of_feature)
            z = a * gamma_h[None, :]
            z += tl.load(x + step * (4 * size) + at_feature, of_feature, other=0.0).to(ACC)
            i, f, g, o = _split_gates(z, BLOCK_B, BLOCK_U)

            c_old = tl.load(c_before + at_unit, of_unit, other=0.0)
            c = tl.sigmoid(f) * c_old + tl.sigmoid(i) * _tanh(g)
            if LENGTHS:
                c = tl.where(live[:, None], c, c_old)
            tl.store(cells + there.to(tl.int64) * size + at_unit, c, of_unit)

            if NORM_C == 1:
                at = step * hidden + u
                mean, var = _moments(
                    c, counted[:, None], n, alone, mean_c, var_c, at, at - hidden, in_u,
                    LENGTHS and not COUNT_PADDING,
                )  # fmt: skip
                c = (c - mean[None, :]) * tl.rsqrt(var + EPS)[None, :]
            if NORM_C == 2:
                at = tl.minimum(step, rows_c - 1) * hidden + u
                mean = tl.load(mean_c + at, in_u, other=0.0).to(ACC)
                var = tl.load(var_c + at, in_u, other=1.0).to(ACC)
                c = (c - mean[None, :]) * tl.rsqrt(var + EPS)[None, :]
            h_new = tl.sigmoid(o) * _tanh(c * gamma_y[None, :] + beta_y[None, :])
            kept = h_new
            if LENGTHS:
                h_old = tl.load(h_before + at_state, of_unit, other=0.0).to(ACC)
                kept = tl.where(live[:, None], h_new, h_old)
                h_new = tl.where(live[:, None], h_new, 0.0)
            if ROUND:
                kept = _to_tf32(kept)
            tl.store(states + there.to(tl.int64) * (batch * width) + at_state, kept, of_unit)
            tl.store(output + step * size + at_unit, h_new, of_unit)
        if PERSISTENT:
            grid_barrier(counter, (t - first + 1) * tl.num_programs(0))


@triton.jit(do_not_specialize=["first", "last", "steps", "batch", "rows_hh", "rows_c"])
def backward_steps(
    x, cells, hats,  # as in the forward pass
    weight_hh,  # (H, 4 WIDTH): transposed, zeros beyond 4H
    product,  # (B, H): the part of grad_h that passes through W_h, if not PRODUCT
    gamma_hh, gamma_c, beta_c, var_hh, mean_c, var_c, lengths, counter,
    grad_output,  # (T, B, H); if GRAD_OUTPUT
    grad_h,  # (B, H): at first of h_n; at the end the part for h_{-1} that bypasses W_h
    grad_c,  # (B, H): at first of c_n; at the end of c_{-1}
    grad_x,  # (T, B, 4H)
    grad_a,  # (T, B, 4 WIDTH): of W_h h_{t-1}; zeros beyond 4H
    grad_gamma_hh, grad_gamma_c, grad_beta_c,  # (T, features): the contribution of each step
    first, last,  # the steps of this launch, from last - 1 down to first
    steps, batch, hidden, width, rows_hh, rows_c,
    EPS: tl.constexpr, NORM_HH: tl.constexpr, NORM_C: tl.constexpr, BETA_C: tl.constexpr,
    LENGTHS: tl.constexpr, COUNT_PADDING: tl.constexpr, GRAD_OUTPUT: tl.constexpr,
    PERSISTENT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BLOCK_B)
    in_b = b < batch
    size = batch.to(tl.int64) * hidden
    size_a = batch.to(tl.int64) * (4 * width)
    runs_for = tl.full((BLOCK_B,), 0, tl.int32)
    if LENGTHS:
        runs_for = tl.load(lengths + b, in_b, other=0).to(tl.int32)

    for back in range(0, last - first):
        t = last - 1 - back
        step = t.to(tl.int64)

        live = in_b
        if LENGTHS:
            live = in_b & (t < runs_for)
        counted = in_b
        n = batch.to(ACC)
        if LENGTHS and not COUNT_PADDING:
            running = tl.sum(live.to(tl.int32), 0)
            n = tl.maximum(running, 1).to(ACC)
            # A lone sequence is normalised by constants: the statistics have no gradient.
            counted = live & ((running > 1) | (step == 0))

        for block in range(tl.program_id(0), tl.cdiv(hidden, BLOCK_U), tl.num_programs(0)):
            u = block * BLOCK_U + tl.arange(0, BLOCK_U)
            feature = block * (4 * BLOCK_U) + tl.arange(0, 4 * BLOCK_U)
            in_u, in_f = u < hidden, feature < 4 * hidden
            of_unit = in_b[:, None] & in_u[None, :]
            of_feature = in_b[:, None] & in_f[None, :]
            at_unit = b[:, None] * hidden + u[None, :]
            at_feature = b[:, None] * (4 * hidden) + feature[None, :]
            at_a = b[:, None] * (4 * width) + feature[None, :]
            gamma_h = tl.full((4 * BLOCK_U,), 1.0, ACC)
            if NORM_HH != 0:
                gamma_h = tl.load(gamma_hh + feature, in_f, other=0.0).to(ACC)
            gamma_y = tl.full((BLOCK_U,), 1.0, ACC)
            if NORM_C != 0:
                gamma_y = tl.load(gamma_c + u, in_u, other=0.0).to(ACC)
            beta_y = tl.full((BLOCK_U,), 0.0, ACC)
            if BETA_C:
                beta_y = tl.load(beta_c + u, in_u, other=0.0).to(ACC)

            # dh_t: the part that bypasses W_h plus, except at the last step, that through W_h h_t
            dh = tl.load(grad_h + at_unit, of_unit, other=0.0)
            dc = tl.load(grad_c + at_unit, of_unit, other=0.0)
            if PRODUCT:
                depth = tl.where(t + 1 < steps, 4 * width, 0)
                for k0 in range(0, depth, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    at_da = b[:, None] * (4 * width) + k[None, :]
                    at_w = u[None, :] * (4 * width) + k[:, None]
                    da = tl.load(grad_a + (step + 1) * size_a + at_da, in_b[:, None], other=0.0)
                    w = tl.load(weight_hh + at_w, in_u[None, :], other=0.0)
                    if WIDEN:
                        da, w = da.to(ACC), w.to(ACC)
                    dh = tl.dot(da, w, dh, input_precision=PRECISION, out_dtype=ACC)
            else:
                dh += tl.load(product + at_unit, of_unit, other=0.0).to(ACC)

            # A finished sequence passes it on to h_{t-1}.
            tl.store(grad_h + at_unit, tl.where(live[:, None], 0.0, dh), of_unit)
            if GRAD_OUTPUT:
                dh += tl.load(grad_output + step * size + at_unit, of_unit, other=0.0).to(ACC)
            dh = tl.where(live[:, None], dh, 0.0)

            # Recompute the gates.
            hat = tl.load(hats + step * (4 * size) + at_feature, of_feature, other=0.0).to(ACC)
            z = hat * gamma_h[None, :]
            z += tl.load(x + step * (4 * size) + at_feature, of_feature, other=0.0).to(ACC)
            i, f, g, o = _split_gates(z, BLOCK_B, BLOCK_U)
            i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), _tanh(g), tl.sigmoid(o)
            c_old = tl.load(cells + step * size + at_unit, of_unit, other=0.0)
            c = tl.load(cells + (step + 1) * size + at_unit, of_unit, other=0.0)

            # h_t = o tanh(y), y = γ_c c_hat + β_c
            scale = gamma_y
            if NORM_C != 0:
                at = tl.minimum(step, rows_c - 1) * hidden + u
                mean = tl.load(mean_c + at, in_u, other=0.0).to(ACC)
                rstd = tl.rsqrt(tl.load(var_c + at, in_u, other=1.0).to(ACC) + EPS)
                c = (c - mean[None, :]) * rstd[None, :]
                scale = rstd * gamma_y
            squashed = _tanh(c * gamma_y[None, :] + beta_y[None, :])
            do = dh * squashed * o * (1 - o)
            dy = dh * o * (1 - squashed * squashed)
            total = tl.sum(dy, 0)
            if BETA_C:
                tl.store(grad_beta_c + step * hidden + u, total, in_u)
            if NORM_C != 0:
                total_hat = tl.sum(dy * c, 0)
                tl.store(grad_gamma_c + step * hidden + u, total_hat, in_u)
            if NORM_C == 1:
                share = (total[None, :] + c * total_hat[None, :]) / n
                dy -= tl.where(counted[:, None], share, 0.0)
            dc += dy * scale[None, :]

            # c_t = f c_{t-1} + i g
            of_c = tl.where(live[:, None], dc, 0.0)
            di = of_c * g * i * (1 - i)
            df = of_c * c_old * f * (1 - f)
            dg = of_c * i * (1 - g * g)
            tl.store(grad_c + at_unit, tl.where(live[:, None], dc * f, dc), of_unit)
            dz = _join_gates(di, df, dg, do, BLOCK_B, BLOCK_U)
            tl.store(grad_x + step * (4 * size) + at_feature, dz, of_feature)

            # z = γ_h a_hat + x
            if NORM_HH != 0:
                at = tl.minimum(step, rows_hh - 1) * (4 * hidden) + feature
                rstd = tl.rsqrt(tl.load(var_hh + at, in_f, other=1.0).to(ACC) + EPS)
                total_hat = tl.sum(dz * hat, 0)
                tl.store(grad_gamma_hh + step * (4 * hidden) + feature, total_hat, in_f)
                if NORM_HH == 1:
                    total = tl.sum(dz, 0)
                    share = (total[None, :] + hat * total_hat[None, :]) / n
                    dz -= tl.where(counted[:, None], share, 0.0)
                dz = dz * (rstd * gamma_h)[None, :]
            if ROUND:
                dz = _to_tf32(dz)
            tl.store(grad_a + step * size_a + at_a, dz, of_feature)
        if PERSISTENT:
            grid_barrier(counter, (back + 1) * tl.num_programs(0))
