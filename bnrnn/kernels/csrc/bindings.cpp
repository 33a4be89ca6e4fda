// The operators called from Python: bnrnn_cpu::forward, backward and bernoulli.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "call.h"
#include "evaluation_call.h"
#include "layer.h"
#include "philox.h"
#include "profile.h"
#include "recurrence.h"

namespace {

using at::Tensor;
using bnrnn::Call, bnrnn::Layer, bnrnn::OptionalTensor;

using Results = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>>;

template <typename T>
Results forward(const Layer& l, bool keep, bool grad_input) {
  if constexpr (std::is_same_v<T, float>) {
    if (l.is_evaluation_of_few(keep)) {
      auto [output, h_n, c_n] = bnrnn::evaluate<T>(l);
      return {output, h_n, c_n, {}, {}};
    }
  }
  Call<T> call(l);
  bnrnn::Problem<T>& p = call.p;
  const bool is_dense = l.is_dense(grad_input);
  Tensor term = call.empty({0, 4 * p.hidden, 0});
  if (is_dense) {
    const int64_t rows = keep || l.whole_sequence() ? p.steps : 1;
    if (l.has_lone_term()) {
      term = bnrnn::dense_terms<T>(l.input.flatten(0, 1), l.weight_ih).view(l.term_shape(rows));
    } else if (!l.sums()) {
      term = call.empty(l.term_shape(rows));
    }
    call.dense_input(term);
    p.packed_ih = call.packed(p.hidden, p.input_size, p.bf16_input());
    p.input_panel_count = 3;
    p.input_panels = call.panels(p.input_panel_count, p.input_size, p.bf16_input());
  } else {
    call.one_hot_or_narrow_input();
  }
  call.whole_sequence();
  std::vector<Tensor> moments;
  for (auto [slot, features] :
       {std::pair(&p.ih, 4 * p.hidden), {&p.hh, 4 * p.hidden}, {&p.c, p.hidden}}) {
    if (slot->gamma == nullptr || slot->mean != nullptr || slot->layer) continue;
    slot->rows = slot->per_step ? p.steps : 1;
    for (T** of : {&slot->mean, &slot->var}) {
      moments.push_back(call.empty({slot->rows, features}));
      *of = call.data(moments.back());
    }
  }
  p.keep = keep;
  const Tensor of_steps = call.empty({l.has_layer() && keep ? 3 : 0, p.steps, 2, p.width});
  call.layers(of_steps);
  const Tensor recurrent = call.empty({keep ? p.steps : 0, 4 * p.hidden, p.width});
  // Without a backward pass the hidden state alternates between two rows.
  const Tensor states = call.empty({keep ? p.steps + 1 : 2, p.hidden, p.width});
  const Tensor cells = call.empty({keep ? p.steps + 1 : 1, p.hidden, p.width});
  const Tensor output = call.empty({p.steps, p.batch, p.hidden});
  call.feature_major(l.h_0, states[0]);
  call.feature_major(l.c_0, cells[0]);
  p.recurrent = call.data(recurrent);
  p.states = call.data(states);
  p.cells = call.data(cells);
  p.output = call.data(output);
  p.panel_count = 2;
  p.panels = call.panels(p.panel_count, p.hidden, p.bf16);
  bnrnn::forward(p);

  std::vector<Tensor> saved;
  if (keep) {
    saved = {recurrent, states, cells, of_steps,
             l.sums() ? call.empty({0, 4 * p.hidden, 0}) : term};
  }
  return {output, call.batch_major(states[keep ? p.steps : p.steps % 2]),
          call.batch_major(cells[cells.size(0) - 1]), moments, saved};
}

// The gradients of the first ten arguments; empty if an argument has none.
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                   const OptionalTensor& grad_c_n, const Layer& l, const Tensor& recurrent,
                   const Tensor& states, const Tensor& cells, const Tensor& of_steps,
                   const Tensor& term, bool grad_input, bool grad_weight_ih) {
  Call<T> call(l);
  bnrnn::Problem<T>& p = call.p;
  const int64_t H = p.hidden, W = p.width, D = p.input_size;
  // The backward pass needs W_h h + W_x x if that is one term, but not W_x x itself.
  const bool is_dense = l.sums() ? l.is_dense(grad_input) : term.numel() > 0;
  is_dense ? call.dense_input(term) : call.one_hot_or_narrow_input();
  call.whole_sequence();
  for (const bnrnn::Slot<T>* slot : {&p.ih, &p.hh, &p.c}) {
    TORCH_CHECK_VALUE(slot->gamma == nullptr || slot->layer || slot->mean != nullptr,
                      "moments are missing");
  }
  call.layers(of_steps);
  p.keep = true;
  p.recurrent = call.data(recurrent);
  p.states = call.data(states);
  p.cells = call.data(cells);
  p.grad_output = call.data(grad_output);
  const Tensor grad_state = call.empty({H, W}), grad_cell = call.empty({H, W});
  const Tensor grad_around = call.empty({l.dropped_hidden ? H : 0, W});
  if (l.dropped_hidden) {
    call.feature_major(grad_h_n, grad_around);
    grad_state.zero_();
  } else {
    call.feature_major(grad_h_n, grad_state);
  }
  call.feature_major(grad_c_n, grad_cell);
  p.grad_state = call.data(grad_state);
  p.grad_around = call.data(grad_around);
  p.grad_cell = call.data(grad_cell);
  p.panel_count = bnrnn::backward_panels(p.batch);
  p.panels = call.panels(p.panel_count, 4 * H, p.bf16);

  const auto gradient_of = [&](const OptionalTensor& parameter, T** to) {
    const Tensor gradient = parameter ? call.zeros(parameter->sizes()) : call.empty({0});
    *to = parameter ? call.data(gradient) : nullptr;
    return gradient;
  };
  Tensor of_bias = call.zeros({4 * H});  // sequence_gradient reads it even without a bias
  p.grad_bias = call.data(of_bias);
  if (!l.bias) of_bias = call.empty({0});
  const Tensor of_gamma_ih = gradient_of(l.gamma_ih, &p.ih.grad_gamma);
  const Tensor of_gamma_hh = gradient_of(l.gamma_hh, &p.hh.grad_gamma);
  const Tensor of_gamma_c = gradient_of(l.gamma_c, &p.c.grad_gamma);
  const Tensor of_beta_c = gradient_of(l.beta_c, &p.grad_beta_c);

  const int64_t lanes = bnrnn::lanes(std::is_same_v<T, double>);
  const auto whole_vectors = [lanes](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
  Tensor of_input = call.empty({0}), of_weight_ih = call.empty({0});
  if (is_dense) {
    if (grad_input) {
      of_input = call.empty(l.input.sizes());
      p.grad_input = call.data(of_input);
      p.packed_ih = call.packed(D, H, p.bf16_input());
    }
    if (grad_weight_ih) {
      of_weight_ih = call.empty({4 * H, whole_vectors(D)});
      p.grad_weight_ih = call.data(of_weight_ih);
      p.right_ih = call.rights(D, p.bf16_input());
    }
    p.input_panel_count = p.whole_sequence ? p.steps : p.panel_count;
    p.input_panels = p.sums ? p.panels : call.panels(p.input_panel_count, 4 * H, p.bf16_input());
  } else if (grad_weight_ih) {
    const bool by_symbol = l.one_hot() && !l.has_few_symbols();
    of_weight_ih = by_symbol ? call.zeros({D, 4 * H}) : call.zeros({4 * H, D});
    (l.one_hot() ? p.grad_columns : p.grad_weight_ih) = call.data(of_weight_ih);
    if (p.ih.layer && !l.one_hot() && D == 1) p.grad_spread = call.data(call.zeros({H}));
  }
  const Tensor of_weight_hh = call.empty({4 * H, whole_vectors(H)});
  p.grad_weight_hh = call.data(of_weight_hh);
  p.right_hh = call.rights(H, p.bf16);
  bnrnn::backward(p);

  if (p.grad_columns != nullptr && !l.has_few_symbols()) {
    of_weight_ih = of_weight_ih.t().contiguous();
  }
  if (is_dense && grad_weight_ih) of_weight_ih = of_weight_ih.narrow(1, 0, D).contiguous();
  return {of_input,
          call.batch_major(grad_state),
          call.batch_major(grad_cell),
          of_weight_ih,
          of_weight_hh.narrow(1, 0, H).contiguous(),
          of_bias,
          of_gamma_ih,
          of_gamma_hh,
          of_gamma_c,
          of_beta_c};
}

#define BNRNN_LAYER_ARGUMENTS                                                                      \
  const Tensor &input, const Tensor &h_0, const Tensor &c_0, const Tensor &weight_ih,              \
      const Tensor &weight_hh, const OptionalTensor &bias, const OptionalTensor &gamma_ih,         \
      const OptionalTensor &gamma_hh, const OptionalTensor &gamma_c, const OptionalTensor &beta_c, \
      const OptionalTensor &mean_ih, const OptionalTensor &var_ih, const OptionalTensor &mean_hh,  \
      const OptionalTensor &var_hh, const OptionalTensor &mean_c, const OptionalTensor &var_c,     \
      const OptionalTensor &lengths, const OptionalTensor &held_cell,                              \
      const OptionalTensor &held_hidden, const OptionalTensor &dropped_candidate,                  \
      const OptionalTensor &dropped_hidden, bool count_padding, std::string_view ih,               \
      std::string_view hh, std::string_view c, double eps, double eps_ih, double zoneout_cell,     \
      double zoneout_hidden, double recurrent_dropout, double hidden_dropout, bool bfloat16
#define BNRNN_LAYER                                                                             \
  Layer {                                                                                       \
    input, h_0, c_0, weight_ih, weight_hh, bias, gamma_ih, gamma_hh, gamma_c, beta_c, mean_ih,  \
        var_ih, mean_hh, var_hh, mean_c, var_c, lengths, held_cell, held_hidden,                \
        dropped_candidate, dropped_hidden, count_padding, ih, hh, c, eps, eps_ih, zoneout_cell, \
        zoneout_hidden, recurrent_dropout, hidden_dropout, bfloat16, by_batch                   \
  }

Results forward_operator(BNRNN_LAYER_ARGUMENTS, bool keep, bool grad_input) {
  const bool by_batch = !mean_ih && !mean_hh && !mean_c;
  const Layer layer = BNRNN_LAYER;
  layer.check();
  return AT_DISPATCH_FLOATING_TYPES(weight_hh.scalar_type(), "bnrnn_cpu::forward",
                                    [&] { return forward<scalar_t>(layer, keep, grad_input); });
}

Gradients backward_operator(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, BNRNN_LAYER_ARGUMENTS, bool by_batch,
                            const Tensor& recurrent, const Tensor& states, const Tensor& cells,
                            const Tensor& of_steps, const Tensor& term, bool grad_input,
                            bool grad_weight_ih) {
  const Layer layer = BNRNN_LAYER;
  layer.check();
  return AT_DISPATCH_FLOATING_TYPES(weight_hh.scalar_type(), "bnrnn_cpu::backward", [&] {
    return backward<scalar_t>(grad_output, grad_h_n, grad_c_n, layer, recurrent, states, cells,
                              of_steps, term, grad_input, grad_weight_ih);
  });
}

// See philox.py.
Tensor bernoulli(const Tensor& key, int64_t stream, int64_t count, double p) {
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong && key.numel() == 1, "the key must be one int64");
  const Tensor found = at::empty({count}, key.options().dtype(at::kBool));
  const auto bits = static_cast<uint64_t>(key.item<int64_t>());
  const auto threshold = static_cast<uint32_t>(std::nearbyint(p * 65536.0));
  uint8_t* const to = reinterpret_cast<uint8_t*>(found.data_ptr<bool>());
  constexpr int64_t kBlock = bnrnn::kBernoulliBlock, kGrain = 32;  // blocks, about 0.1 ms
  at::parallel_for(0, (count + kBlock - 1) / kBlock, kGrain, [&](int64_t begin, int64_t end) {
    bnrnn::bernoulli(bits, static_cast<uint32_t>(stream), threshold, kBlock * begin,
                     std::min(kBlock * end, count), to);
  });
  return found;
}

int64_t lanes(bool is_double) { return bnrnn::lanes(is_double); }
int64_t narrow() { return bnrnn::kNarrow; }

#define BNRNN_LAYER_SCHEMA                                                                         \
  "Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias, "       \
  "Tensor? gamma_ih, Tensor? gamma_hh, Tensor? gamma_c, Tensor? beta_c, "                          \
  "Tensor? mean_ih, Tensor? var_ih, Tensor? mean_hh, Tensor? var_hh, Tensor? mean_c, "             \
  "Tensor? var_c, Tensor? lengths, Tensor? held_cell, Tensor? held_hidden, "                       \
  "Tensor? dropped_candidate, Tensor? dropped_hidden, bool count_padding, str ih, str hh, str c, " \
  "float eps, float eps_ih, float zoneout_cell, float zoneout_hidden, float recurrent_dropout, "   \
  "float hidden_dropout, bool bfloat16"

}  // namespace

TORCH_LIBRARY(bnrnn_cpu, m) {
  // `moments`: mean and variance of each term that is normalised by batch statistics.
  // `saved`: the arguments recurrent, states, cells, of_steps and term of backward. The last two
  // are empty if not needed; the list is empty without `keep`.
  m.def("forward(" BNRNN_LAYER_SCHEMA
        ", bool keep, bool grad_input)"
        " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] moments, Tensor[] saved)");
  // Returns the gradients of the first ten arguments of forward. If `by_batch`, mean_* and var_*
  // are the moments that forward returned.
  m.def("backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, " BNRNN_LAYER_SCHEMA
        ", bool by_batch, Tensor recurrent, Tensor states, Tensor cells, Tensor of_steps, "
        "Tensor term, bool grad_input, bool grad_weight_ih) -> (Tensor, Tensor, Tensor, Tensor, "
        "Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor)");
  m.def("bernoulli(Tensor key, int stream, int count, float p) -> Tensor");
#if defined(BNRNN_PROFILE)
  // The names of the parts, and the nanoseconds of all threads in each since the last call.
  m.def("spent() -> (str[], int[])", [] {
    std::vector<int64_t> of;
    for (auto& part : bnrnn::spent) of.push_back(part.exchange(0));
    return std::tuple(std::vector<std::string>(bnrnn::kPartNames.begin(), bnrnn::kPartNames.end()),
                      of);
  });
#endif
  // The number of elements per vector, and the largest number of features of a narrow input. Python
  // needs them for the shapes of `saved`.
  m.def("lanes(bool is_double) -> int", lanes);
  m.def("narrow() -> int", narrow);
  // How products of factors in bfloat16 are computed here: "amx", "avx512_bf16" or "portable".
  m.def("bfloat16_way() -> str", [] { return std::string(bnrnn::bf16_way()); });
}

TORCH_LIBRARY_IMPL(bnrnn_cpu, CPU, m) {
  m.impl("forward", forward_operator);
  m.impl("backward", backward_operator);
  m.impl("bernoulli", bernoulli);
}
