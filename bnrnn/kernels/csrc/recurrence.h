// The recurrence of one layer and direction over all time steps, forward and backward.
//
// Dimensions: T time, B batch, D input, H hidden; W is B rounded up to whole vectors. States are
// feature-major, (H, W): the batch of one hidden unit is contiguous, so its statistics, gates and
// cell are computed in the first-level cache right after the product. Each thread owns a range of
// hidden units, with all four gates of each and the whole batch. Threads exchange only h_t and x_t,
// in the backward pass also the gradients of W_h h_{t-1} and W_x x_t, with one barrier per step.
//
// Few sequences in evaluation have a pass of their own: see evaluation.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bnrnn {

// Up to this many input features, computing W_x x_t twice is cheaper than keeping it.
constexpr ptrdiff_t kNarrow = 4;

// The hidden units whose layer statistics are summed by one thread, regardless of the number of
// threads: see layer_norm.h.
constexpr ptrdiff_t kLayerPart = 4;
constexpr ptrdiff_t layer_parts(ptrdiff_t hidden) { return (hidden + kLayerPart - 1) / kLayerPart; }

// The normalisation of one term. If gamma is null the slot is empty and the term is not changed.
template <typename T>
struct Slot {
  const T* gamma = nullptr;  // (features,)

  // Layer normalisation: statistics over the features of each sequence, see layer_norm.h.
  bool layer = false;
  T* parts = nullptr;     // 2 (layer_parts(H), W): sums over few units at the current step
  T* of_steps = nullptr;  // 2 (W,) per step, the mean and 1 / sqrt(var + eps); if kept

  // Batch normalisation: statistics over the sequences of a batch.
  T* mean = nullptr;  // (rows, features); step t uses row min(t, rows - 1)
  T* var = nullptr;
  ptrdiff_t rows = 0;
  bool per_step = false;  // the forward pass computes row t from the batch of step t
  T eps = 0;
  T* grad_gamma = nullptr;  // (features,)
};

// The factor of each element of a state at each step: `yes` or `no` according to the mask, or `no`
// everywhere if there is no mask.
template <typename T>
struct Factor {
  const uint8_t* mask = nullptr;  // (T, H, B), or (H, B) for all steps
  ptrdiff_t stride = 0;           // between steps
  T yes = 0, no = 0;
  bool is_constant(T value) const { return mask == nullptr && no == value; }
};

template <typename T>
struct Problem {
  ptrdiff_t steps, batch, width, hidden, input_size;
  int threads;
  bool keep;  // keep every step for a backward pass, not just the current one

  // Whether the factors of the products are rounded to bfloat16 (bfloat16.h), for T = float and
  // more than one sequence; of the products with W_x, only if their statistics are not those of the
  // whole sequence, whose gradients pass through the panels twice.
  bool bf16 = false;
  bool bf16_input() const { return bf16 && !whole_sequence; }
  // Whether h_{t-1} and x_t are rounded relative to their mean over the batch. The batch
  // normalisation of their term sees only the differences between the sequences, which can be
  // smaller than the rounding errors of the values themselves. The forward pass multiplies the mean
  // by the weight, too, as a further vector of columns of the panels: W_h h = W_h (h - mean) + W_h
  // mean. In the gradient of the weight, the mean has no part: the gradients of such a term sum to
  // zero. The backward pass sees to it that they still do when they are rounded
  // (BackwardStep::put_bf16_gradient).
  bool centres_hidden() const { return bf16 && hh.gamma != nullptr && hh.per_step; }
  bool centres_input() const { return bf16_input() && (sums ? hh : ih).per_step; }
  ptrdiff_t panel_width = 0;  // of `panels` and `input_panels`: W, or with that vector

  // Whether W_h h_{t-1} + W_x x_t is one term, which hh normalises, if anything does; ih is empty.
  // `recurrent` is then that sum, and the backward pass needs no input term.
  bool sums = false;

  // The input, in one of three forms:
  // (T, B) symbols, a one-hot input. W_x has the element of a symbol and a feature (of 4H) at
  // columns[symbol * symbol_stride + feature * feature_stride]. With few symbols, the elements of
  // one feature are contiguous; otherwise those of one symbol. Either way, a step touches few cache
  // lines.
  const int64_t* index = nullptr;
  const T* columns = nullptr;
  ptrdiff_t symbol_stride = 0, feature_stride = 0;
  const T* narrow = nullptr;     // (T, D, W), an input of few features, with weight_ih
  const T* dense = nullptr;      // (T, B, D), an input of many features, with weight_ih
  const T* weight_ih = nullptr;  // (4H, D)
  // The term W_x x_t of a dense input: (T, 4H, W), or (4H, W) if term_stride is 0. If ih is layer
  // normalisation, the forward pass normalises it in place. Null if `sums`.
  T* term = nullptr;
  ptrdiff_t term_stride = 0;  // between steps
  // Instead of it, that of a lone sequence, (T, 4H), is given: its product reads W_x only once.
  const T* lone_term = nullptr;

  // Whether the statistics of the input term are those of the batch over the whole sequence.
  bool whole_sequence = false;
  const T* symbol_weights = nullptr;  // (D,): with index, how often each symbol occurs
  T sequence_total = 0;               // the number of frames

  const T* weight_hh;         // (4H, H)
  const T* bias = nullptr;    // (4H,)
  const T* beta_c = nullptr;  // (H,)
  Slot<T> ih, hh, c;

  // Rows of W elements, one per step or one for all steps (stride 0).
  const T* live;           // 1: this sequence still runs; 0: it keeps h and c
  const T* counted;        // 1: this sequence counts in per-step statistics
  const T* inverse_count;  // 1 / the sum of counted, one per step or one for all steps
  ptrdiff_t mask_stride, count_stride;

  // Zoneout: the fraction of the old state that is kept. Dropout: the factors of tanh(g), and of
  // h_{t-1} within W_h h_{t-1}.
  Factor<T> hold_cell, hold_hidden;
  Factor<T> candidate_factor{nullptr, 0, 0, 1}, hidden_factor{nullptr, 0, 0, 1};

  // With keep: (T, 4H, W), (T + 1, H, W), (T + 1, H, W). Else none, (2, H, W), (1, H, W).
  T* recurrent;  // W_h h_{t-1}, normalised if hh is layer normalisation; see `sums`
  T* states;     // h_{t-1}; the last row is h_n
  T* cells;      // c_{t-1}; the last row is c_n

  T* output = nullptr;  // (T, B, H)

  // Backward.
  const T* grad_output = nullptr;  // (T, B, H)
  T* grad_state = nullptr;         // (H, W): initially for h_n, finally for h_0
  // If `hidden_factor` is not constant, grad_state holds only the part that comes through the
  // product and still lacks that factor; grad_around holds the rest.
  T* grad_around = nullptr;   // (H, W): initially for h_n
  T* grad_cell = nullptr;     // (H, W): initially for c_n, finally for c_0
  T* grad_input = nullptr;    // (T, B, D), if dense
  T* grad_columns = nullptr;  // laid out like `columns`, initially zero
  // (4H, D), initially zero; if dense, with D rounded up to whole vectors
  T* grad_weight_ih = nullptr;
  T* grad_spread = nullptr;     // (H,) zeros, if `ih` has layer normalisation of one feature
  T* grad_weight_hh = nullptr;  // (4H, H), with H rounded up to whole vectors
  // The right operands of these two gradients if they are products, each 2 right_size elements,
  // initially zero if `bf16`.
  T *right_hh = nullptr, *right_ih = nullptr;
  T* grad_bias = nullptr;    // (4H,), initially zero
  T* grad_beta_c = nullptr;  // (H,), initially zero

  // W_h and, if the input is dense, W_x as products.h or bfloat16.h packs them: packed_size(H, H)
  // and packed_size(H, D) elements, or in the backward pass packed_size(D, H).
  T *packed, *packed_ih = nullptr;
  // The right operands of the products of some steps, laid out as in products.h or bfloat16.h:
  // h_{t-1}, (H, W), or in the backward pass the gradient of W_h h_{t-1}, (4H, W). Each takes
  // panel_size elements, initially zero if `bf16`.
  T* panels;
  ptrdiff_t panel_count;  // 2, or in the backward pass backward_panels(B)
  // The same for a dense input: x_t, (D, W), or the gradient of W_x x_t, (4H, W), of all steps if
  // `whole_sequence`. If `sums`, those of the gradient are the panels above.
  T* input_panels = nullptr;
  ptrdiff_t input_panel_count = 0;
};

// Number of elements of the packed copy of a weight with four times `rows` rows in total.
ptrdiff_t packed_size(ptrdiff_t rows, ptrdiff_t depth, int threads, bool bf16);

// Number of elements of a right operand (depth, width).
ptrdiff_t panel_size(ptrdiff_t depth, ptrdiff_t width, bool bf16);

ptrdiff_t backward_panels(ptrdiff_t batch);

// Number of elements of the right operand of a weight's gradient (4H, columns), for a block of
// steps.
ptrdiff_t right_size(ptrdiff_t batch, ptrdiff_t columns, bool bf16);

int lanes(bool is_double);

template <typename T>
void forward(const Problem<T>& problem);

template <typename T>
void backward(const Problem<T>& problem);

}  // namespace bnrnn
