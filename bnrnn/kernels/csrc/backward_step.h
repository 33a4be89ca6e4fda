// The backward pass of one time step, a group of units at a time. The equations are at the head of
// recurrence.cpp.
#pragma once

#include "bf16_gradient.h"
#include "step.h"

namespace bnrnn {

template <typename T, bool kGeneral>
class BackwardStep : public Step<T, kGeneral> {
 public:
  using Base = Step<T, kGeneral>;
  using Base::p, Base::H, Base::W, Base::units, Base::inputs, Base::cell_at, Base::live_at;
  using Base::counted_at, Base::panel_at, Base::input_panel_at, Base::is_lone, Base::row_of;
  using Base::layout, Base::input_layout, Base::drops_hidden, Base::input_term, Base::apart;
  using Base::scalar_input, Base::one_hot_input, Base::layer_ih, Base::layer_hh, Base::layer_c;

  BackwardStep(const Problem<T>& problem, int thread, int threads)
      : Base(problem, thread, threads, false),
        bf16_of_recurrent(*this, p.bf16 && p.grad_weight_hh != nullptr),
        bf16_of_input(
            *this, p.bf16_input() && p.dense != nullptr && !p.sums && p.grad_weight_ih != nullptr),
        grad_out(units.size() * W),
        kept_rows(at_hand * kRowsKept * W),
        kept_sums((at_hand + kGroup) * kSumsKept) {}

  // Find how the group's terms and cell states were normalised at step t.
  void find_all_standards(ptrdiff_t t, Range group) {
    find_standards(t, group);
    of_c.find(p.c, t, group, H);
  }

  // Prepare `input` for the backward pass. If `sums`, `recurrent` contains the term already.
  void input_term_again(ptrdiff_t t, Range group) {
    if (!p.sums) input_term(t, group);
  }

  // Read the group's part of the output gradient into `grad_out`.
  void get_grad_output(ptrdiff_t t, Range group) {
    if (p.grad_output == nullptr) return;
    T* const rows = grad_out_row(group.begin);
    transpose_in<T>(
        group.size(), p.batch, W,
        [&](ptrdiff_t b) {
          const T* const row = p.grad_output + (t * p.batch + b) * H + group.begin;
          if (t > 0) prefetch<false>(row - p.batch * H, group.size());  // of the next step
          return row;
        },
        [&](ptrdiff_t u, ptrdiff_t b, Vector<T> grad) { store(rows + u * W + b, grad); });
  }

  // The gradients at step t follow the equations at the head of recurrence.cpp. This is the first
  // part, from h_t to the normalised cell state.
  void backward_state(ptrdiff_t t, Range group) {
    Vector<T> of_y[kGroup] = {}, of_y_hat[kGroup] = {};
    for (ptrdiff_t j = group.begin; j < group.end; ++j) {
      const ptrdiff_t u = j - group.begin;
      backward_state(t, group, j, of_y[u], of_y_hat[u]);
    }
    T *const sums = sums_of(kSumOfY, group), *const sums_hat = sums_of(kSumOfYHat, group);
    sum<T>(of_y, sums), sum<T>(of_y_hat, sums_hat);
    for (ptrdiff_t j = group.begin; j < group.end; ++j) {
      const ptrdiff_t u = j - group.begin;
      if (p.grad_beta_c != nullptr) p.grad_beta_c[j] += sums[u];
      if (p.c.grad_gamma != nullptr) p.c.grad_gamma[j] += sums_hat[u];
    }
    if (!kGeneral || !layer_c.active) return;
    layer_c.put_gradient(group, {kept_row(kOfY, group.begin, group)}, kRowsKept * W,
                         {kept_row(kCellHat, group.begin, group)}, kRowsKept * W, of_c.gamma);
  }

  // The second part: from the cell state to the gradients of the gates' arguments.
  void backward_cell(ptrdiff_t t, Range group) {
    Vector<T> totals[kSumOfY][kGroup] = {};
    for (ptrdiff_t j = group.begin; j < group.end; ++j) backward_cell(t, group, j, totals);
    for (int k = 0; k < kSumOfY; ++k) {
      const bool is_wanted = k < kSumOfXHat || (k < kSumOfHHat ? wants_x_hat() : wants_h_hat());
      if (is_wanted) sum<T>(totals[k], sums_of(k, group));
    }
    for (int gate = 0; gate < kGates; ++gate) {
      const T* const of_z = sums_of(kSumOfZ + gate, group);
      const T* const of_x_hat = sums_of(kSumOfXHat + gate, group);
      const T* const of_h_hat = sums_of(kSumOfHHat + gate, group);
      for (ptrdiff_t j = group.begin; j < group.end; ++j) {
        const ptrdiff_t k = gate * H + j, u = j - group.begin;
        p.grad_bias[k] += of_z[u];
        if (scalar_input.is_given()) {
          scalar_input.add_gradients(gate, group, u, of_z[u], of_x_hat[u]);
        } else if (p.ih.grad_gamma != nullptr) {
          p.ih.grad_gamma[k] += of_x_hat[u];
        }
        if (p.hh.grad_gamma != nullptr) p.hh.grad_gamma[k] += of_h_hat[u];
      }
    }
    if (!kGeneral || !(p.ih.layer || p.hh.layer)) return;
    T *x[kGates], *h[kGates], *const dz = kept_row(kOfGates, group.begin, group);
    terms(t, group, group.begin, x, h);
    const auto put = [&](auto& layer, T* const(&y)[kGates], const T(&gamma)[kGates][kGroup]) {
      layer.put_gradient(group, {dz, dz + W, dz + 2 * W, dz + 3 * W}, kRowsKept * W,
                         {y[0], y[1], y[2], y[3]}, W, gamma);
    };
    if (layer_ih.active) put(layer_ih, x, of_x.gamma);
    if (layer_hh.active) put(layer_hh, h, of_h.gamma);
    scalar_input.add_spread(group, {dz, dz + W, dz + 2 * W, dz + 3 * W}, kRowsKept * W, of_x);
  }

  // The third part: from the gates' arguments to the products.
  void backward_terms(ptrdiff_t t, Range group) {
    for (ptrdiff_t j = group.begin; j < group.end; ++j) backward_terms(t, group, j);
  }

  // After the last product: apply the dropout to obtain the complete gradient of h_{t-1}.
  void complete_grad_state() {
    if (!drops_hidden()) return;
    for (ptrdiff_t j = units.begin; j < units.end; ++j) {
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
        store(p.grad_state + j * W + b, grad_of_state(j, b));
      }
    }
  }

  // Add the gradient of W_x x_t, or of the sum, from `input` to that of W_x; not if the input is
  // dense.
  void put_grad_input(ptrdiff_t t, Range group) {
    if (p.dense != nullptr || scalar_input.is_given()) return;
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + group.begin;
      const T* const rows = input_row(gate, group.begin, group);
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
        one_hot_input.add_gradient(t, gate, group, rows);
      }
    }
  }

  // The thread's part of the gradient of a dense input: W_x^T times the gradient of W_x x_t.
  void put_grad_dense(ptrdiff_t t) {
    if (p.grad_input == nullptr || t == p.steps) return;
    grad_dense.resize(inputs.size() * W);
    this->transposed_product(t, this->packed_ih, input_layout, p.centres_input(),
                             input_panel_at(t, kGates * H), inputs.size(), grad_dense.data(),
                             false);
    transpose_out<T>(
        inputs.size(), p.batch, rows_at(grad_dense.data()),
        [&](ptrdiff_t b, ptrdiff_t d, int n, Vector<T> grad) {
          store_first(p.grad_input + (t * p.batch + b) * p.input_size + inputs.begin + d, grad, n);
        });
  }

  Bf16Gradient<T> bf16_of_recurrent, bf16_of_input;

 private:
  using Base::terms, Base::rows_at, Base::activate, Base::beta_of;
  using Base::input_row, Base::row, Base::input, Base::at_hand;
  using Base::find_standards, Base::of_x, Base::of_h, Base::of_c, Base::offset;

  // The rows (W,) that a unit keeps between the parts of a step: its gates, later the gradients of
  // their arguments, the gradient of y, and the normalised cell state.
  enum { kOfGates, kOfY = kGates, kCellHat, kRowsKept };
  // The sums over the batch that it keeps: of ∂z, ∂z x̂ and ∂z ĥ of each gate, of ∂y and ∂y ĉ.
  enum {
    kSumOfZ,
    kSumOfXHat = kGates,
    kSumOfHHat = 2 * kGates,
    kSumOfY = 3 * kGates,
    kSumOfYHat,
    kSumsKept
  };
  T* kept_row(int i, ptrdiff_t j, Range group) {
    return kept_rows.data() + (row(j, group) * kRowsKept + i) * W;
  }

  // Whether the sums with x̂, or with ĥ, are needed.
  bool wants_x_hat() const { return p.ih.gamma != nullptr || scalar_input.is_given(); }
  bool wants_h_hat() const { return p.hh.gamma != nullptr; }

  // A sum of each unit of the group.
  T* sums_of(int k, Range group) {
    return kept_sums.data() + k * (at_hand + kGroup) + row(group.begin, group);
  }

  T* grad_out_row(ptrdiff_t j) { return grad_out.data() + (j - units.begin) * W; }

  void backward_state(ptrdiff_t t, Range group, ptrdiff_t j, Vector<T>& sum_y,
                      Vector<T>& sum_y_hat) {
    const ptrdiff_t W = this->W, u = j - group.begin;
    const T beta = beta_of(j);
    T *x[kGates], *h[kGates];
    terms(t, group, j, x, h);
    if (kGeneral && layer_ih.active && p.term == nullptr) {  // a kept term is normalised already
      for (int gate = 0; gate < kGates; ++gate) layer_ih.normalize(x[gate]);
    }
    T* const gates = kept_row(kOfGates, j, group);
    const T *c_before = cell_at(t) + j * W, *live = live_at(t);
    T* const around = (drops_hidden() ? p.grad_around : p.grad_state) + j * W;
    const T* const out = grad_out_row(j);
    T *const dy = kept_row(kOfY, j, group), *const c_hat = kept_row(kCellHat, j, group);
    const FactorRow<T> candidate_factor = row_of(p.candidate_factor, t, j);
    const FactorRow<T> hold = row_of(p.hold_hidden, t, j);
    const bool layer = kGeneral && layer_c.active;
    // Recompute the gates and c_t.
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      Vector<T> gate_of[kGates];
#pragma GCC unroll 4
      for (int gate = 0; gate < kGates; ++gate) {
        gate_of[gate] = load(x[gate] + b) * of_x.scale[gate][u] +
                        (load(h[gate] + b) * of_h.scale[gate][u] + offset[gate][u]);
      }
      activate(gate_of);
#pragma GCC unroll 4
      for (int gate = 0; gate < kGates; ++gate) store(gates + gate * W + b, gate_of[gate]);
      Vector<T> g = gate_of[kCandidate];
      if (kGeneral) g *= candidate_factor(b);
      const Integers<T> runs = load(live + b) != 0;
      const Vector<T> before = load(c_before + b);
      const Vector<T> c = runs ? gate_of[kForget] * before + gate_of[kInput] * g : before;
      const Vector<T> hat = layer ? layer_c.normalized(c, b) : of_c.hat(0, u, c);
      store(c_hat + b, hat);
    }

    // From h̃_t = o tanh(y), y = gamma_c c_hat + beta_c, to the gradients of y and o.
    Vector<T> total = zero<T>(), total_hat = zero<T>();
    for_blocks<T>(W, [&](ptrdiff_t first, auto vectors) {
      Vector<T> squashed[vectors];
      for (int i = 0; i < vectors; ++i) {
        squashed[i] = load(c_hat + first + i * kLanes<T>) * of_c.gamma[0][u] + beta;
      }
      tanh<T>(squashed);
      for (int i = 0; i < vectors; ++i) {
        const ptrdiff_t b = first + i * kLanes<T>;
        const Vector<T> o = load(gates + kOutput * W + b);
        const Integers<T> runs = load(live + b) != 0;
        Vector<T> grad = grad_of_state(j, b);
        const Vector<T> of_finished = grad;  // a finished sequence passes its gradient on
        if (p.grad_output != nullptr) grad += load(out + b);
        Vector<T> kept = zero<T>();
        if (kGeneral) {
          kept = grad * hold(b);
          grad -= kept;
        }
        store(around + b, runs ? kept : of_finished);
        grad = runs ? grad : zero<T>();
        const Vector<T> of_y = grad * o * (1 - squashed[i] * squashed[i]);
        total += of_y;
        total_hat += of_y * load(c_hat + b);
        store(gates + kOutput * W + b, grad * squashed[i] * o * (1 - o));
        store(dy + b, of_y);
      }
    });
    sum_y = total, sum_y_hat = total_hat;
  }

  // From c̃_t = f c_{t-1} + i g to the gradients of the gates' arguments, which replace the gates.
  // In a finished sequence c_t is c_{t-1}, so its gates have no gradient; but if it counts in the
  // statistics, its c has the gradient that comes through them.
  void backward_cell(ptrdiff_t t, Range group, ptrdiff_t j, Vector<T> (&totals)[kSumOfY][kGroup]) {
    const ptrdiff_t W = this->W, u = j - group.begin;
    const T *c_before = cell_at(t) + j * W, *live = live_at(t), *counted = counted_at(t);
    const T *const dy = kept_row(kOfY, j, group), *const c_hat = kept_row(kCellHat, j, group);
    T* const dc = p.grad_cell + j * W;
    const T c_inverse = p.c.per_step ? inverse_count(t) : 0;
    const T mean_y = sums_of(kSumOfY, group)[u] * c_inverse;
    const T mean_y_hat = sums_of(kSumOfYHat, group)[u] * c_inverse;
    T* const gates = kept_row(kOfGates, j, group);
    T *x[kGates], *h[kGates];
    terms(t, group, j, x, h);
    const FactorRow<T> candidate_factor = row_of(p.candidate_factor, t, j);
    const FactorRow<T> hold = row_of(p.hold_cell, t, j);
    const bool layer = kGeneral && layer_c.active;
    const bool of_x_hat = wants_x_hat(), of_h_hat = wants_h_hat();
    Vector<T> sum_z[kGates] = {}, sum_x[kGates] = {}, sum_h[kGates] = {};
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> m = load(counted + b);
      const Integers<T> runs = load(live + b) != 0;
      const Vector<T> through =
          layer ? layer_c.gradient(load(dy + b), load(c_hat + b), of_c.gamma[0][u], b)
                : (load(dy + b) - m * (mean_y + load(c_hat + b) * mean_y_hat)) * of_c.scale[0][u];
      Vector<T> of_c_t = load(dc + b), kept = zero<T>();
      if (kGeneral) {
        kept = runs ? of_c_t * hold(b) : kept;
        of_c_t -= kept;
      }
      of_c_t += through;
      const Vector<T> grad = runs ? of_c_t : zero<T>();
      const Vector<T> i = load(gates + kInput * W + b), f = load(gates + kForget * W + b);
      const Vector<T> g = load(gates + kCandidate * W + b);
      const Vector<T> factor = kGeneral ? candidate_factor(b) : broadcast<T>(1);
      const Vector<T> onward = of_c_t * f;
      store(dc + b, runs ? (kGeneral ? onward + kept : onward) : of_c_t);
      const Vector<T> of_g = kGeneral ? grad * (g * factor) : grad * g;
      const Vector<T> of_i = kGeneral ? grad * i * factor : grad * i;
      const Vector<T> of_z[kGates] = {of_g * i * (1 - i), grad * load(c_before + b) * f * (1 - f),
                                      of_i * (1 - g * g), load(gates + kOutput * W + b)};
#pragma GCC unroll 4
      for (int gate = 0; gate < kGates; ++gate) {
        store(gates + gate * W + b, of_z[gate]);
        sum_z[gate] += of_z[gate];
        if (of_x_hat) sum_x[gate] += of_z[gate] * of_x.hat(gate, u, load(x[gate] + b));
        if (of_h_hat) sum_h[gate] += of_z[gate] * of_h.hat(gate, u, load(h[gate] + b));
      }
    }
    for (int gate = 0; gate < kGates; ++gate) {
      totals[kSumOfZ + gate][u] = sum_z[gate];
      totals[kSumOfXHat + gate][u] = sum_x[gate];
      totals[kSumOfHHat + gate][u] = sum_h[gate];
    }
  }

  // From z = BN(W_x x_t) + BN(W_h h_{t-1}) + b to the gradients of the two products. That of the
  // input term goes to its panel if the input is dense, and else replaces the normalised values.
  void backward_terms(ptrdiff_t t, Range group, ptrdiff_t j) {
    const ptrdiff_t W = this->W, u = j - group.begin;
    const T inverse = inverse_count(t), *counted = counted_at(t);
    T *x[kGates], *h[kGates], *const panel = panel_at(t, kGates * H);
    terms(t, group, j, x, h);
    const bool layer_x = kGeneral && layer_ih.active, layer_h = kGeneral && layer_hh.active,
               is_sum = p.sums;
    const bool scalar = scalar_input.is_given();
    const T x_inverse = p.ih.per_step ? inverse : 0, h_inverse = p.hh.per_step ? inverse : 0;
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t k = gate * H + j;
      const T total = sums_of(kSumOfZ + gate, group)[u];
      const T mean_x = total * x_inverse, mean_h = total * h_inverse;
      const T mean_x_hat = sums_of(kSumOfXHat + gate, group)[u] * x_inverse;
      const T mean_h_hat = sums_of(kSumOfHHat + gate, group)[u] * h_inverse;
      // The gradient through whole-sequence statistics needs sums over all steps: see sequence.h.
      const T x_scale = p.whole_sequence ? 1 : of_x.scale[gate][u];
      const T h_scale = of_h.scale[gate][u];
      T* const of_input_row = input_row(gate, j, group);
      T* const of_dense = p.dense != nullptr && !is_sum ? input_panel_at(t, kGates * H) : nullptr;
      T* const dz = kept_row(kOfGates + gate, j, group);
      const auto of_product = [&](ptrdiff_t b) {
        const Vector<T> of_z = load(dz + b), hat = of_h.hat(gate, u, load(h[gate] + b));
        return layer_h ? layer_hh.gradient(of_z, hat, of_h.gamma[gate][u], b)
                       : (of_z - load(counted + b) * (mean_h + hat * mean_h_hat)) * h_scale;
      };
      const auto of_input = [&](ptrdiff_t b) {
        if (is_sum) return of_product(b);
        const Vector<T> of_z = load(dz + b), hat = of_x.hat(gate, u, load(x[gate] + b));
        return layer_x ? layer_ih.gradient(of_z, hat, of_x.gamma[gate][u], b)
                       : (of_z - load(counted + b) * (mean_x + hat * mean_x_hat)) * x_scale;
      };
      if (of_dense != nullptr && !input_layout.bf16) {
        input_layout.put_row(of_dense, kGates * H, k, of_input);
      } else if (!scalar) {
        for (ptrdiff_t b = 0; b < W; b += kLanes<T>) store(of_input_row + b, of_input(b));
      }
      if (p.bf16) {
        for (ptrdiff_t b = 0; b < W; b += kLanes<T>) store(dz + b, of_product(b));
        put_bf16_gradient(t, panel, k, dz, bf16_of_recurrent.row(t, gate, j), p.centres_hidden());
      } else if (p.hh.gamma == nullptr) {
        layout.put_row(panel, kGates * H, k, [&](ptrdiff_t b) { return load(dz + b); });
      } else {
        layout.put_row(panel, kGates * H, k, of_product);
      }
      if (of_dense != nullptr && input_layout.bf16) {
        put_bf16_gradient(t, of_dense, k, of_input_row, bf16_of_input.row(t, gate, j),
                          p.centres_input());
      }
    }
  }

  // Write row k of the gradient of a term to its panel and, if wanted, to `left`. The gradient of a
  // term that is normalised over the batch sums to zero. Rounding leaves a remainder, which the
  // steps before would amplify wherever all sequences are nearly alike. So the panel gets it,
  // divided among the sequences that count, in the columns after the batch, and the product
  // subtracts it.
  void put_bf16_gradient(ptrdiff_t t, T* panel, ptrdiff_t k, const T* row, Bf16* left,
                         bool centres) {
    const ptrdiff_t blocks = bf16_blocks(kGates * H);
    Vector<T> total = zero<T>();
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> gradient = load(row + b);
      put_bf16_right<T>(bf16_right_at(as_bf16(panel), blocks, k, b), k, gradient);
      if (left != nullptr) put_bf16_left<T>(bf16_along(left, b), gradient);
      total += rounded_to_bf16<T>(gradient);
    }
    if (!centres) return;
    const T remainder = sum<T>(total) * inverse_count(t);
    put_bf16_split(bf16_right_at(as_bf16(panel), blocks, k, W), k, static_cast<float>(remainder));
  }

  // The gradient of the hidden state between two steps, from all later steps. All steps have the
  // same mask.
  Vector<T> grad_of_state(ptrdiff_t j, ptrdiff_t b) const {
    const Vector<T> grad = load(p.grad_state + j * W + b);
    if (!drops_hidden()) return grad;
    return grad * row_of(p.hidden_factor, 0, j)(b) + load(p.grad_around + j * W + b);
  }

  T inverse_count(ptrdiff_t t) const {
    return is_lone(t) ? 0 : p.inverse_count[t * p.count_stride];
  }

  Rows<T> grad_out;    // [unit][W]
  Rows<T> grad_dense;  // [input][W]
  Rows<T> kept_rows;   // [unit][kRowsKept][W]
  Rows<T> kept_sums;   // [kSumsKept][unit]
};

}  // namespace bnrnn
