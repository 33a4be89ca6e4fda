// One time step: the elementwise parts and the statistics, unit by unit.
#pragma once

#include <vector>

#include "share.h"
#include "transpose.h"

namespace bnrnn {

template <typename T>
class Step : public Share<T> {
 public:
  using Share<T>::p, Share<T>::H, Share<T>::W;
  using Share<T>::recurrent_at, Share<T>::state_at, Share<T>::cell_at, Share<T>::live_at;
  using Share<T>::counted_at, Share<T>::grad_recurrent_at, Share<T>::panel_at, Share<T>::put_state, Share<T>::is_lone;

  Step(const Problem<T>& problem, int thread, int threads) : Share<T>(problem, thread, threads) {
    input.resize(kGates * kGroup * W);
    grad_input.resize(kGates * kGroup * W);
    grad_out.resize(kGroup * W);
    unit.resize(kUnitArrays * W);
  }

  // The group's rows of W_x x_t into `input`, which stays zero where there are sums: then to where
  // the product will be added.
  void input_term(ptrdiff_t t, Range group) {
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + group.begin;
      T* const rows = p.sums ? recurrent_at(t) + first * W : input_row(input, gate, 0);
      if (p.narrow == nullptr) {
        transpose_in(group.size(), p.batch, W, rows,
             [&](ptrdiff_t b) { return term_row(t, b) + first; });
        continue;
      }
      const T* x = p.narrow + t * p.input_size * W;
      for (ptrdiff_t u = 0; u < group.size(); ++u) {
        const T* weights = p.weight_ih + (first + u) * p.input_size;
        T* row = rows + u * W;
        for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
          Vector<T> total = load(x + b) * weights[0];
          for (ptrdiff_t d = 1; d < p.input_size; ++d) total += load(x + d * W + b) * weights[d];
          store(row + b, total);
        }
      }
    }
  }

  // c_t and h_t of unit j, and the moments of its terms.
  void forward_unit(ptrdiff_t t, Range group, ptrdiff_t j) {
    const ptrdiff_t u = j - group.begin;
    Standard<T> of_x[kGates], of_h[kGates], of_c[1];
    const T *x[kGates], *h[kGates];
    T* gates[kGates];
    for (int gate = 0; gate < kGates; ++gate) {
      x[gate] = input_row(input, gate, u);
      h[gate] = recurrent_at(t) + (gate * H + j) * W;
      gates[gate] = unit.data() + gate * W;
    }
    standardize(p.ih, t, j, kGates * H, x, of_x);
    standardize(p.hh, t, j, kGates * H, h, of_h);
    for (int gate = 0; gate < kGates; ++gate) {
      const T bias = p.bias == nullptr ? 0 : p.bias[gate * H + j];
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
        const Vector<T> z = (load(x[gate] + b) - of_x[gate].mean) * of_x[gate].scale() +
                            (load(h[gate] + b) - of_h[gate].mean) * of_h[gate].scale() + bias;
        store(gates[gate] + b, gate == kCandidate ? tanh<T>(z) : sigmoid<T>(z));
      }
    }
    const T *c_before = cell_at(t) + j * W, *live = live_at(t);
    T* const c_after = cell_at(t + 1) + j * W;
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> before = load(c_before + b);
      const Vector<T> c = load(gates[kForget] + b) * before +
                          load(gates[kInput] + b) * load(gates[kCandidate] + b);
      const Integers<T> runs = load(live + b) != 0;
      store(c_after + b, runs ? c : before);
    }
    standardize(p.c, t, j, H, {c_after}, of_c);
    const T beta = p.beta_c == nullptr ? 0 : p.beta_c[j];
    const T* h_before = state_at(t) + j * W;
    T* h_after = state_at(t + 1) + j * W;
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> c = load(c_after + b);
      const Vector<T> h =
          load(gates[kOutput] + b) * tanh<T>((c - of_c[0].mean) * of_c[0].scale() + beta);
      const Integers<T> runs = load(live + b) != 0;
      store(h_after + b, runs ? h : load(h_before + b));
    }
    put_state(t + 1, j);
  }

  // h_t of the group to the output.
  void put_output(ptrdiff_t t, Range group) {
    const T* live = live_at(t);
    transpose_out(group.size(), p.batch, W, state_at(t + 1) + group.begin * W,
              [&](ptrdiff_t b, ptrdiff_t u0, int n, Vector<T> h) {
                T* to = p.output + (t * p.batch + b) * H + group.begin + u0;
                store_first(to, live[b] != 0 ? h : zero<T>(), n);
              });
  }

  // The group's part of the output's gradient into `grad_out`.
  void get_grad_output(ptrdiff_t t, Range group) {
    if (p.grad_output == nullptr) return;
    transpose_in(group.size(), p.batch, W, grad_out.data(), [&](ptrdiff_t b) {
      return p.grad_output + (t * p.batch + b) * H + group.begin;
    });
  }

  // The gradients of unit j at step t, in the order of the equations at the head of recurrence.cpp.
  void backward_unit(ptrdiff_t t, Range group, ptrdiff_t j) {
    const ptrdiff_t u = j - group.begin;
    Standard<T> of_x[kGates], of_h[kGates];
    T *x[kGates], *h[kGates], *gates[kGates], *dz[kGates], *da_h[kGates], *da_x[kGates];
    T* free = unit.data();
    const auto array = [&] { return (free += W) - W; };
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t i = gate * H + j;
      x[gate] = input_row(input, gate, u);  // normalised in place
      h[gate] = array();
      dz[gate] = array();
      gates[gate] = array();
      da_h[gate] = grad_recurrent_at(t, i);
      da_x[gate] = input_row(grad_input, gate, u);
      of_x[gate] = standard_at(p.ih, t, i, kGates * H);
      of_h[gate] = standard_at(p.hh, t, i, kGates * H);
    }
    const Standard<T> of_c = standard_at(p.c, t, j, H);
    const T beta = p.beta_c == nullptr ? 0 : p.beta_c[j];
    const T *c_before = cell_at(t) + j * W, *live = live_at(t), *counted = counted_at(t);
    T *dh = p.grad_state + j * W, *dc = p.grad_cell + j * W;
    T *dy = array(), *c_hat = array();

    // The gates again.
    for (int gate = 0; gate < kGates; ++gate) {
      const T* recurrent = recurrent_at(t) + (gate * H + j) * W;
      const T bias = p.bias == nullptr ? 0 : p.bias[gate * H + j];
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
        const Vector<T> x_hat = (load(x[gate] + b) - of_x[gate].mean) * of_x[gate].rstd;
        const Vector<T> h_hat = (load(recurrent + b) - of_h[gate].mean) * of_h[gate].rstd;
        store(x[gate] + b, x_hat);
        store(h[gate] + b, h_hat);
        const Vector<T> z = x_hat * of_x[gate].gamma + h_hat * of_h[gate].gamma + bias;
        store(gates[gate] + b, gate == kCandidate ? tanh<T>(z) : sigmoid<T>(z));
      }
    }

    // h_t = o tanh(y), y = gamma_c c_hat + beta_c, back to y and o.
    Vector<T> sum_y = zero<T>(), sum_y_hat = zero<T>();
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> i = load(gates[kInput] + b), f = load(gates[kForget] + b);
      const Vector<T> g = load(gates[kCandidate] + b), o = load(gates[kOutput] + b);
      const Integers<T> runs = load(live + b) != 0;
      const Vector<T> before = load(c_before + b);
      const Vector<T> c = runs ? f * before + i * g : before;
      const Vector<T> hat = (c - of_c.mean) * of_c.rstd;
      const Vector<T> squashed = tanh<T>(hat * of_c.gamma + beta);
      Vector<T> grad = load(dh + b);
      store(dh + b, runs ? zero<T>() : grad);  // a finished sequence hands its gradient on
      if (p.grad_output != nullptr) grad += load(grad_out.data() + u * W + b);
      grad = runs ? grad : zero<T>();
      const Vector<T> of_y = grad * o * (1 - squashed * squashed);
      sum_y += of_y;
      sum_y_hat += of_y * hat;
      store(dz[kOutput] + b, grad * squashed * o * (1 - o));
      store(dy + b, of_y);
      store(c_hat + b, hat);
    }
    const T total_y = sum<T>(sum_y), total_y_hat = sum<T>(sum_y_hat);
    if (p.grad_beta_c != nullptr) p.grad_beta_c[j] += total_y;
    if (p.c.grad_gamma != nullptr) p.c.grad_gamma[j] += total_y_hat;

    // c_t = f c_{t-1} + i g, back to the gates' arguments. A finished sequence's c_t is c_{t-1}: its
    // gates get nothing, but where it counts in the statistics its c gets its share of them.
    const T inverse = is_lone(t) ? 0 : p.inverse_count[t * p.count_stride];
    const T c_inverse = p.c.per_step ? inverse : 0;
    const T mean_y = total_y * c_inverse, mean_y_hat = total_y_hat * c_inverse;
    Vector<T> sum_z[kGates] = {}, sum_x[kGates] = {}, sum_h[kGates] = {};
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> m = load(counted + b);
      const Integers<T> runs = load(live + b) != 0;
      const Vector<T> through =
          (load(dy + b) - m * (mean_y + load(c_hat + b) * mean_y_hat)) * of_c.scale();
      const Vector<T> of_c_t = load(dc + b) + through;
      const Vector<T> grad = runs ? of_c_t : zero<T>();
      const Vector<T> i = load(gates[kInput] + b), f = load(gates[kForget] + b);
      const Vector<T> g = load(gates[kCandidate] + b);
      store(dc + b, runs ? of_c_t * f : of_c_t);
      const Vector<T> of_z[kGates] = {
          grad * g * i * (1 - i), grad * load(c_before + b) * f * (1 - f), grad * i * (1 - g * g),
          load(dz[kOutput] + b)};
      for (int gate = 0; gate < kGates; ++gate) {
        store(dz[gate] + b, of_z[gate]);
        sum_z[gate] += of_z[gate];
        sum_x[gate] += of_z[gate] * load(x[gate] + b);
        sum_h[gate] += of_z[gate] * load(h[gate] + b);
      }
    }

    // z = BN(W_x x_t) + BN(W_h h_{t-1}) + b, back to the two products.
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t k = gate * H + j;
      const T total = sum<T>(sum_z[gate]), total_x = sum<T>(sum_x[gate]);
      const T total_h = sum<T>(sum_h[gate]);
      p.grad_bias[k] += total;
      if (p.ih.grad_gamma != nullptr) p.ih.grad_gamma[k] += total_x;
      if (p.hh.grad_gamma != nullptr) p.hh.grad_gamma[k] += total_h;
      const T x_inverse = p.ih.per_step ? inverse : 0, h_inverse = p.hh.per_step ? inverse : 0;
      const T mean_x = total * x_inverse, mean_x_hat = total_x * x_inverse;
      const T mean_h = total * h_inverse, mean_h_hat = total_h * h_inverse;
      // The gradient through whole-sequence statistics needs sums over all steps: see sequence.h.
      const T x_scale = p.sequence_weights != nullptr ? 1 : of_x[gate].scale();
      const T h_scale = of_h[gate].scale();
      pack_right_row(panel_at(t, kGates * H), kGates * H, W, k, [&](ptrdiff_t b) {
        const Vector<T> m = load(counted + b), of_z = load(dz[gate] + b);
        const Vector<T> of_product =
            (of_z - m * (mean_h + load(h[gate] + b) * mean_h_hat)) * h_scale;
        store(da_h[gate] + b, of_product);
        store(da_x[gate] + b,
              p.sums ? of_product
                     : (of_z - m * (mean_x + load(x[gate] + b) * mean_x_hat)) * x_scale);
        return of_product;
      });
    }
  }

  // The gradient of W_x x_t, in `grad_input`, or that of the sum, to where it is wanted.
  void put_grad_input(ptrdiff_t t, Range group) {
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + group.begin;
      const T* const rows = input_row(grad_input, gate, 0);
      if (p.grad_weight_ih != nullptr) {
        const T* x = p.narrow + t * p.input_size * W;
        for (ptrdiff_t u = 0; u < group.size(); ++u) {
          const T* row = rows + u * W;
          for (ptrdiff_t d = 0; d < p.input_size; ++d) {
            Vector<T> total = zero<T>();
            for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
              total += load(row + b) * load(x + d * W + b);
            }
            p.grad_weight_ih[(first + u) * p.input_size + d] += sum<T>(total);
          }
        }
      } else if (p.grad_columns != nullptr) {
        transpose_out(group.size(), p.batch, W, rows,
                  [&](ptrdiff_t b, ptrdiff_t u0, int n, Vector<T> grad) {
                    T* to = p.grad_columns + p.index[t * p.batch + b] * kGates * H + first + u0;
                    store_first(to, load_first(to, n) + grad, n);
                  });
      } else if (p.grad_term != nullptr) {
        transpose_out(group.size(), p.batch, W, rows,
                  [&](ptrdiff_t b, ptrdiff_t u0, int n, Vector<T> grad) {
                    store_first(p.grad_term + (t * p.batch + b) * kGates * H + first + u0, grad, n);
                  });
      }
    }
  }

 private:
  static constexpr int kUnitArrays = 14;  // what backward_unit needs

  T* input_row(std::vector<T>& of, int gate, ptrdiff_t u) {
    return of.data() + (gate * kGroup + u) * W;
  }

  // Row (t, b) of the input term, if it need not be computed from few features.
  const T* term_row(ptrdiff_t t, ptrdiff_t b) const {
    const ptrdiff_t i = t * p.batch + b;
    return p.index != nullptr ? p.columns + p.index[i] * kGates * H : p.term + i * kGates * H;
  }

  // Mean and variance of the rows y (W,) of unit j, one a gate or the cell's alone, over the counted
  // sequences, if it is this pass that computes them. All rows in one loop: the sum of one alone
  // would wait for each addition.
  template <int N>
  void standardize(const Slot<T>& slot, ptrdiff_t t, ptrdiff_t j, ptrdiff_t features,
                   const T* const (&y)[N], Standard<T> (&to)[N]) const {
    const bool computed = slot.gamma != nullptr && slot.per_step;
    if (computed && is_lone(t)) {
      for (int n = 0; n < N; ++n) {
        const ptrdiff_t i = t * features + n * H + j;
        slot.mean[i] = slot.mean[i - features];
        slot.var[i] = slot.var[i - features];
      }
    } else if (computed) {
      const T* counted = counted_at(t);
      const T inverse = p.inverse_count[t * p.count_stride];
      Vector<T> total[N] = {}, squares[N] = {};
      T mean[N];
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
        for (int n = 0; n < N; ++n) total[n] += load(y[n] + b) * load(counted + b);
      }
      for (int n = 0; n < N; ++n) mean[n] = sum<T>(total[n]) * inverse;
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
        for (int n = 0; n < N; ++n) {
          const Vector<T> off = (load(y[n] + b) - mean[n]) * load(counted + b);
          squares[n] += off * off;
        }
      }
      for (int n = 0; n < N; ++n) {
        slot.mean[t * features + n * H + j] = mean[n];
        slot.var[t * features + n * H + j] = sum<T>(squares[n]) * inverse;
      }
    }
    for (int n = 0; n < N; ++n) to[n] = standard_at(slot, t, n * H + j, features);
  }

  std::vector<T> input, grad_input;  // [gate][unit of the group][W]
  std::vector<T> grad_out;           // [unit of the group][W]
  std::vector<T> unit;               // kUnitArrays of (W,) for the unit at hand
};

}  // namespace bnrnn
