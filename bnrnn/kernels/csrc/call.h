// The memory of a call: from the arguments of an operator to a `Problem`.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <utility>
#include <vector>

#include "layer.h"
#include "recurrence.h"

namespace bnrnn {

// A thread with fewer multiply-adds than this costs more time than it saves.
constexpr int64_t kWorkPerThread = 100'000;

// Allocate memory in large pages, if the system lets a program request them. Every step reads the
// whole packed W_h; with small pages, each tile would start with a TLB miss.
inline Tensor in_large_pages(int64_t elements, const at::TensorOptions& options) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t kPage = size_t{2} << 20;
  const size_t bytes = elements * options.dtype().itemsize();
  if (bytes >= kPage) {
    const size_t whole = (bytes + kPage - 1) / kPage * kPage;
    if (void* const memory = std::aligned_alloc(kPage, whole)) {
      madvise(memory, whole, MADV_HUGEPAGE);  // a hint: failure is harmless
      return at::from_blob(memory, {elements}, std::free, options);
    }
  }
#endif
  return at::empty({elements}, options);
}

inline int threads_for(int64_t multiply_adds) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), multiply_adds / kWorkPerThread);
  return static_cast<int>(std::max<int64_t>(1, threads));
}

// What the arguments of a call point to: contiguous memory, which lives as long as this object.
template <typename T>
class Memory {
 public:
  explicit Memory(const Layer& layer) : l(layer), options(layer.weight_hh.options()) {}

  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, options); }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, options); }

  template <typename Element = T>
  Element* data(const Tensor& tensor) {
    held.push_back(tensor.contiguous());
    return held.back().template data_ptr<Element>();
  }

  T* data(const OptionalTensor& tensor) { return tensor ? data(*tensor) : nullptr; }

  // A slot with its arguments.
  Slot<T> slot(std::string_view kind, const OptionalTensor& gamma, const OptionalTensor& mean,
               const OptionalTensor& var, double eps) {
    Slot<T> slot;
    slot.gamma = data(gamma);
    slot.mean = data(mean);
    slot.var = data(var);
    slot.rows = mean ? mean->size(0) : 0;
    slot.eps = static_cast<T>(eps);
    slot.layer = kind == "layer";
    return slot;
  }

  const Layer& l;
  const at::TensorOptions options;

 private:
  std::vector<Tensor> held;
};

// A `Problem` and the tensors that own its memory.
template <typename T>
class Call : public Memory<T> {
 public:
  using Memory<T>::l, Memory<T>::options, Memory<T>::empty, Memory<T>::zeros, Memory<T>::data;

  explicit Call(const Layer& layer) : Memory<T>(layer) {
    p.steps = l.steps(), p.batch = l.batch(), p.width = l.width();
    p.hidden = l.hidden(), p.input_size = l.input_size();
    p.threads =
        static_cast<int>(std::min<int64_t>(threads_for(l.weight_hh.numel() * p.width),
                                           l.has_layer() ? layer_parts(p.hidden) : p.hidden));
    p.sums = l.sums();
    p.bf16 = l.bf16();
    p.weight_hh = data(l.weight_hh);
    p.bias = data(l.bias);
    p.beta_c = data(l.beta_c);
    p.ih = slot(l.ih, l.gamma_ih, l.mean_ih, l.var_ih, l.eps_ih);
    p.hh = slot(l.hh, l.gamma_hh, l.mean_hh, l.var_hh, l.eps);
    p.c = slot(l.c, l.gamma_c, l.mean_c, l.var_c, l.eps);
    p.hold_cell = zoneout(l.held_cell, l.zoneout_cell);
    p.hold_hidden = zoneout(l.held_hidden, l.zoneout_hidden);
    p.candidate_factor = dropout(l.dropped_candidate, l.recurrent_dropout);
    p.hidden_factor = dropout(l.dropped_hidden, l.hidden_dropout);
    p.whole_sequence = l.whole_sequence();
    p.panel_width = p.width + (p.bf16 ? lanes(false) : 0);
    p.packed = packed(p.hidden, p.hidden, p.bf16);
    masks();
  }

  // Memory for the packed rows (depth,) of a weight, and for some right operands (depth, W).
  T* packed(int64_t rows, int64_t depth, bool bf16) {
    return data(in_large_pages(packed_size(rows, depth, p.threads, bf16), options));
  }

  T* panels(int64_t count, int64_t depth, bool bf16) {
    const int64_t size = panel_size(depth, p.panel_width, bf16);
    return data(bf16 ? zeros({count, size}) : empty({count, size}));
  }

  // Memory for the right operand of a weight's gradient.
  T* rights(int64_t columns, bool bf16) {
    const int64_t size = 2 * right_size(p.batch, columns, bf16);
    return data(bf16 ? zeros({size}) : empty({size}));
  }

  void one_hot_or_narrow_input() {
    if (l.one_hot()) {
      p.index = this->template data<int64_t>(l.symbols());
      p.columns = data(l.has_few_symbols() ? l.weight_ih : l.weight_ih.t());
      p.symbol_stride = l.has_few_symbols() ? 1 : 4 * p.hidden;
      p.feature_stride = l.has_few_symbols() ? p.input_size : 1;
    } else {
      const Tensor narrow = zeros({p.steps, p.input_size, p.width});
      narrow.narrow(2, 0, p.batch).copy_(l.input.transpose(1, 2));
      p.narrow = data(narrow);
      p.weight_ih = data(l.weight_ih);
    }
  }

  // Set a dense input, whose term has the shape `term_shape`; if `sums`, it is empty.
  void dense_input(const Tensor& term) {
    p.dense = data(l.input);
    p.weight_ih = data(l.weight_ih);
    if (term.numel() == 0) return;
    if (l.has_lone_term()) {
      p.lone_term = data(term);
    } else {
      p.term = data(term);
      p.term_stride = term.size(0) > 1 ? term.stride(0) : 0;
    }
  }

  // Set what the statistics of the input term over the whole sequence need.
  void whole_sequence() {
    if (!p.whole_sequence) return;
    const Tensor weights = zeros({l.one_hot() ? p.input_size : 0});
    T* const weight = data(weights);
    for (int64_t i = 0; i < p.steps * p.batch; ++i) {
      if (p.live[i / p.batch * p.mask_stride + i % p.batch] == 0) continue;
      if (l.one_hot()) weight[p.index[i]] += 1;
      p.sequence_total += 1;
    }
    p.symbol_weights = weight;
  }

  // Set the memory for layer statistics: (3, T, 2, W), or empty.
  void layers(const Tensor& of_steps) {
    if (of_steps.numel() == 0) return;
    p.ih.of_steps = data(of_steps[0]);
    p.hh.of_steps = data(of_steps[1]);
    p.c.of_steps = data(of_steps[2]);
  }

  // Write a state (B, H), or zeros if there is none, to (H, W); columns beyond B are zero.
  void feature_major(const OptionalTensor& state, const Tensor& to) const {
    to.zero_();
    if (state) to.narrow(1, 0, p.batch).copy_(state->t());
  }

  // Convert (H, W) to (B, H).
  Tensor batch_major(const Tensor& state) const {
    return state.narrow(1, 0, p.batch).t().clone(at::MemoryFormat::Contiguous);
  }

  Problem<T> p;

 private:
  Slot<T> slot(std::string_view kind, const OptionalTensor& gamma, const OptionalTensor& mean,
               const OptionalTensor& var, double eps) {
    Slot<T> slot = Memory<T>::slot(kind, gamma, mean, var, eps);
    if (slot.layer) slot.parts = data(empty({2, layer_parts(p.hidden), p.width}));
    slot.per_step = gamma && !slot.layer && kind != "sequence" && l.by_batch;
    return slot;
  }

  Factor<T> zoneout(const OptionalTensor& held, double p) {
    if (!held) return {nullptr, 0, 0, static_cast<T>(p)};
    return {mask(*held), held->size(1) * held->size(2), 1, 0};
  }

  Factor<T> dropout(const OptionalTensor& dropped, double p) {
    if (!dropped) return {nullptr, 0, 0, 1};
    const int64_t stride = dropped->dim() == 3 ? dropped->size(1) * dropped->size(2) : 0;
    return {mask(*dropped), stride, 0, static_cast<T>(1 / (1 - p))};
  }

  // Convert (..., B, H) to (..., H, B).
  const uint8_t* mask(const Tensor& of) {
    return reinterpret_cast<const uint8_t*>(this->template data<bool>(of.transpose(-1, -2)));
  }

  // Which sequences run, and which count in statistics; in one row for all steps or one per step.
  void masks() {
    const int64_t rows = l.lengths ? p.steps : 1;
    const Tensor live = zeros({rows, p.width}), inverse = empty({rows});
    p.live = data(live);
    p.inverse_count = data(inverse);
    const bool all_count = !l.lengths || l.count_padding;
    const Tensor counted = all_count && l.lengths ? zeros({rows, p.width}) : live;
    p.counted = data(counted);
    const Tensor lengths = l.lengths ? l.lengths->contiguous() : Tensor();
    for (int64_t t = 0; t < rows; ++t) {
      T count = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const bool runs = !l.lengths || t < lengths.data_ptr<int64_t>()[b];
        live.data_ptr<T>()[t * p.width + b] = runs;
        counted.data_ptr<T>()[t * p.width + b] = runs || all_count;
        count += runs || all_count;
      }
      inverse.data_ptr<T>()[t] = 1 / std::max<T>(count, 1);
    }
    p.mask_stride = l.lengths ? p.width : 0;
    p.count_stride = all_count ? 0 : 1;
  }
};

}  // namespace bnrnn
