// The recurrence of one layer and direction over all time steps, forward and backward.
//
// Dimensions: T time, B batch, D input, H hidden; W is B rounded up to whole vectors. States are
// feature-major, (H, W): the batch of one hidden unit is contiguous, so its statistics, gates and
// cell are worked out from the first-level cache right after the product that made them. Each
// thread owns a range of hidden units, all four gates of each and the whole batch; only h_t
// (forward) and the gradient of W_h h_{t-1} (backward) pass between threads, one barrier a step.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bnrnn {

// One place for normalisation. Empty where gamma is null: then the term passes unchanged.
template <typename T>
struct Slot {
  const T* gamma = nullptr;  // (features,)

  // Over the features of each sequence, instead of over sequences: see layer_norm.h.
  bool layer = false;
  T* parts = nullptr;      // 2 (H, W): what each unit adds to the statistics of the step at hand
  T* of_steps = nullptr;   // 2 (W,) of each step, the mean and 1 / sqrt(var + eps); if kept

  // Over the sequences of a batch.
  T* mean = nullptr;         // (rows, features); step t uses row min(t, rows - 1)
  T* var = nullptr;
  ptrdiff_t rows = 0;
  bool per_step = false;    // the forward pass computes row t from the batch of step t
  T eps = 0;
  T* grad_gamma = nullptr;  // (features,)
};

// What each element of a state is multiplied by at each step: one of two numbers where there is a mask,
// else `no`.
template <typename T>
struct Factor {
  const uint8_t* mask = nullptr;  // (T, H, B), or (H, B) for all steps
  ptrdiff_t stride = 0;           // from step to step
  T yes = 0, no = 0;
  bool is_constant(T value) const { return mask == nullptr && no == value; }
};

template <typename T>
struct Problem {
  ptrdiff_t steps, batch, width, hidden, input_size;
  int threads;
  bool keep;  // for a backward pass: keep every step, not just the current one

  // Whether hh normalises W_h h_{t-1} + W_x x_t, and ih nothing: then `recurrent` is that sum,
  // and the backward pass needs no input term.
  bool sums = false;

  // The input term W_x x_t, one of three:
  const T* term = nullptr;         // (T, B, 4H), computed already
  const int64_t* index = nullptr;  // (T, B) one-hot inputs, with columns (D, 4H): W_x transposed
  const T* columns = nullptr;
  const T* narrow = nullptr;  // (T, D, W) with few features, and weight_ih (4H, D)
  const T* weight_ih = nullptr;
  // Whole-sequence statistics of the input term; null: per step, given or none.
  const T* sequence_weights = nullptr;  // of the rows of term (T * B) or of columns (D)
  T sequence_total = 0;                 // their sum

  const T* weight_hh;        // (4H, H)
  const T* bias = nullptr;   // (4H,)
  const T* beta_c = nullptr;  // (H,)
  Slot<T> ih, hh, c;

  // Rows of W, one for each step or one for all (stride 0).
  const T* live;              // 1: this sequence still runs; 0: it keeps h and c
  const T* counted;           // 1: it counts in per-step statistics
  const T* inverse_count;     // 1 / the sum of counted, an element a step or one for all
  ptrdiff_t mask_stride, count_stride;

  // How much of the old state zoneout keeps, and what dropout multiplies tanh(g) and, within
  // W_h h_{t-1}, h_{t-1} by.
  Factor<T> hold_cell, hold_hidden;
  Factor<T> candidate_factor{nullptr, 0, 0, 1}, hidden_factor{nullptr, 0, 0, 1};

  // keep: (T, 4H, W), (T + 1, H, W), (T + 1, H, W). Else (4H, W), (2, H, W), (1, H, W).
  T* recurrent;  // W_h h_{t-1}, normalised if hh is a layer's; see `sums`
  T* states;     // h_{t-1}, the last one h_n
  T* cells;      // c_{t-1}, the last one c_n

  T* output = nullptr;  // (T, B, H)

  // Backward.
  const T* grad_output = nullptr;  // (T, B, H)
  // The gradients of W_h h_{t-1} of some steps, until they are added to the gradient of W_h; see
  // weight_gradient.h.
  T* grad_recurrent = nullptr;  // (4H, gradient_row(B))
  T* grad_state = nullptr;         // (H, W): of h_n, at the end of h_0
  // Where `hidden_factor` is no constant, grad_state has what comes back through the product alone, yet
  // to be multiplied by it, and this the rest.
  T* grad_around = nullptr;        // (H, W): of h_n
  T* grad_cell = nullptr;          // (H, W): of c_n, at the end of c_0
  T* grad_term = nullptr;          // (T, B, 4H)
  T* grad_columns = nullptr;       // (D, 4H), zero at first
  T* grad_weight_ih = nullptr;     // (4H, D), zero at first
  T* grad_weight_hh = nullptr;     // (4H, columns of grad_weight_hh)
  ptrdiff_t grad_weight_columns = 0;  // H rounded up to whole vectors
  T* grad_bias = nullptr;             // (4H,), zero at first
  T* grad_beta_c = nullptr;           // (H,), zero at first

  T* packed;  // W_h as products.h packs it: packed_size(...)
  // The right operand of a step's product and of the next one's: h_{t-1}, 2 (H, W), or in the
  // backward pass the gradient of W_h h_{t-1}, 2 (4H, W); laid out as in products.h.
  T* panels;
};

// Elements of the packed copy of W_h, for either pass.
ptrdiff_t packed_size(ptrdiff_t hidden, int threads);

// Elements of a row of `grad_recurrent`.
template <typename T>
ptrdiff_t gradient_row(ptrdiff_t batch);

int lanes(bool is_double);

template <typename T>
void forward(const Problem<T>& problem);

template <typename T>
void backward(const Problem<T>& problem);

}  // namespace bnrnn
