// How the terms of a group of hidden units are normalised: what is the same for all sequences.
#pragma once

#include "share.h"

namespace bnrnn {

// BN(y; gamma, 0) = gamma y_hat = scale y + offset, with y_hat = rstd y + shift, for N rows of each
// unit, one per gate or one for the cell. They are computed for many units at once, because a root
// and a division take as long for a vector as for a number.
template <typename T, int N>
struct Standards {
  T rstd[N][kGroup], shift[N][kGroup], gamma[N][kGroup], scale[N][kGroup], offset[N][kGroup];

  // Of an empty slot y_hat is y, and likewise of layer normalisation, whose y is y_hat already.
  void find(const Slot<T>& slot, ptrdiff_t t, Range group, ptrdiff_t units) {
    const ptrdiff_t row = std::min(t, slot.rows - 1) * N * units;
    for (int n = 0; n < N; ++n) {
      for_vectors(group, [&](ptrdiff_t u, int count) {
        const ptrdiff_t feature = n * units + group.begin + u;
        const Vector<T> one = broadcast<T>(1);
        const Vector<T> g = slot.gamma == nullptr ? one : load_first(slot.gamma + feature, count);
        Vector<T> r = one, s = zero<T>();
        if (slot.gamma != nullptr && !slot.layer) {
          r = 1 / root<T>(load_first(slot.var + row + feature, count) + slot.eps);
          s = -load_first(slot.mean + row + feature, count) * r;
        }
        store(rstd[n] + u, r), store(shift[n] + u, s), store(gamma[n] + u, g);
        store(scale[n] + u, r * g), store(offset[n] + u, s * g);
      });
    }
  }

  Vector<T> hat(int n, ptrdiff_t u, Vector<T> y) const { return y * rstd[n][u] + shift[n][u]; }

  // visit(u, count) for each vector of the group's units.
  template <typename Visit>
  static void for_vectors(Range group, Visit&& visit) {
    for (ptrdiff_t u = 0; u < group.size(); u += kLanes<T>) {
      visit(u, static_cast<int>(std::min<ptrdiff_t>(kLanes<T>, group.size() - u)));
    }
  }
};

}  // namespace bnrnn
