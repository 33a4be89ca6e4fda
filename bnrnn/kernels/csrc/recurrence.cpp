// The two loops over the time steps. In the notation of reference.py, for each hidden unit and
// sequence, with the gates i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o) and g = tanh(z_g):
//
//   z       = BN(W_x x_t; γ_x, b) + BN(W_h h_{t-1}; γ_h, 0)    or BN(W_h h_{t-1} + W_x x_t; γ_h, b)
//   c_t     = f c_{t-1} + i g
//   y       = BN(c_t; γ_c, β_c)
//   h_t     = o tanh(y)
//
// Backward, from the last step to the first; ∂v is the gradient of the loss with respect to v:
//
//   ∂h_t    += ∂output_t
//   ∂y       = ∂h_t o (1 - tanh²(y))           ∂z_o = ∂h_t tanh(y) o (1 - o)
//   ∂c_t    += BN'(∂y)
//   ∂z_i     = ∂c_t g i (1 - i)                ∂z_f = ∂c_t c_{t-1} f (1 - f)
//   ∂z_g     = ∂c_t i (1 - g²)                 ∂c_{t-1} = ∂c_t f
//   ∂(W_x x_t)     = BN'(∂z)                   ∂(W_h h_{t-1}) = BN'(∂z)
//   ∂h_{t-1} = W_h^T ∂(W_h h_{t-1})            ∂W_h = Σ_t ∂(W_h h_{t-1}) h_{t-1}^T
//
// For a term v that is normalised to v̂ = (v - mean) / sqrt(var + ε) and scaled to γ v̂ + β,
//
//   BN'(∂)   = γ / sqrt(var + ε) (∂ - mean(∂) - v̂ mean(∂ v̂))      with batch statistics
//   BN'(∂)   = γ / sqrt(var + ε) ∂                                 with given statistics
//   ∂γ       = Σ ∂ v̂                           ∂β = Σ ∂
//
// For a normalised sum, ∂(W_x x_t) = ∂(W_h h_{t-1}) = BN'(∂z). LN' has γ inside the means, which
// are over the features (layer_norm.h). The factors of zoneout and dropout (reference.py) are the
// same in both passes.
//
// The backward pass recomputes the gates and v̂ from W_h h_{t-1}, which the forward pass keeps. If
// the sum is normalised, the forward pass adds the product to the input term in the same array.
#include "recurrence.h"

#include <omp.h>

#include <vector>

#include "barrier.h"
#include "sequence.h"
#include "step.h"
#include "weight_gradient.h"

namespace bnrnn {
namespace {

template <typename T, bool kFamily>
void forward_steps(Step<T, kFamily>& step, Barrier& barrier) {
  const Problem<T>& p = step.p;
  const ptrdiff_t H = step.H, W = step.W;
  if (p.batch > 1 && step.packs()) {
    step.for_groups([&](Range group, T* panel) {
      pack(panel, kGates * group.size(), H, [&](ptrdiff_t row, ptrdiff_t k) {
        return p.weight_hh[step.feature(group, row) * H + k];
      });
    });
  }
  if (step.has_input_product() && step.packs()) {
    step.for_groups([&](Range group, T* panel) {
      pack(step.packed_ih + (panel - step.packed) / H * p.input_size, kGates * group.size(),
           p.input_size, [&](ptrdiff_t row, ptrdiff_t d) {
             return p.weight_ih[step.feature(group, row) * p.input_size + d];
           });
    });
  }
  if (p.whole_sequence) {
    // The statistics need the input terms of all steps.
    for (ptrdiff_t t = 0; step.has_input_product() && t < p.steps; ++t) {
      step.put_input(t);
      barrier.wait();
      step.for_groups([&](Range group, T* panel) { step.input_product(t, group, panel); });
    }
    sequence_moments(step);
  } else {
    step.put_input(0);
  }
  for (ptrdiff_t j = step.units.begin; j < step.units.end; ++j) step.put_state(0, j);
  step.laps.lap(Part::kPacking);
  const auto products = [&](ptrdiff_t t, Range group, T* panel) {
    T* rows[kGates * kGroup];
    for (ptrdiff_t row = 0; row < kGates * group.size(); ++row) {
      rows[row] = step.recurrent_at(t) + step.feature(group, row) * W;
    }
    if (step.has_input_product() && !p.whole_sequence) step.input_product(t, group, panel);
    if (p.sums) step.input_term(t, group);
    step.laps.lap(Part::kInputTerm);
    if (p.batch > 1) {
      step.product(group, p.weight_hh, panel, H, step.panel_at(t, H), rows, p.sums);
    } else {
      for (ptrdiff_t row = 0; row < kGates * group.size(); ++row) {
        const T* weights = p.weight_hh + step.feature(group, row) * H;
        if (!p.sums) store(rows[row], zero<T>());
        rows[row][0] += dot(weights, step.panel_at(t, H), H);
      }
    }
    step.laps.lap(Part::kProduct);
    if (!p.sums) step.input_term(t, group);
    step.laps.lap(Part::kInputTerm);
  };
  for (ptrdiff_t t = 0; t < p.steps; ++t) {
    barrier.wait();  // h_{t-1} is complete
    step.laps.lap(Part::kBarrier);
    if (!kFamily || !step.apart) {
      step.for_groups([&](Range group, T* panel) {
        products(t, group, panel);
        for (ptrdiff_t j = group.begin; j < group.end; ++j) {
          step.forward_cell(t, group, j);
          step.laps.lap(Part::kCell);
          step.forward_state(t, j);
          step.laps.lap(Part::kState);
        }
        step.put_output(t, group);
        step.laps.lap(Part::kOutput);
      });
      if (!p.whole_sequence) step.put_input(t + 1);
      continue;
    }
    step.for_groups([&](Range group, T* panel) {
      products(t, group, panel);
      for (ptrdiff_t j = group.begin; j < group.end; ++j) step.forward_parts(t, group, j);
    });
    if (p.ih.layer || p.hh.layer) barrier.wait();
    step.layer_ih.find(t), step.layer_hh.find(t);
    step.for_units([&](Range group, ptrdiff_t j) { step.forward_cell(t, group, j); });
    if (p.c.layer) barrier.wait();
    step.layer_c.find(t);
    step.for_groups([&](Range group, T*) {
      for (ptrdiff_t j = group.begin; j < group.end; ++j) step.forward_state(t, j);
      step.put_output(t, group);
    });
    if (!p.whole_sequence) step.put_input(t + 1);
  }
}

template <typename T, bool kFamily>
void backward_steps(Step<T, kFamily>& step, Barrier& barrier) {
  const Problem<T>& p = step.p;
  const ptrdiff_t H = step.H, W = step.W, features = kGates * H;
  const Range units = step.units;
  pack(step.packed, units.size(), features, [&](ptrdiff_t row, ptrdiff_t k) {
    return p.weight_hh[k * H + units.begin + row];
  });
  std::vector<T*> rows(units.size());
  for (ptrdiff_t j = units.begin; j < units.end; ++j) {
    rows[j - units.begin] = p.grad_state + j * W;
  }
  // Whether backward_state writes to grad_state a part that does not pass through W_h.
  const bool around =
      !step.drops_hidden() && (p.mask_stride != 0 || !p.hold_hidden.is_constant(0));
  if (p.grad_input != nullptr) {
    pack(step.packed_ih, step.inputs.size(), features, [&](ptrdiff_t row, ptrdiff_t k) {
      return p.weight_ih[k * p.input_size + step.inputs.begin + row];
    });
  }
  auto of_weight_hh = recurrent_weight_gradient(step);
  auto of_weight_ih = input_weight_gradient(step);
  step.laps.lap(Part::kPacking);
  for (ptrdiff_t t = p.steps - 1; t >= 0; --t) {
    if (kFamily) step.layer_ih.recall(t), step.layer_hh.recall(t), step.layer_c.recall(t);
    if (!kFamily || !step.apart) {
      step.for_groups([&](Range group, T*) {
        step.get_grad_output(t, group);
        step.laps.lap(Part::kOutput);
        p.sums ? step.no_input_term(group) : step.input_term(t, group);
        step.laps.lap(Part::kInputTerm);
        for (ptrdiff_t j = group.begin; j < group.end; ++j) {
          step.backward_state(t, group, j);
          step.laps.lap(Part::kBackwardState);
          step.backward_cell(t, group, j);
          step.laps.lap(Part::kBackwardCell);
          step.backward_terms(t, group, j);
          step.laps.lap(Part::kBackwardTerms);
        }
        step.put_grad_input(t, group);
        step.laps.lap(Part::kGradInput);
      });
    } else {
      step.for_groups([&](Range group, T*) {
        step.get_grad_output(t, group);
        p.sums ? step.no_input_term(group) : step.input_term(t, group);
        for (ptrdiff_t j = group.begin; j < group.end; ++j) step.backward_state(t, group, j);
      });
      if (p.c.layer) barrier.wait();
      step.layer_c.find_gradient();
      step.for_units([&](Range group, ptrdiff_t j) { step.backward_cell(t, group, j); });
      if (p.ih.layer || p.hh.layer) barrier.wait();
      step.layer_ih.find_gradient(), step.layer_hh.find_gradient();
      step.for_groups([&](Range group, T*) {
        for (ptrdiff_t j = group.begin; j < group.end; ++j) step.backward_terms(t, group, j);
        step.put_grad_input(t, group);
      });
    }
    barrier.wait();  // the gradient of W_h h_{t-1} is complete
    step.laps.lap(Part::kBarrier);
    packed_product(
        step.packed, units.size(), features, step.panel_at(t, features), W, rows.data(), around);
    step.laps.lap(Part::kBackwardProduct);
    of_weight_hh.add(t);
    step.laps.lap(Part::kWeightGradient);
    if (p.whole_sequence) continue;  // its gradient needs the sums over all steps
    step.put_grad_dense(t);
    of_weight_ih.add(t);
    step.laps.lap(Part::kGradInput);
  }
  step.complete_grad_state();
  if (!p.whole_sequence) return;
  sequence_gradient(step);
  if (p.dense == nullptr) return;
  barrier.wait();  // the gradient of all W_x x_t is complete
  for (ptrdiff_t t = p.steps - 1; t >= 0; --t) {
    step.put_grad_dense(t);
    of_weight_ih.add(t);
  }
}

template <bool kFamily, typename T, typename Run>
void in_parallel(const Problem<T>& problem, Run&& run) {
  Barrier barrier;
#pragma omp parallel num_threads(problem.threads)
  {
    // OpenMP may start fewer threads than requested.
#pragma omp single
    barrier.expect(omp_get_num_threads());
    Step<T, kFamily> step(problem, omp_get_thread_num(), omp_get_num_threads());
    run(step, barrier);
  }
}

}  // namespace

ptrdiff_t packed_size(ptrdiff_t rows, ptrdiff_t depth, int threads) {
  // An upper bound for any number of threads up to this one.
  return (packed_rows(rows) + threads * packed_rows(1)) * depth;
}

ptrdiff_t backward_panels(ptrdiff_t batch) {
  return std::max<ptrdiff_t>(2, steps_a_block(batch));
}

int lanes(bool is_double) { return is_double ? kLanes<double> : kLanes<float>; }

template <typename T>
void forward(const Problem<T>& problem) {
  if (has_layer(problem) || has_noise(problem)) {
    in_parallel<true>(problem, forward_steps<T, true>);
  } else {
    in_parallel<false>(problem, forward_steps<T, false>);
  }
}

template <typename T>
void backward(const Problem<T>& problem) {
  if (has_layer(problem) || has_noise(problem)) {
    in_parallel<true>(problem, backward_steps<T, true>);
  } else {
    in_parallel<false>(problem, backward_steps<T, false>);
  }
}

template void forward(const Problem<float>&);
template void forward(const Problem<double>&);
template void backward(const Problem<float>&);
template void backward(const Problem<double>&);

}  // namespace bnrnn
