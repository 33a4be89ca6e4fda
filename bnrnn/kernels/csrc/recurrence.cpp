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
// the two terms are one, the forward pass adds the product to the input term in the same array.
#include "recurrence.h"

#include <omp.h>

#include <type_traits>
#include <vector>

#include "backward_step.h"
#include "barrier.h"
#include "forward_step.h"
#include "sequence.h"
#include "weight_gradient.h"

namespace bnrnn {
namespace {

// Pack the thread's rows of W_h, and of W_x for a dense input.
template <typename T>
void pack_weights(const Share<T>& share) {
  const Problem<T>& p = share.p;
  if (!share.packs()) return;
  const auto pack_rows = [&](const T* weight, T* packed, ptrdiff_t depth,
                             const RightLayout<T>& layout) {
    share.for_groups([&](Range group) {
      const ptrdiff_t n = group.size();
      T* const to = share.packed_of(packed, group, depth, layout);
      const T* rows[kGates * kGroup];
      for (ptrdiff_t row = 0; row < kGates * n; ++row) {
        rows[row] = weight + share.feature(group, row) * depth;
      }
      const auto at = [&](ptrdiff_t row, ptrdiff_t k) { return rows[row][k]; };
      if (!layout.bf16) return pack(to, kGates * n, depth, layout.tile_rows, at);
      for (int gate = 0; gate < kGates; ++gate) {
        pack_bf16(as_bf16(to) + gate * bf16_blocks(depth) * kBf16Block, n, depth,
                  [&](ptrdiff_t u, ptrdiff_t k) { return at(gate * n + u, k); });
      }
    });
  };
  if (p.batch > 1) pack_rows(p.weight_hh, share.packed, share.H, share.layout);
  if (share.has_input_product()) {
    pack_rows(p.weight_ih, share.packed_ih, p.input_size, share.input_layout);
  }
}

// Find the statistics of the input term over all steps, which needs this term of all steps.
template <typename T, bool kGeneral>
void find_sequence_moments(ForwardStep<T, kGeneral>& step, Barrier& barrier) {
  for (ptrdiff_t t = 0; step.has_input_product() && t < step.p.steps; ++t) {
    step.put_input(t);
    barrier.wait();
    step.for_groups([&](Range group) { step.input_product(t, group); });
  }
  sequence_moments<T>(step);
}

// The two terms of one group of units, or their sum. W_x x_t of a dense input is there already.
template <typename T, bool kGeneral>
void forward_products(ForwardStep<T, kGeneral>& step, ptrdiff_t t, Range group) {
  const Problem<T>& p = step.p;
  if (p.sums) step.input_term(t, group);
  step.laps.lap(Part::kInputTerm);
  step.recurrent_product(t, group);
  step.laps.lap(Part::kProduct);
  if (!p.sums) step.input_term(t, group);
  step.laps.lap(Part::kInputTerm);
}

template <typename T, bool kGeneral>
void forward_step(ForwardStep<T, kGeneral>& step, ptrdiff_t t) {
  step.for_groups([&](Range group) {
    forward_products(step, t, group);
    step.forward_moments(t, group);
    step.laps.lap(Part::kMoments);
    step.forward_cell(t, group);
    step.laps.lap(Part::kCell);
    step.forward_cell_moments(t, group);
    step.forward_state(t, group);
    step.laps.lap(Part::kState);
  });
}

// With layer normalisation: see `Step`.
template <typename T>
void forward_step_apart(ForwardStep<T, true>& step, ptrdiff_t t, Barrier& barrier) {
  const Problem<T>& p = step.p;
  step.for_groups([&](Range group) {
    forward_products(step, t, group);
    step.forward_parts(t, group);
    step.laps.lap(Part::kMoments);
  });
  if (step.layer_ih.active || step.layer_hh.active) barrier.wait();
  step.laps.lap(Part::kBarrier);
  step.layer_ih.find(t), step.layer_hh.find(t);
  step.for_groups([&](Range group) {
    step.forward_moments(t, group);
    step.laps.lap(Part::kMoments);
    step.forward_cell(t, group);
    step.laps.lap(Part::kCell);
  });
  if (p.c.layer) barrier.wait();
  step.laps.lap(Part::kBarrier);
  step.layer_c.find(t);
  step.for_groups([&](Range group) {
    step.forward_cell_moments(t, group);
    step.forward_state(t, group);
    step.laps.lap(Part::kState);
  });
}

// W_x x_t of a dense input, for all units of the thread.
template <typename T, bool kGeneral>
void input_products(ForwardStep<T, kGeneral>& step, ptrdiff_t t) {
  const Problem<T>& p = step.p;
  if (t == p.steps || !step.has_input_product() || p.whole_sequence) return;
  step.for_groups([&](Range group) { step.input_product(t, group); });
  step.laps.lap(Part::kInputTerm);
}

template <typename T, bool kGeneral>
void forward_steps(ForwardStep<T, kGeneral>& step, Barrier& barrier) {
  const Problem<T>& p = step.p;
  pack_weights(step);
  if (p.whole_sequence) {
    find_sequence_moments(step, barrier);
  } else {
    step.put_input(0), step.put_input(1);
  }
  for (ptrdiff_t j = step.units.begin; j < step.units.end; ++j) step.put_state(0, j);
  step.laps.lap(Part::kPacking);
  barrier.wait();  // x_0 is complete
  step.laps.lap(Part::kBarrier);
  input_products(step, 0);
  unsigned round = barrier.arrive();
  for (ptrdiff_t t = 0; t < p.steps; ++t) {
    barrier.wait(round);  // h_{t-1} and x_{t+1} are complete
    step.laps.lap(Part::kBarrier);
    step.scalar_input.find(t);
    if constexpr (kGeneral) {
      step.apart ? forward_step_apart(step, t, barrier) : forward_step(step, t);
    } else {
      forward_step(step, t);
    }
    if (!p.whole_sequence) step.put_input(t + 2);
    step.laps.lap(Part::kInputTerm);
    round = barrier.arrive();  // what follows needs no h_t of other threads
    step.for_groups([&](Range group) { step.put_output(t, group); });
    step.laps.lap(Part::kOutput);
    input_products(step, t + 1);
  }
  finish_streams();
}

// From the gradient of h_t to those of W_h h_{t-1} and W_x x_t.
template <typename T, bool kGeneral>
void backward_step(BackwardStep<T, kGeneral>& step, ptrdiff_t t) {
  step.for_groups([&](Range group) {
    step.input_term_again(t, group);
    step.find_all_standards(t, group);
    step.laps.lap(Part::kInputTerm);
    step.backward_state(t, group);
    step.laps.lap(Part::kBackwardState);
    step.backward_cell(t, group);
    step.laps.lap(Part::kBackwardCell);
    step.backward_terms(t, group);
    step.laps.lap(Part::kBackwardTerms);
    step.put_grad_input(t, group);
    step.laps.lap(Part::kGradInput);
  });
}

template <typename T>
void backward_step_apart(BackwardStep<T, true>& step, ptrdiff_t t, Barrier& barrier) {
  const Problem<T>& p = step.p;
  step.for_groups([&](Range group) {
    step.input_term_again(t, group);
    step.find_all_standards(t, group);
    step.laps.lap(Part::kInputTerm);
    step.backward_state(t, group);
    step.laps.lap(Part::kBackwardState);
  });
  if (p.c.layer) barrier.wait();
  step.laps.lap(Part::kBarrier);
  step.layer_c.find_gradient();
  step.for_groups([&](Range group) {
    step.find_all_standards(t, group);
    step.backward_cell(t, group);
    step.laps.lap(Part::kBackwardCell);
  });
  if (step.layer_ih.active || step.layer_hh.active) barrier.wait();
  step.laps.lap(Part::kBarrier);
  step.layer_ih.find_gradient(), step.layer_hh.find_gradient();
  step.for_groups([&](Range group) {
    step.find_all_standards(t, group);
    step.backward_terms(t, group);
    step.laps.lap(Part::kBackwardTerms);
    step.put_grad_input(t, group);
    step.laps.lap(Part::kGradInput);
  });
}

template <typename T, bool kGeneral>
void backward_steps(BackwardStep<T, kGeneral>& step, Barrier& barrier) {
  const Problem<T>& p = step.p;
  const ptrdiff_t features = kGates * step.H;
  step.pack_transposed(p.weight_hh, step.H, step.units, step.packed, step.layout);
  // Whether backward_state writes to grad_state a part that does not pass through W_h.
  const bool around = !step.drops_hidden() && (p.mask_stride != 0 || !p.hold_hidden.is_constant(0));
  if (p.grad_input != nullptr) {
    step.pack_transposed(p.weight_ih, p.input_size, step.inputs, step.packed_ih, step.input_layout);
  }
  auto of_weight_hh = recurrent_weight_gradient(step, step.bf16_of_recurrent);
  auto of_weight_ih =
      input_weight_gradient(step, p.sums ? step.bf16_of_recurrent : step.bf16_of_input);
  const auto get_grad_output = [&](ptrdiff_t t) {
    if (t < 0) return;
    step.for_groups([&](Range group) { step.get_grad_output(t, group); });
    step.laps.lap(Part::kOutput);
  };
  step.laps.lap(Part::kPacking);
  get_grad_output(p.steps - 1);
  for (ptrdiff_t t = p.steps - 1; t >= 0; --t) {
    step.scalar_input.find(t);
    if constexpr (kGeneral) {
      step.layer_ih.recall(t), step.layer_hh.recall(t), step.layer_c.recall(t);
      step.apart ? backward_step_apart(step, t, barrier) : backward_step(step, t);
    } else {
      backward_step(step, t);
    }
    of_weight_hh.put(t);
    if (!p.whole_sequence) of_weight_ih.put(t);
    step.laps.lap(Part::kWeightGradient);
    const unsigned round = barrier.arrive();  // what follows needs no gradient of step t
    get_grad_output(t - 1);
    if (!p.whole_sequence) step.put_grad_dense(t + 1);
    step.laps.lap(Part::kGradInput);
    barrier.wait(round);  // the gradient of W_h h_{t-1} is complete
    step.laps.lap(Part::kBarrier);
    step.transposed_product(t, step.packed, step.layout, p.centres_hidden(),
                            step.panel_at(t, features), step.units.size(),
                            p.grad_state + step.units.begin * step.W, around);
    step.laps.lap(Part::kBackwardProduct);
    of_weight_hh.add(t);
    step.laps.lap(Part::kWeightGradient);
    if (p.whole_sequence) continue;  // its gradient needs the sums over all steps
    of_weight_ih.add(t);
    step.laps.lap(Part::kGradInput);
  }
  step.complete_grad_state();
  if (!p.whole_sequence) return step.put_grad_dense(0);
  sequence_gradient(step);
  if (p.dense == nullptr) return;
  for (ptrdiff_t t = p.steps - 1; t >= 0; --t) {
    of_weight_ih.put(t);
    barrier.wait();  // the gradient of all W_x x_t is complete, too
    step.put_grad_dense(t);
    of_weight_ih.add(t);
  }
}

// Whether there is code without layer normalisation and noise. In double precision, which is for
// checks, compiling it would take longer than it saves.
template <typename T>
constexpr bool kHasFastCode = std::is_same_v<T, float>;

template <typename T>
bool needs_general_code(const Problem<T>& problem) {
  return !kHasFastCode<T> || has_layer(problem) || has_noise(problem);
}

template <typename Step, typename T, typename Run>
void in_parallel(const Problem<T>& problem, Run&& run) {
  Barrier barrier;
#pragma omp parallel num_threads(problem.threads)
  {
    // OpenMP may start fewer threads than requested.
#pragma omp single
    barrier.expect(omp_get_num_threads());
    const Bf16Products bf16_products(problem.bf16);
    Step step(problem, omp_get_thread_num(), omp_get_num_threads());
    run(step, barrier);
  }
}

}  // namespace

ptrdiff_t packed_size(ptrdiff_t rows, ptrdiff_t depth, int threads, bool bf16) {
  // An upper bound for any number of threads up to this one.
  return packed_part(rows, depth, bf16) + 2 * threads * packed_part(1, depth, bf16);
}

ptrdiff_t panel_size(ptrdiff_t depth, ptrdiff_t width, bool bf16) {
  return (bf16 ? bf16_blocks(depth) * kBf16Depth / 2 : depth) * width;
}

ptrdiff_t backward_panels(ptrdiff_t batch) {
  return std::max<ptrdiff_t>(3, steps_per_block(batch));
}

ptrdiff_t right_size(ptrdiff_t batch, ptrdiff_t columns, bool bf16) {
  const ptrdiff_t steps = steps_per_block(batch);
  const ptrdiff_t width = ceil_div(columns, kLanes<float>) * kLanes<float>;
  if (bf16) return panel_size(steps * bf16_blocks(batch) * kBf16Depth, width, true);
  return steps * batch * width;
}

int lanes(bool is_double) { return is_double ? kLanes<double> : kLanes<float>; }

template <typename T>
void forward(const Problem<T>& problem) {
  if (needs_general_code(problem)) {
    in_parallel<ForwardStep<T, true>>(problem, forward_steps<T, true>);
  } else if constexpr (kHasFastCode<T>) {
    in_parallel<ForwardStep<T, false>>(problem, forward_steps<T, false>);
  }
}

template <typename T>
void backward(const Problem<T>& problem) {
  if (needs_general_code(problem)) {
    in_parallel<BackwardStep<T, true>>(problem, backward_steps<T, true>);
    ScalarInput<T>::complete_gradient(problem);
  } else if constexpr (kHasFastCode<T>) {
    in_parallel<BackwardStep<T, false>>(problem, backward_steps<T, false>);
  }
}

template void forward(const Problem<float>&);
template void forward(const Problem<double>&);
template void backward(const Problem<float>&);
template void backward(const Problem<double>&);

}  // namespace bnrnn
