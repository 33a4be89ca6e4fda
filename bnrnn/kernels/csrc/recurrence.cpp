#include "recurrence.h"

#include <omp.h>

#if !defined(_WIN32)
#include <sched.h>
#endif

#include <atomic>
#include <cmath>
#include <vector>

#include "products.h"

namespace bnrnn {
namespace {

constexpr int kGates = 4;
constexpr int kGroup = 16;  // hidden units worked on together

// All threads wait for the last. It spins only briefly, then lets others run: on a machine that
// is shared, waiting must not take the processor from whom it waits for.
class Barrier {
 public:
  void expect(int threads) { threads_ = threads; }

  void wait() {
    if (threads_ == 1) return;
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
#if !defined(_WIN32)
        sched_yield();
#endif
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  int threads_ = 1;
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

// What turns a term y into BN(y; gamma, 0): (y - mean) * rstd * gamma.
template <typename T>
struct Standard {
  T mean = 0, rstd = 1, gamma = 1;
  T scale() const { return rstd * gamma; }
};

template <typename T>
Standard<T> standard_at(const Slot<T>& slot, ptrdiff_t t, ptrdiff_t feature,
                        ptrdiff_t features) {
  if (slot.gamma == nullptr) return {};
  const ptrdiff_t i = std::min(t, slot.rows - 1) * features + feature;
  return {slot.mean[i], 1 / std::sqrt(slot.var[i] + slot.eps), slot.gamma[feature]};
}

// Rows of H elements that a thread of so many units needs for its packed part of W_h: tiles are
// padded at the end of each group in the forward pass, and at the end of its units in the backward.
ptrdiff_t packed_rows(ptrdiff_t units) {
  return kGates * units + (ceil_div(units, kGroup) + kGates) * kTileRows;
}

// One thread's share of the problem.
template <typename T>
class Worker {
 public:
  Worker(const Problem<T>& problem, Barrier& barrier, int thread, int threads)
      : p(problem), barrier(barrier), H(p.hidden), W(p.width),
        units(part({0, H}, threads, thread)),
        groups(ceil_div(units.size(), kGroup)),
        packed(p.packed + thread * packed_rows(ceil_div(H, threads)) * H) {
    input.resize(kGates * kGroup * W);
    grad_input.resize(kGates * kGroup * W);
    grad_out.resize(kGroup * W);
    unit.resize(kUnitArrays * W);
  }

  void forward() {
    if (p.batch > 1) {
      for_groups([&](Range group, T* panel) {
        pack(panel, kGates * group.size(), H, [&](ptrdiff_t row, ptrdiff_t k) {
          return p.weight_hh[feature(group, row) * H + k];
        });
      });
    }
    if (p.sequence_weights != nullptr) sequence_moments();
    for (ptrdiff_t j = units.begin; j < units.end; ++j) put_state(0, j);
    for (ptrdiff_t t = 0; t < p.steps; ++t) {
      barrier.wait();  // h_{t-1} is whole
      for_groups([&](Range group, T* panel) {
        T* rows[kGates * kGroup];
        for (ptrdiff_t row = 0; row < kGates * group.size(); ++row) {
          rows[row] = recurrent_at(t) + feature(group, row) * W;
        }
        if (p.batch > 1) {
          packed_product(panel, kGates * group.size(), H, panel_at(t, H), W, rows, false);
        } else {
          for (ptrdiff_t row = 0; row < kGates * group.size(); ++row) {
            const T* weights = p.weight_hh + feature(group, row) * H;
            store(rows[row], zero<T>());
            rows[row][0] = dot(weights, panel_at(t, H), H);
          }
        }
        input_term(t, group);
        for (ptrdiff_t j = group.begin; j < group.end; ++j) forward_unit(t, group, j);
        put_output(t, group);
      });
    }
  }

  void backward() {
    const ptrdiff_t features = kGates * H;
    pack(packed, units.size(), features, [&](ptrdiff_t row, ptrdiff_t k) {
      return p.weight_hh[k * H + units.begin + row];
    });
    std::vector<T*> rows(units.size());
    for (ptrdiff_t j = units.begin; j < units.end; ++j) {
      rows[j - units.begin] = p.grad_state + j * W;
    }
    for (ptrdiff_t t = p.steps - 1; t >= 0; --t) {
      for_groups([&](Range group, T*) {
        get_grad_output(t, group);
        input_term(t, group);
        for (ptrdiff_t j = group.begin; j < group.end; ++j) backward_unit(t, group, j);
        put_grad_input(t, group);
      });
      barrier.wait();  // the gradient of W_h h_{t-1} is whole
      // backward_unit left in grad_state what does not pass through W_h.
      packed_product(
          packed, units.size(), features, panel_at(t, features), W, rows.data(),
          p.mask_stride != 0);
    }
    if (p.sequence_weights != nullptr) sequence_gradient();
    grad_weight_hh();
  }

 private:
  static constexpr int kUnitArrays = 14;

  T* recurrent_at(ptrdiff_t t) const { return p.recurrent + (p.keep ? t * kGates * H * W : 0); }
  T* state_at(ptrdiff_t t) const { return p.states + (p.keep ? t : t % 2) * H * W; }
  T* cell_at(ptrdiff_t t) const { return p.cells + (p.keep ? t * H * W : 0); }
  const T* live_at(ptrdiff_t t) const { return p.live + t * p.mask_stride; }
  const T* counted_at(ptrdiff_t t) const { return p.counted + t * p.mask_stride; }

  // Two take turns: a fast thread may write the next step's while a slow one still reads this one's.
  T* panel_at(ptrdiff_t t, ptrdiff_t depth) const { return p.panels + t % 2 * depth * W; }

  void put_state(ptrdiff_t t, ptrdiff_t j) const {
    const T* state = state_at(t) + j * W;
    if (p.batch == 1) {
      panel_at(t, H)[j] = *state;
      return;
    }
    pack_right_row(panel_at(t, H), H, W, j, [&](ptrdiff_t b) { return load(state + b); });
  }

  // Of the rows of a group, gate after gate: which feature of 4H.
  ptrdiff_t feature(Range group, ptrdiff_t row) const {
    return row / group.size() * H + group.begin + row % group.size();
  }

  template <typename Visit>
  void for_groups(Visit&& visit) const {
    T* panel = packed;
    for (ptrdiff_t i = 0; i < groups; ++i) {
      const Range group = part(units, groups, i);
      visit(group, panel);
      panel += whole_tiles(kGates * group.size()) * H;
    }
  }

  T* input_row(std::vector<T>& of, int gate, ptrdiff_t u) {
    return of.data() + (gate * kGroup + u) * W;
  }

  // Row (t, b) of the input term, if it need not be computed from few features.
  const T* term_row(ptrdiff_t t, ptrdiff_t b) const {
    const ptrdiff_t i = t * p.batch + b;
    return p.index != nullptr ? p.columns + p.index[i] * kGates * H : p.term + i * kGates * H;
  }

  // to[u][b] = from(b)[u] for the `count` units of a group: a batch-major array turned.
  template <typename From>
  void turn(ptrdiff_t count, T* to, From&& from) const {
    constexpr int lanes = kLanes<T>;
    for (ptrdiff_t b0 = 0; b0 < W; b0 += lanes) {
      for (ptrdiff_t u0 = 0; u0 < count; u0 += lanes) {
        const int n = static_cast<int>(std::min<ptrdiff_t>(lanes, count - u0));
        Vector<T> block[lanes];
        for (int i = 0; i < lanes; ++i) {
          block[i] = b0 + i < p.batch ? load_first(from(b0 + i) + u0, n) : zero<T>();
        }
        transpose<T>(block);
        for (int i = 0; i < n; ++i) store(to + (u0 + i) * W + b0, block[i]);
      }
    }
  }

  // visit(b, u0, count, vector): the other way, vectors of the units of one batch row.
  template <typename Visit>
  void turn_back(ptrdiff_t count, const T* from, Visit&& visit) const {
    constexpr int lanes = kLanes<T>;
    for (ptrdiff_t b0 = 0; b0 < p.batch; b0 += lanes) {
      for (ptrdiff_t u0 = 0; u0 < count; u0 += lanes) {
        const int n = static_cast<int>(std::min<ptrdiff_t>(lanes, count - u0));
        Vector<T> block[lanes];
        for (int i = 0; i < lanes; ++i) {
          block[i] = i < n ? load(from + (u0 + i) * W + b0) : zero<T>();
        }
        transpose<T>(block);
        for (int i = 0; i < lanes && b0 + i < p.batch; ++i) visit(b0 + i, u0, n, block[i]);
      }
    }
  }

  // The group's rows of W_x x_t into `input`.
  void input_term(ptrdiff_t t, Range group) {
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + group.begin;
      if (p.narrow == nullptr) {
        turn(group.size(), input_row(input, gate, 0),
             [&](ptrdiff_t b) { return term_row(t, b) + first; });
        continue;
      }
      const T* x = p.narrow + t * p.input_size * W;
      for (ptrdiff_t u = 0; u < group.size(); ++u) {
        const T* weights = p.weight_ih + (first + u) * p.input_size;
        T* row = input_row(input, gate, u);
        for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
          Vector<T> total = load(x + b) * weights[0];
          for (ptrdiff_t d = 1; d < p.input_size; ++d) total += load(x + d * W + b) * weights[d];
          store(row + b, total);
        }
      }
    }
  }

  // Mean and variance of y (W,) over the counted rows, if it is this pass that computes them.
  Standard<T> standardize(const Slot<T>& slot, ptrdiff_t t, ptrdiff_t i, ptrdiff_t features,
                          const T* y) const {
    if (slot.gamma != nullptr && slot.per_step) {
      const T* counted = counted_at(t);
      const T inverse = p.inverse_count[t * p.count_stride];
      Vector<T> total = zero<T>();
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) total += load(y + b) * load(counted + b);
      const T mean = sum<T>(total) * inverse;
      total = zero<T>();
      for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
        const Vector<T> off = (load(y + b) - mean) * load(counted + b);
        total += off * off;
      }
      slot.mean[t * features + i] = mean;
      slot.var[t * features + i] = sum<T>(total) * inverse;
    }
    return standard_at(slot, t, i, features);
  }

  void forward_unit(ptrdiff_t t, Range group, ptrdiff_t j) {
    const ptrdiff_t u = j - group.begin;
    Standard<T> of_x[kGates], of_h[kGates];
    const T *x[kGates], *h[kGates];
    T bias[kGates];
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t i = gate * H + j;
      x[gate] = input_row(input, gate, u);
      h[gate] = recurrent_at(t) + i * W;
      of_x[gate] = standardize(p.ih, t, i, kGates * H, x[gate]);
      of_h[gate] = standardize(p.hh, t, i, kGates * H, h[gate]);
      bias[gate] = p.bias == nullptr ? 0 : p.bias[i];
    }
    const T *c_before = cell_at(t) + j * W, *live = live_at(t);
    T *c_after = cell_at(t + 1) + j * W, *o = unit.data();
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      Vector<T> z[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        z[gate] = (load(x[gate] + b) - of_x[gate].mean) * of_x[gate].scale() +
                  (load(h[gate] + b) - of_h[gate].mean) * of_h[gate].scale() + bias[gate];
      }
      const Vector<T> before = load(c_before + b);
      const Vector<T> c = sigmoid<T>(z[1]) * before + sigmoid<T>(z[0]) * tanh<T>(z[2]);
      const Integers<T> runs = load(live + b) != 0;
      store(c_after + b, runs ? c : before);
      store(o + b, sigmoid<T>(z[3]));
    }
    const Standard<T> of_c = standardize(p.c, t, j, H, c_after);
    const T beta = p.beta_c == nullptr ? 0 : p.beta_c[j];
    const T* h_before = state_at(t) + j * W;
    T* h_after = state_at(t + 1) + j * W;
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      const Vector<T> c = load(c_after + b);
      const Vector<T> h = load(o + b) * tanh<T>((c - of_c.mean) * of_c.scale() + beta);
      const Integers<T> runs = load(live + b) != 0;
      store(h_after + b, runs ? h : load(h_before + b));
    }
    put_state(t + 1, j);
  }

  void put_output(ptrdiff_t t, Range group) {
    const T* live = live_at(t);
    turn_back(group.size(), state_at(t + 1) + group.begin * W,
              [&](ptrdiff_t b, ptrdiff_t u0, int n, Vector<T> h) {
                T* to = p.output + (t * p.batch + b) * H + group.begin + u0;
                store_first(to, live[b] != 0 ? h : zero<T>(), n);
              });
  }

  void get_grad_output(ptrdiff_t t, Range group) {
    if (p.grad_output == nullptr) return;
    turn(group.size(), grad_out.data(), [&](ptrdiff_t b) {
      return p.grad_output + (t * p.batch + b) * H + group.begin;
    });
  }

  void backward_unit(ptrdiff_t t, Range group, ptrdiff_t j) {
    const ptrdiff_t u = j - group.begin;
    Standard<T> of_x[kGates], of_h[kGates];
    T *x[kGates], *h[kGates], *gates[kGates], *dz[kGates], *da_h[kGates], *da_x[kGates];
    T bias[kGates];
    T* free = unit.data();
    const auto array = [&] { return (free += W) - W; };
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t i = gate * H + j;
      x[gate] = input_row(input, gate, u);  // normalised in place
      h[gate] = array();
      dz[gate] = array();
      gates[gate] = gate < 3 ? array() : nullptr;
      da_h[gate] = p.grad_recurrent + (t * kGates * H + i) * W;
      da_x[gate] = input_row(grad_input, gate, u);
      of_x[gate] = standard_at(p.ih, t, i, kGates * H);
      of_h[gate] = standard_at(p.hh, t, i, kGates * H);
      bias[gate] = p.bias == nullptr ? 0 : p.bias[i];
    }
    const Standard<T> of_c = standard_at(p.c, t, j, H);
    const T beta = p.beta_c == nullptr ? 0 : p.beta_c[j];
    const T *c_before = cell_at(t) + j * W, *live = live_at(t), *counted = counted_at(t);
    T *dh = p.grad_state + j * W, *dc = p.grad_cell + j * W;
    T *dy = array(), *c_hat = array();

    // The gates again, then h_t = o tanh(y), y = gamma_c c_hat + beta_c, back to y and o.
    Vector<T> sum_y = zero<T>(), sum_y_hat = zero<T>();
    for (ptrdiff_t b = 0; b < W; b += kLanes<T>) {
      Vector<T> z[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        const T* recurrent = recurrent_at(t) + (gate * H + j) * W;
        const Vector<T> x_hat = (load(x[gate] + b) - of_x[gate].mean) * of_x[gate].rstd;
        const Vector<T> h_hat = (load(recurrent + b) - of_h[gate].mean) * of_h[gate].rstd;
        store(x[gate] + b, x_hat);
        store(h[gate] + b, h_hat);
        z[gate] = x_hat * of_x[gate].gamma + h_hat * of_h[gate].gamma + bias[gate];
      }
      const Vector<T> i = sigmoid<T>(z[0]), f = sigmoid<T>(z[1]), g = tanh<T>(z[2]);
      const Vector<T> o = sigmoid<T>(z[3]);
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
      store(gates[0] + b, i);
      store(gates[1] + b, f);
      store(gates[2] + b, g);
      store(dz[3] + b, grad * squashed * o * (1 - o));
      store(dy + b, of_y);
      store(c_hat + b, hat);
    }
    const T total_y = sum<T>(sum_y), total_y_hat = sum<T>(sum_y_hat);
    if (p.grad_beta_c != nullptr) p.grad_beta_c[j] += total_y;
    if (p.c.grad_gamma != nullptr) p.c.grad_gamma[j] += total_y_hat;

    // c_t = f c_{t-1} + i g, back to the gates' arguments. A finished sequence's c_t is c_{t-1}: its
    // gates get nothing, but where it counts in the statistics its c gets its share of them.
    const T inverse = p.inverse_count[t * p.count_stride];
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
      const Vector<T> i = load(gates[0] + b), f = load(gates[1] + b), g = load(gates[2] + b);
      store(dc + b, runs ? of_c_t * f : of_c_t);
      const Vector<T> of_z[kGates] = {
          grad * g * i * (1 - i), grad * load(c_before + b) * f * (1 - f), grad * i * (1 - g * g),
          load(dz[3] + b)};
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
      // The gradient through whole-sequence statistics needs sums over all steps: see
      // sequence_gradient.
      const T x_scale = p.sequence_weights != nullptr ? 1 : of_x[gate].scale();
      const T h_scale = of_h[gate].scale();
      pack_right_row(panel_at(t, kGates * H), kGates * H, W, k, [&](ptrdiff_t b) {
        const Vector<T> m = load(counted + b), of_z = load(dz[gate] + b);
        const Vector<T> of_product =
            (of_z - m * (mean_h + load(h[gate] + b) * mean_h_hat)) * h_scale;
        store(da_h[gate] + b, of_product);
        store(da_x[gate] + b,
              (of_z - m * (mean_x + load(x[gate] + b) * mean_x_hat)) * x_scale);
        return of_product;
      });
    }
  }

  // The gradient of W_x x_t, in `grad_input`, to where it is wanted.
  void put_grad_input(ptrdiff_t t, Range group) {
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + group.begin;
      if (p.grad_weight_ih != nullptr) {
        const T* x = p.narrow + t * p.input_size * W;
        for (ptrdiff_t u = 0; u < group.size(); ++u) {
          const T* row = input_row(grad_input, gate, u);
          for (ptrdiff_t d = 0; d < p.input_size; ++d) {
            Vector<T> total = zero<T>();
            for (ptrdiff_t b = 0; b < W; b += kLanes<T>) total += load(row + b) * load(x + d * W + b);
            p.grad_weight_ih[(first + u) * p.input_size + d] += sum<T>(total);
          }
        }
      } else if (p.grad_columns != nullptr) {
        turn_back(group.size(), input_row(grad_input, gate, 0),
                  [&](ptrdiff_t b, ptrdiff_t u0, int n, Vector<T> grad) {
                    T* to = p.grad_columns + p.index[t * p.batch + b] * kGates * H + first + u0;
                    store_first(to, load_first(to, n) + grad, n);
                  });
      } else if (p.grad_term != nullptr) {
        turn_back(group.size(), input_row(grad_input, gate, 0),
                  [&](ptrdiff_t b, ptrdiff_t u0, int n, Vector<T> grad) {
                    store_first(p.grad_term + (t * p.batch + b) * kGates * H + first + u0, grad, n);
                  });
      }
    }
  }

  // The rows that whole-sequence statistics are taken over: of `term`, or of `columns`, each
  // weighted by how often it occurs.
  ptrdiff_t sequence_rows() const {
    return p.index != nullptr ? p.input_size : p.steps * p.batch;
  }

  void sequence_moments() const {
    const T* rows = p.index != nullptr ? p.columns : p.term;
    const ptrdiff_t features = kGates * H, n = sequence_rows();
    constexpr ptrdiff_t kChunk = 64;  // partial sums keep the rounding errors of long sums small
    std::vector<T> total(units.size()), partial(units.size());
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + units.begin;
      T *mean = p.ih.mean + first, *var = p.ih.var + first;
      for (const bool squares : {false, true}) {
        std::fill(total.begin(), total.end(), T(0));
        for (ptrdiff_t begin = 0; begin < n; begin += kChunk) {
          std::fill(partial.begin(), partial.end(), T(0));
          for (ptrdiff_t row = begin; row < std::min(n, begin + kChunk); ++row) {
            const T weight = p.sequence_weights[row];
            if (weight == 0) continue;
            const T* y = rows + row * features + first;
            for (ptrdiff_t j = 0; j < units.size(); ++j) {
              const T off = squares ? (y[j] - mean[j]) * (y[j] - mean[j]) : y[j];
              partial[j] += weight * off;
            }
          }
          for (ptrdiff_t j = 0; j < units.size(); ++j) total[j] += partial[j];
        }
        T* to = squares ? var : mean;
        for (ptrdiff_t j = 0; j < units.size(); ++j) to[j] = total[j] / p.sequence_total;
      }
    }
  }

  // The steps left the gradient of the normalised input term; take it through the statistics.
  void sequence_gradient() const {
    T* grads = p.index != nullptr ? p.grad_columns : p.grad_term;
    if (grads == nullptr) return;
    const T* rows = p.index != nullptr ? p.columns : p.term;
    const ptrdiff_t features = kGates * H, n = sequence_rows();
    for (int gate = 0; gate < kGates; ++gate) {
      const ptrdiff_t first = gate * H + units.begin;
      std::vector<Standard<T>> of_x(units.size());
      for (ptrdiff_t j = 0; j < units.size(); ++j) {
        of_x[j] = standard_at(p.ih, 0, first + j, features);
      }
      for (ptrdiff_t row = 0; row < n; ++row) {
        const T* y = rows + row * features + first;
        T* grad = grads + row * features + first;
        const T share = p.sequence_weights[row] / p.sequence_total;
        for (ptrdiff_t j = 0; j < units.size(); ++j) {
          const T hat = (y[j] - of_x[j].mean) * of_x[j].rstd;
          const T off = p.grad_bias[first + j] + hat * p.ih.grad_gamma[first + j];
          grad[j] = (grad[j] - share * off) * of_x[j].scale();
        }
      }
    }
  }

  // The sum over t of (gradient of W_h h_{t-1}) h_{t-1}^T, blocked for the cache: a block of the
  // result (all gates of some units, some columns) and the panel of states stay in the second level.
  void grad_weight_hh() const {
    constexpr ptrdiff_t kUnits = 126, kColumns = 4 * kTileVectors * kLanes<T>;
    const ptrdiff_t steps_a_block = std::max<ptrdiff_t>(1, kDepth / p.batch);
    std::vector<T> panel(steps_a_block * p.batch * kColumns);
    for (ptrdiff_t j0 = units.begin; j0 < units.end; j0 += kUnits) {
      const Range some = {j0, std::min(j0 + kUnits, units.end)};
      for (ptrdiff_t k0 = 0; k0 < p.grad_weight_columns; k0 += kColumns) {
        const Range columns = {k0, std::min(k0 + kColumns, p.grad_weight_columns)};
        for (ptrdiff_t t0 = 0; t0 < p.steps; t0 += steps_a_block) {
          const Range steps = {t0, std::min(t0 + steps_a_block, p.steps)};
          turned_states(panel.data(), steps, columns);
          for (int gate = 0; gate < kGates; ++gate) {
            grad_weight_block({gate * H + some.begin, gate * H + some.end}, columns, steps,
                              panel.data());
          }
        }
      }
    }
  }

  void grad_weight_block(Range rows, Range columns, Range steps, const T* panel) const {
    for_column_chunks<T>(columns.size(), [&](ptrdiff_t column, int vectors) {
      const ptrdiff_t across = vectors * kLanes<T>;
      for (ptrdiff_t r = rows.begin; r < rows.end; r += kTileRows) {
        const int count = static_cast<int>(std::min<ptrdiff_t>(kTileRows, rows.end - r));
        T* c[kTileRows];
        for (int i = 0; i < count; ++i) {
          c[i] = p.grad_weight_hh + (r + i) * p.grad_weight_columns + columns.begin;
        }
        for (ptrdiff_t t = steps.begin; t < steps.end; ++t) {
          tile_of<T>(count, vectors)(
              p.grad_recurrent + (t * kGates * H + r) * W, W, 1,
              panel + (t - steps.begin) * p.batch * across, across, p.batch, c, column, t > 0);
        }
      }
      panel += steps.size() * p.batch * across;
    });
  }

  // h_{t-1} of some steps and units as [chunk of columns][t][b][unit]; zero beyond H.
  void turned_states(T* panel, Range steps, Range columns) const {
    constexpr int lanes = kLanes<T>;
    for_column_chunks<T>(columns.size(), [&](ptrdiff_t column, int vectors) {
      const ptrdiff_t across = vectors * lanes;
      for (ptrdiff_t t = steps.begin; t < steps.end; ++t, panel += p.batch * across) {
        for (ptrdiff_t u0 = 0; u0 < across; u0 += lanes) {
          const ptrdiff_t unit = columns.begin + column + u0;
          for (ptrdiff_t b0 = 0; b0 < p.batch; b0 += lanes) {
            Vector<T> block[lanes];
            for (int i = 0; i < lanes; ++i) {
              block[i] = unit + i < H ? load(state_at(t) + (unit + i) * W + b0) : zero<T>();
            }
            transpose<T>(block);
            for (int i = 0; i < lanes && b0 + i < p.batch; ++i) {
              store(panel + (b0 + i) * across + u0, block[i]);
            }
          }
        }
      }
    });
  }

  const Problem<T>& p;
  Barrier& barrier;
  const ptrdiff_t H, W;
  const Range units;
  const ptrdiff_t groups;
  T* const packed;
  std::vector<T> input, grad_input;  // [gate][unit of the group][W]
  std::vector<T> grad_out;           // [unit of the group][W]
  std::vector<T> unit;               // kUnitArrays of (W,) for the unit at hand
};

template <typename T, typename Run>
void in_parallel(const Problem<T>& problem, Run&& run) {
  Barrier barrier;
#pragma omp parallel num_threads(problem.threads)
  {
    // There may be fewer than were asked for.
#pragma omp single
    barrier.expect(omp_get_num_threads());
    Worker<T> worker(problem, barrier, omp_get_thread_num(), omp_get_num_threads());
    run(worker);
  }
}

}  // namespace

ptrdiff_t packed_size(ptrdiff_t hidden, int threads) {
  // The most that any number of threads up to this one can need.
  return (packed_rows(hidden) + threads * packed_rows(1)) * hidden;
}

int lanes(bool is_double) { return is_double ? kLanes<double> : kLanes<float>; }

template <typename T>
void forward(const Problem<T>& problem) {
  in_parallel(problem, [](Worker<T>& worker) { worker.forward(); });
}

template <typename T>
void backward(const Problem<T>& problem) {
  in_parallel(problem, [](Worker<T>& worker) { worker.backward(); });
}

template void forward(const Problem<float>&);
template void forward(const Problem<double>&);
template void backward(const Problem<float>&);
template void backward(const Problem<double>&);

}  // namespace bnrnn
