#include "evaluation.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "barrier.h"
#include "functions.h"
#include "multiply.h"
#include "share.h"

namespace bnrnn {
namespace {

// A tile of the product with the packed weight: kVectors vectors of its rows by kColumns sequences.
// found[c * kVectors + v] = the sum over k, in ascending order, for vector v and sequence c.
template <typename T, int kVectors, int kColumns>
void tile_product(const T* packed, ptrdiff_t depth, const T* states, ptrdiff_t stride,
                  Vector<T>* found) {
  constexpr int kAhead = 16;  // of k: the weight may come from beyond the second-level cache
  Vector<T> sums[kColumns][kVectors] = {};
  for (ptrdiff_t k = 0; k < depth; ++k, packed += kVectors * kLanes<T>) {
    Vector<T> left[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      left[v] = load(packed + v * kLanes<T>);
      __builtin_prefetch(packed + (kAhead * kVectors + v) * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const Vector<T> right = broadcast(states[c * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[c][v] += left[v] * right;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) found[c * kVectors + v] = sums[c][v];
  }
}

// The sums of a tile stay in registers: all gates of few sequences, or half of the gates of more.
template <int kVectors>
#if defined(__AVX512F__)
constexpr int kMostColumns = kVectors == kGates ? 6 : 8;
#else
constexpr int kMostColumns = kVectors == kGates ? 2 : 6;
#endif

template <typename T>
using TileProduct = void (*)(const T*, ptrdiff_t, const T*, ptrdiff_t, Vector<T>*);

template <typename T, int kVectors, int kColumns = kMostColumns<kVectors>>
TileProduct<T> tile_product_of(ptrdiff_t columns) {
  if constexpr (kColumns > 1) {
    if (columns < kColumns) return tile_product_of<T, kVectors, kColumns - 1>(columns);
  }
  return tile_product<T, kVectors, kColumns>;
}

// The statistics of layer normalisation of one sequence. If the slot has none, they change nothing.
template <typename T>
struct LayerMoments {
  T mean = 0, rstd = 1;

  // at(n, u) is a vector of row n of N, from unit u on.
  template <int N, typename At>
  void find(const Slot<T>& slot, ptrdiff_t hidden, At&& at) {
    if (!slot.layer) return;
    const T features = static_cast<T>(N * hidden);
    const auto total = [&](auto&& of) {
      T total = 0;
      for (int n = 0; n < N; ++n) {
        Vector<T> of_row = zero<T>();
        ptrdiff_t u = 0;
        for (; u + kLanes<T> <= hidden; u += kLanes<T>) of_row += of(at(n, u));
        if (u < hidden) {
          T rest[kLanes<T>];
          store(rest, of(at(n, u)));
          of_row += load_first(rest, static_cast<int>(hidden - u));
        }
        total += sum<T>(of_row);
      }
      return total;
    };
    mean = total([](Vector<T> y) { return y; }) / features;
    const T var = total([this](Vector<T> y) { return (y - mean) * (y - mean); }) / features;
    rstd = 1 / std::sqrt(var + slot.eps);
  }

  Vector<T> normalized(Vector<T> y) const { return (y - mean) * rstd; }
};

// How N rows of each unit, one per gate or one for the cell, are normalised: scale y + offset.
template <typename T, int N>
struct Scales {
  Scales(const Slot<T>& slot, ptrdiff_t hidden, ptrdiff_t width)
      : slot(slot), hidden(hidden), width(width), scale(N * width), offset(N * width) {}

  // Find those of a step, of a range of units, each row with its part of `bias` (N H,) in the
  // offset. Nothing is done if they are those of the step before.
  void find(ptrdiff_t t, Range units, const T* bias) {
    const bool by_statistics = slot.gamma != nullptr && !slot.layer;
    const ptrdiff_t row = by_statistics ? std::min(t, slot.rows - 1) : 0;
    if (row == known) return;
    known = row;
    for (int n = 0; n < N; ++n) {
      for (ptrdiff_t u = units.begin; u < units.end; u += kLanes<T>) {
        const int count = static_cast<int>(std::min<ptrdiff_t>(kLanes<T>, units.end - u));
        const ptrdiff_t i = n * hidden + u, of_step = row * N * hidden + i;
        Vector<T> factor = broadcast<T>(1);
        if (slot.gamma != nullptr) factor = load_first(slot.gamma + i, count);
        Vector<T> added = bias == nullptr ? zero<T>() : load_first(bias + i, count);
        if (by_statistics) {
          factor = 1 / root<T>(load_first(slot.var + of_step, count) + slot.eps) * factor;
          added -= load_first(slot.mean + of_step, count) * factor;
        }
        store(scale.data() + n * width + u, factor);
        store(offset.data() + n * width + u, added);
      }
    }
  }

  Vector<T> operator()(Vector<T> y, int n, ptrdiff_t u) const {
    return y * load(scale.data() + n * width + u) + load(offset.data() + n * width + u);
  }

 private:
  const Slot<T>& slot;
  const ptrdiff_t hidden, width;
  Rows<T> scale, offset;  // (N, H')
  ptrdiff_t known = -1;   // the row of the statistics
};

// A thread's part of a step.
template <typename T>
class Evaluator {
 public:
  Evaluator(const Evaluation<T>& evaluation, int thread, int threads)
      : e(evaluation),
        B(e.batch),
        H(e.hidden),
        width(whole_vectors<T>(H)),
        units(units_of(H, thread, threads)),
        tile_gates(B <= kMostColumns<kGates> ? kGates : kGates / 2),
        of_x(e.ih, H, width),
        of_h(e.hh, H, width),
        of_c(e.c, H, width),
        output_gates(B * width) {}

  // Pack the thread's rows of W_h, as [vector of units][tile of gates][k][gate of the tile][lane].
  void pack() const {
    if (e.packed == nullptr) return;
    for_vectors([&](ptrdiff_t u) {
      for (int gate = 0; gate < kGates; ++gate) {
        T* const to = packed_at(u, gate / tile_gates) + gate % tile_gates * kLanes<T>;
        for (ptrdiff_t k = 0; k < H; k += kLanes<T>) {
          Vector<T> block[kLanes<T>];
          for (int i = 0; i < kLanes<T>; ++i) {
            block[i] = u + i < H ? load_first(weight_at(gate, u + i) + k, count_at(k)) : zero<T>();
          }
          transpose<T>(block);
          for (int i = 0; i < count_at(k); ++i) {
            store(to + (k + i) * tile_gates * kLanes<T>, block[i]);
          }
        }
      }
    });
  }

  // W_h h_{t-1}.
  void product(ptrdiff_t t) const {
    if (e.packed == nullptr) {
      plain_product(t);
    } else if (tile_gates == kGates) {
      packed_product<kGates>(t);
    } else {
      packed_product<kGates / 2>(t);
    }
  }

  // The gates and c_t; `terms` is W_x x_t, (B, 4H).
  void put_cells(ptrdiff_t t, const T* terms) {
    of_x.find(t, units, nullptr);
    of_h.find(t, units, e.bias);
    for (ptrdiff_t b = 0; b < B; ++b) {
      if (!runs(t, b)) continue;
      const auto x_at = [&](int gate, ptrdiff_t u) {
        return load_first(terms + (b * kGates + gate) * H + u, count_at(u));
      };
      const auto h_at = [&](int gate, ptrdiff_t u) { return load(recurrent_at(b, gate) + u); };
      LayerMoments<T> x, h;
      x.template find<kGates>(e.ih, H, x_at);
      h.template find<kGates>(e.hh, H, h_at);
      for (ptrdiff_t u = units.begin; u < units.end; u += kLanes<T>) {
        Vector<T> gates[kGates];
#pragma GCC unroll 4
        for (int gate = 0; gate < kGates; ++gate) {
          const Vector<T> of_input = x_at(gate, u), of_state = h_at(gate, u);
          gates[gate] = e.sums ? of_h(of_input + of_state, gate, u)
                               : of_x(x.normalized(of_input), gate, u) +
                                     of_h(h.normalized(of_state), gate, u);
        }
        sigmoid_and_tanh<T, kCandidate>(gates);
        const ptrdiff_t i = b * width + u;
        const Vector<T> before = load(e.cells + i);
        const Vector<T> c = gates[kForget] * before + gates[kInput] * gates[kCandidate];
        store(e.new_cells + i, c);
        store(e.cells + i, held(e.hold_cell, before, c));
        store(output_gates.data() + i, gates[kOutput]);
      }
    }
  }

  // h_t, also to `output`, (B, H).
  void put_states(ptrdiff_t t, T* output) {
    of_c.find(t, units, e.beta_c);
    for (ptrdiff_t b = 0; b < B; ++b) {
      const T* const before = state_at(t, b);
      T *const after = state_at(t + 1, b), *const out = output + b * H;
      if (!runs(t, b)) {
        std::copy(before + units.begin, before + units.end, after + units.begin);
        std::fill(out + units.begin, out + units.end, T(0));
        continue;
      }
      const T *const cell = e.new_cells + b * width, *const gate = output_gates.data() + b * width;
      LayerMoments<T> c;
      c.template find<1>(e.c, H, [&](int, ptrdiff_t u) { return load(cell + u); });
      for_blocks<T>(units.size(), [&](ptrdiff_t first, auto vectors) {
        Vector<T> squashed[vectors];
        for (int i = 0; i < vectors; ++i) {
          const ptrdiff_t u = units.begin + first + i * kLanes<T>;
          squashed[i] = of_c(c.normalized(load(cell + u)), 0, u);
        }
        tanh<T>(squashed);
        for (int i = 0; i < vectors; ++i) {
          const ptrdiff_t u = units.begin + first + i * kLanes<T>;
          const Vector<T> h = held(e.hold_hidden, load(before + u), load(gate + u) * squashed[i]);
          store_first(after + u, h, count_at(u));
          store_first(out + u, h, count_at(u));
        }
      });
    }
  }

 private:
  static Range units_of(ptrdiff_t hidden, int thread, int threads) {
    const Range vectors = part({0, ceil_div(hidden, kLanes<T>)}, threads, thread);
    return {vectors.begin * kLanes<T>, std::min(vectors.end * kLanes<T>, hidden)};
  }

  // visit(u) for the vectors of the thread's units, from unit u on.
  template <typename Visit>
  void for_vectors(Visit&& visit) const {
    for (ptrdiff_t u = units.begin; u < units.end; u += kLanes<T>) visit(u);
  }

  template <int kVectors>
  void packed_product(ptrdiff_t t) const {
    const ptrdiff_t groups = ceil_div(B, kMostColumns<kVectors>);
    for_vectors([&](ptrdiff_t u) {
      for (int tile = 0; tile < kGates / kVectors; ++tile) {
        for (ptrdiff_t i = 0; i < groups; ++i) {
          const Range columns = part({0, B}, groups, i);
          Vector<T> found[kMostColumns<kVectors> * kVectors];
          tile_product_of<T, kVectors>(columns.size())(packed_at(u, tile), H,
                                                       state_at(t, columns.begin), width, found);
          for (ptrdiff_t n = 0; n < columns.size() * kVectors; ++n) {
            const int gate = tile * kVectors + static_cast<int>(n % kVectors);
            store(recurrent_at(columns.begin + n / kVectors, gate) + u, found[n]);
          }
        }
      }
    });
  }

  void plain_product(ptrdiff_t t) const {
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t j = units.begin;
      multiply_few(weight_at(gate, j), units.size(), H, state_at(t, 0), width, B,
                   recurrent_at(0, gate) + j, kGates * width);
    }
  }

  // How many of the lanes from unit u on are units.
  int count_at(ptrdiff_t u) const {
    return static_cast<int>(std::min<ptrdiff_t>(kLanes<T>, H - u));
  }

  // The expectation of zoneout, also of states that are not finite.
  static Vector<T> held(T hold, Vector<T> before, Vector<T> now) {
    return hold == 0 ? now : hold * before + (1 - hold) * now;
  }

  bool runs(ptrdiff_t t, ptrdiff_t b) const { return e.lengths == nullptr || t < e.lengths[b]; }

  const T* weight_at(int gate, ptrdiff_t j) const { return e.weight_hh + (gate * H + j) * H; }
  T* packed_at(ptrdiff_t u, int tile) const {
    return e.packed + (u * kGates + tile * tile_gates * kLanes<T>)*H;
  }
  T* state_at(ptrdiff_t t, ptrdiff_t b) const { return e.states + (t % 2 * B + b) * width; }
  T* recurrent_at(ptrdiff_t b, int gate) const { return e.recurrent + (b * kGates + gate) * width; }

  const Evaluation<T>& e;
  const ptrdiff_t B, H, width;
  const Range units;
  const int tile_gates;  // of packed_product
  Scales<T, kGates> of_x, of_h;
  Scales<T, 1> of_c;
  Rows<T> output_gates;  // (B, H')
};

}  // namespace

template <typename T>
ptrdiff_t whole_vectors(ptrdiff_t hidden) {
  return ceil_div(hidden, kLanes<T>) * kLanes<T>;
}

template <typename T>
void evaluate(const Evaluation<T>& e, ptrdiff_t begin, ptrdiff_t end, const T* terms, T* output) {
  Barrier barrier;
#pragma omp parallel num_threads(e.threads)
  {
#pragma omp single
    barrier.expect(omp_get_num_threads());
    Evaluator<T> evaluator(e, omp_get_thread_num(), omp_get_num_threads());
    if (begin == 0) evaluator.pack();
    for (ptrdiff_t t = begin; t < end; ++t) {
      evaluator.product(t);
      if (e.hh.layer) barrier.wait();
      evaluator.put_cells(t, terms + (t - begin) * e.batch * kGates * e.hidden);
      if (e.c.layer) barrier.wait();
      evaluator.put_states(t, output + (t - begin) * e.batch * e.hidden);
      barrier.wait();  // h_t is complete
    }
  }
}

template ptrdiff_t whole_vectors<float>(ptrdiff_t);
template void evaluate(const Evaluation<float>&, ptrdiff_t, ptrdiff_t, const float*, float*);

}  // namespace bnrnn
