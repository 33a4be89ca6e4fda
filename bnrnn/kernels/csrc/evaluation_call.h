// The forward operator for few sequences in evaluation: see evaluation.h.
#pragma once

#include <algorithm>
#include <tuple>

#include "call.h"
#include "evaluation.h"
#include "multiply.h"

namespace bnrnn {

template <typename T>
Matrix<const T> matrix(const Tensor& m) {
  return {m.const_data_ptr<T>(), m.size(0), m.size(1), m.stride(0), m.stride(1)};
}

constexpr size_t kCached = size_t{2} << 20;  // bytes that the second-level cache holds

// W_x x for frames x (N, D): (N, 4H).
template <typename T>
Tensor dense_terms(const Tensor& frames, const Tensor& weight_ih) {
  constexpr int64_t kFew = 16;
  const int64_t count = frames.size(0), features = weight_ih.size(0), depth = weight_ih.size(1);
  const Tensor terms = at::empty({count, features}, weight_ih.options());
  if (count <= kFew) {
    const Tensor x = frames.contiguous(), weight = weight_ih.contiguous();
    const int64_t grain = kWorkPerThread / (count * depth) + 1;
    at::parallel_for(0, features, grain, [&](int64_t begin, int64_t end) {
      multiply_few(weight.const_data_ptr<T>() + begin * depth, end - begin, depth,
                   x.const_data_ptr<T>(), depth, count, terms.data_ptr<T>() + begin, features);
    });
  } else {
    const Tensor right = weight_ih.t().contiguous();  // each block of rows packs it again
    multiply(matrix<T>(frames), matrix<T>(right), terms.data_ptr<T>(),
             threads_for(count * weight_ih.numel()));
  }
  return terms;
}

// The same for the symbols of one-hot vectors, (N,).
template <typename T>
Tensor symbol_terms(const Tensor& symbols, const Tensor& weight_ih) {
  const int64_t features = weight_ih.size(0), size = weight_ih.size(1);
  const int64_t* const index = symbols.const_data_ptr<int64_t>();
  // Transposing the weight takes longer than it saves if there are many more symbols than frames.
  const bool transposes = symbols.numel() > size / 8;
  const Tensor weight = (transposes ? weight_ih.t() : weight_ih).contiguous();
  const Tensor terms = at::empty({symbols.numel(), features}, weight_ih.options());
  T* to = terms.data_ptr<T>();
  for (int64_t i = 0; i < symbols.numel(); ++i, to += features) {
    const T* const from = weight.const_data_ptr<T>() + index[i] * (transposes ? features : 1);
    if (transposes) {
      std::copy_n(from, features, to);
    } else {
      for (int64_t k = 0; k < features; ++k) to[k] = from[k * size];
    }
  }
  return terms;
}

// The output and the two last states.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> evaluate(const Layer& l) {
  constexpr int64_t kFrames = 480;  // whose input terms are computed at once
  const int64_t B = l.batch(), H = l.hidden(), width = whole_vectors<T>(H);
  Memory<T> memory(l);
  Evaluation<T> e;
  e.batch = B, e.hidden = H;
  e.threads = threads_for(l.weight_hh.numel() * B);
  e.sums = l.sums();
  e.weight_hh = memory.data(l.weight_hh);
  e.bias = memory.data(l.bias);
  e.beta_c = memory.data(l.beta_c);
  e.ih = memory.slot(l.ih, l.gamma_ih, l.mean_ih, l.var_ih, l.eps_ih);
  e.hh = memory.slot(l.hh, l.gamma_hh, l.mean_hh, l.var_hh, l.eps);
  e.c = memory.slot(l.c, l.gamma_c, l.mean_c, l.var_c, l.eps);
  e.hold_cell = static_cast<T>(l.zoneout_cell);
  e.hold_hidden = static_cast<T>(l.zoneout_hidden);
  if (l.lengths) e.lengths = memory.template data<int64_t>(*l.lengths);

  const Tensor states = memory.zeros({3, B, width});  // h_{t-1}, h_t and c_t
  states[0].narrow(1, 0, H).copy_(l.h_0);
  states[2].narrow(1, 0, H).copy_(l.c_0);
  e.states = memory.data(states);
  e.cells = e.states + 2 * B * width;
  e.new_cells = memory.data(memory.empty({5, B, width}));
  e.recurrent = e.new_cells + B * width;
  // Packing W_h takes longer than it saves if there are few frames, and it saves less if W_h does
  // not fit the second-level cache.
  const int64_t few = l.weight_hh.nbytes() <= kCached ? 32 : 256;
  if (l.steps() * B > few) {
    e.packed = memory.data(in_large_pages(4 * width * H, memory.options));
  }

  const Tensor output = memory.empty({l.steps(), B, H});
  const Tensor input = l.one_hot() ? l.symbols() : l.input;
  const int64_t chunk = kFrames / B;
  for (int64_t begin = 0; begin < l.steps(); begin += chunk) {
    const int64_t end = std::min(begin + chunk, l.steps());
    const Tensor frames = input.slice(0, begin, end).flatten(0, 1);
    const Tensor terms =
        l.one_hot() ? symbol_terms<T>(frames, l.weight_ih) : dense_terms<T>(frames, l.weight_ih);
    evaluate(e, begin, end, terms.const_data_ptr<T>(), output.data_ptr<T>() + begin * B * H);
  }
  const auto state = [&](int64_t i) {
    return states[i].narrow(1, 0, H).clone(at::MemoryFormat::Contiguous);
  };
  return {output, state(l.steps() % 2), state(2)};
}

}  // namespace bnrnn
