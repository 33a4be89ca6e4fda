// The recurrence of few sequences in evaluation, such as a streamed text: without statistics of the
// batch, and without a backward pass.
//
// Vectors of sequences would be nearly empty, so states are batch-major here: a vector holds units
// of one sequence. Each thread owns a range of units, with all four gates of each. Threads exchange
// h_t, with one barrier per step, and what layer normalisation averages. H' is H rounded up to
// whole vectors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recurrence.h"

namespace bnrnn {

// With more sequences, `forward` is faster.
constexpr ptrdiff_t kFewSequences = 8;

template <typename T>
ptrdiff_t whole_vectors(ptrdiff_t hidden);  // H'

template <typename T>
struct Evaluation {
  ptrdiff_t batch, hidden;
  int threads;
  bool sums;  // as in `Problem`

  const T* weight_hh;         // (4H, H)
  const T* bias = nullptr;    // (4H,)
  const T* beta_c = nullptr;  // (H,)
  Slot<T> ih, hh, c;          // with given statistics, or layer normalisation
  T hold_cell, hold_hidden;   // zoneout: the fraction of the old state that is kept

  const int64_t* lengths = nullptr;  // (B,); finished sequences keep their states

  T* states;            // 2 (B, H'), zero beyond H: step t begins with row t % 2
  T* cells;             // (B, H')
  T* new_cells;         // (B, H'): c_t before zoneout
  T* recurrent;         // (B, 4, H'): W_h h_{t-1}
  T* packed = nullptr;  // 4 H' H elements for W_h; null: do not pack it, for a few steps
};

// Run the steps from `begin` up to `end`. `terms` has their W_x x_t, (B, 4H) each, and `output`
// takes their h_t, (B, H) each, zero for finished sequences. The steps that begin with 0 come
// first: they pack the weight.
template <typename T>
void evaluate(const Evaluation<T>& evaluation, ptrdiff_t begin, ptrdiff_t end, const T* terms,
              T* output);

}  // namespace bnrnn
