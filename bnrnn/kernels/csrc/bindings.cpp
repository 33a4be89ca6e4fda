// The operators called from Python: bnrnn_cpu::forward, backward and bernoulli.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "bfloat16.h"
#include "multiply.h"
#include "philox.h"
#include "profile.h"
#include "recurrence.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Up to this many input features, computing W_x x_t twice is cheaper than keeping it.
constexpr int64_t kNarrow = 4;
// Up to this many symbols, the elements of W_x of one feature fit into the first-level cache.
constexpr int64_t kFewSymbols = 256;
// A thread with fewer multiply-adds than this costs more time than it saves.
constexpr int64_t kWorkPerThread = 100'000;

// Allocate memory in large pages, if the system lets a program request them. Every step reads the
// whole packed W_h; with small pages, each tile would start with a TLB miss.
Tensor in_large_pages(int64_t elements, const at::TensorOptions& options) {
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

int threads_for(int64_t multiply_adds) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), multiply_adds / kWorkPerThread);
  return static_cast<int>(std::max<int64_t>(1, threads));
}

template <typename T>
bnrnn::Matrix<const T> matrix(const Tensor& m) {
  return {m.const_data_ptr<T>(), m.size(0), m.size(1), m.stride(0), m.stride(1)};
}

Tensor multiply(const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
                    "multiply: ", a.sizes(), " by ", b.sizes());
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), "multiply: ", a.scalar_type(), " by ",
                   b.scalar_type());
  const Tensor c = at::empty({a.size(0), b.size(1)}, a.options());
  const int threads = threads_for(a.size(0) * b.numel());
  const Tensor right = b.contiguous();  // each block of rows packs it again
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "multiply", [&] {
    bnrnn::multiply(matrix<scalar_t>(a), matrix<scalar_t>(right), c.data_ptr<scalar_t>(), threads);
  });
  return c;
}

// The arguments common to forward and backward, in the order of the schema.
struct Layer {
  const Tensor &input, &h_0, &c_0, &weight_ih, &weight_hh;
  const OptionalTensor &bias, &gamma_ih, &gamma_hh, &gamma_c, &beta_c;
  const OptionalTensor &mean_ih, &var_ih, &mean_hh, &var_hh, &mean_c, &var_c, &lengths;
  const OptionalTensor &held_cell, &held_hidden, &dropped_candidate, &dropped_hidden;
  bool count_padding;
  std::string_view ih, hh, c;  // the kinds of the slots, see Normalization in interface.py
  double eps, eps_ih;
  double zoneout_cell, zoneout_hidden, recurrent_dropout, hidden_dropout;
  bool bfloat16;  // round the factors of the products
  bool by_batch;  // whether moments are batch statistics, which are arguments of the backward pass

  int64_t steps() const { return input.size(0); }
  int64_t batch() const { return input.size(1); }
  int64_t hidden() const { return weight_hh.size(1); }
  int64_t input_size() const { return weight_ih.size(1); }
  bool one_hot() const { return !input.is_floating_point(); }
  bool has_few_symbols() const { return one_hot() && input_size() <= kFewSymbols; }
  bool sums() const { return hh == "sum"; }
  bool whole_sequence() const { return ih == "sequence" && by_batch; }
  // A lone sequence, and one or two steps, take longer to round and pack the weights than they save.
  bool bf16() const { return bfloat16 && batch() > 1 && steps() > 2; }
  bool has_layer() const { return ih == "layer" || hh == "layer" || c == "layer"; }
  int64_t width() const {
    const int64_t lanes = bnrnn::lanes(weight_hh.scalar_type() == at::kDouble);
    return (batch() + lanes - 1) / lanes * lanes;
  }

  // Whether W_x x_t is computed as a product. It is then kept for the backward pass, unless the sum
  // that contains it is kept.
  bool is_dense(bool grad_input) const {
    return !one_hot() && (input_size() > kNarrow || whole_sequence() || grad_input);
  }

  // The shape of W_x x_t for `rows` steps. For a single sequence it is computed for all steps at
  // once, except with whole-sequence statistics, which need the padded layout.
  bool has_lone_term() const { return batch() == 1 && !whole_sequence(); }
  std::vector<int64_t> term_shape(int64_t rows) const {
    if (has_lone_term()) return {steps(), 4 * hidden(), 1};
    return {rows, 4 * hidden(), width()};
  }

  void check() const {
    TORCH_CHECK_VALUE(weight_hh.dim() == 2 && weight_ih.dim() == 2, "the weights must be matrices");
    const int64_t H = hidden(), D = input_size();
    expect("weight_hh", weight_hh, {4 * H, H});
    expect("weight_ih", weight_ih, {4 * H, D});
    TORCH_CHECK_VALUE(input.dim() == (one_hot() ? 2 : 3) && input.size(0) > 0 && input.size(1) > 0,
                      "input must be (T, B, D), or integers (T, B), got ", input.sizes());
    if (!one_hot()) expect("input", input, {steps(), batch(), D});
    expect("h_0", h_0, {batch(), H});
    expect("c_0", c_0, {batch(), H});
    expect("bias", bias, {4 * H});
    expect("gamma_ih", gamma_ih, {4 * H});
    expect("gamma_hh", gamma_hh, {4 * H});
    expect("gamma_c", gamma_c, {H});
    expect("beta_c", beta_c, {H});
    expect_moments("ih", ih, gamma_ih, mean_ih, var_ih, 4 * H);
    expect_moments("hh", hh, gamma_hh, mean_hh, var_hh, 4 * H);
    expect_moments("c", c, gamma_c, mean_c, var_c, H);
    TORCH_CHECK_VALUE(!bfloat16 || weight_hh.scalar_type() == at::kFloat,
                      "bfloat16 is for weights in float32, not ", weight_hh.scalar_type());
    TORCH_CHECK_VALUE(!sums() || ih == "none", "if the sum is normalised, ih must be none");
    for (const OptionalTensor* mask : {&held_cell, &held_hidden, &dropped_candidate}) {
      if (*mask) expect_mask(**mask, {steps(), batch(), H});
    }
    if (dropped_hidden) expect_mask(*dropped_hidden, {batch(), H});
    TORCH_CHECK(input.is_cpu(), "input must be on the CPU");
    if (lengths) {
      TORCH_CHECK(lengths->is_cpu(), "lengths must be on the CPU");
      TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong, "lengths must be int64");
      TORCH_CHECK_VALUE(lengths->sizes() == at::IntArrayRef({batch()}), "lengths must be (",
                        batch(), ",), got ", lengths->sizes());
    }
  }

 private:
  void expect(const char* name, const Tensor& tensor, at::IntArrayRef shape) const {
    TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must be ", shape, ", got ", tensor.sizes());
    TORCH_CHECK_TYPE(tensor.scalar_type() == weight_hh.scalar_type(), name, " must be ",
                     weight_hh.scalar_type(), ", got ", tensor.scalar_type());
    TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  }

  void expect(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape) const {
    if (tensor) expect(name, *tensor, shape);
  }

  void expect_mask(const Tensor& mask, at::IntArrayRef shape) const {
    TORCH_CHECK_VALUE(mask.sizes() == shape, "a mask must be ", shape, ", got ", mask.sizes());
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "masks must be of booleans");
    TORCH_CHECK(mask.is_cpu(), "masks must be on the CPU");
  }

  void expect_moments(const char* term, std::string_view kind, const OptionalTensor& gamma,
                      const OptionalTensor& mean, const OptionalTensor& var,
                      int64_t features) const {
    TORCH_CHECK_VALUE(gamma.has_value() == (kind != "none"), "gamma_", term,
                      " must be given exactly if the term is normalised");
    if (kind == "layer") {
      TORCH_CHECK_VALUE(!mean && !var, term, " is normalised over the features and takes no moments");
      return;
    }
    TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), "mean_", term, " and var_", term,
                      " must be given together");
    const bool any = mean_ih || mean_hh || mean_c;
    TORCH_CHECK_VALUE(mean.has_value() == (gamma.has_value() && any),
                      "give the moments of all normalised terms or of none: see ", term);
    if (!mean) return;
    TORCH_CHECK_VALUE(mean->dim() == 2 && mean->size(0) > 0, "mean_", term, " has no rows");
    expect("mean", *mean, {mean->size(0), features});
    expect("var", *var, {mean->size(0), features});
  }
};

// A `Problem` and the tensors that own its memory.
template <typename T>
class Call {
 public:
  explicit Call(const Layer& layer) : l(layer), options(layer.weight_hh.options()) {
    p.steps = l.steps(), p.batch = l.batch(), p.width = l.width();
    p.hidden = l.hidden(), p.input_size = l.input_size();
    p.threads =
        static_cast<int>(std::min<int64_t>(threads_for(l.weight_hh.numel() * p.width), p.hidden));
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
    p.panel_width = p.width + (p.bf16 ? bnrnn::lanes(false) : 0);
    p.packed = packed(p.hidden, p.hidden, p.bf16);
    masks();
  }

  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, options); }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, options); }

  template <typename Element = T>
  Element* data(const Tensor& tensor) {
    held.push_back(tensor.contiguous());
    return held.back().data_ptr<Element>();
  }

  T* data(const OptionalTensor& tensor) { return tensor ? data(*tensor) : nullptr; }

  // Memory for the packed rows (depth,) of a weight, and for some right operands (depth, W).
  T* packed(int64_t rows, int64_t depth, bool bf16) {
    return data(in_large_pages(bnrnn::packed_size(rows, depth, p.threads, bf16), options));
  }

  T* panels(int64_t count, int64_t depth, bool bf16) {
    const int64_t size = bnrnn::panel_size(depth, p.panel_width, bf16);
    return data(bf16 ? zeros({count, size}) : empty({count, size}));
  }

  void one_hot_or_narrow_input() {
    if (l.one_hot()) {
      const Tensor index = l.input.to(at::kLong).contiguous();
      p.index = data<int64_t>(index);
      const auto [low, high] = std::minmax_element(p.index, p.index + index.numel());
      TORCH_CHECK_INDEX(*low >= 0 && *high < p.input_size, "one-hot indices must be in 0..",
                        p.input_size - 1);
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

  // Set a dense input, whose term has the shape `term_shape`; of a normalised sum it is empty.
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

  bnrnn::Problem<T> p;
  const Layer& l;
  const at::TensorOptions options;

 private:
  bnrnn::Slot<T> slot(std::string_view kind, const OptionalTensor& gamma,
                      const OptionalTensor& mean, const OptionalTensor& var, double eps) {
    bnrnn::Slot<T> slot;
    if (!gamma) return slot;
    slot.gamma = data(gamma);
    slot.eps = static_cast<T>(eps);
    slot.layer = kind == "layer";
    if (slot.layer) {
      slot.parts = data(empty({2, p.hidden, p.width}));
      return slot;
    }
    slot.mean = data(mean);
    slot.var = data(var);
    slot.rows = mean ? mean->size(0) : 0;
    slot.per_step = kind != "sequence" && l.by_batch;
    return slot;
  }

  bnrnn::Factor<T> zoneout(const OptionalTensor& held, double p) {
    if (!held) return {nullptr, 0, 0, static_cast<T>(p)};
    return {mask(*held), held->size(1) * held->size(2), 1, 0};
  }

  bnrnn::Factor<T> dropout(const OptionalTensor& dropped, double p) {
    if (!dropped) return {nullptr, 0, 0, 1};
    const int64_t stride = dropped->dim() == 3 ? dropped->size(1) * dropped->size(2) : 0;
    return {mask(*dropped), stride, 0, static_cast<T>(1 / (1 - p))};
  }

  // Convert (..., B, H) to (..., H, B).
  const uint8_t* mask(const Tensor& of) {
    return reinterpret_cast<const uint8_t*>(data<bool>(of.transpose(-1, -2)));
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

  std::vector<Tensor> held;
};

using Results = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>>;

template <typename T>
Results forward(const Layer& l, bool keep, bool grad_input) {
  Call<T> call(l);
  bnrnn::Problem<T>& p = call.p;
  const bool is_dense = l.is_dense(grad_input);
  Tensor term = call.empty({0, 4 * p.hidden, 0});
  if (is_dense) {
    const int64_t rows = keep || l.whole_sequence() ? p.steps : 1;
    if (l.has_lone_term()) {
      term = multiply(l.input.flatten(0, 1), l.weight_ih.t()).view(l.term_shape(rows));
    } else if (!l.sums()) {
      term = call.empty(l.term_shape(rows));
    }
    call.dense_input(term);
    p.packed_ih = call.packed(p.hidden, p.input_size, p.bf16_input());
    p.input_panel_count = 2;
    p.input_panels = call.panels(p.input_panel_count, p.input_size, p.bf16_input());
  } else {
    call.one_hot_or_narrow_input();
  }
  call.whole_sequence();
  std::vector<Tensor> moments;
  for (auto [slot, features] : {std::pair(&p.ih, 4 * p.hidden), {&p.hh, 4 * p.hidden},
                                {&p.c, p.hidden}}) {
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
  const Tensor recurrent = call.empty({keep ? p.steps : 1, 4 * p.hidden, p.width});
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
    saved = {recurrent, states, cells, of_steps, l.sums() ? call.empty({0, 4 * p.hidden, 0}) : term};
  }
  return {output, call.batch_major(states[keep ? p.steps : p.steps % 2]),
          call.batch_major(cells[cells.size(0) - 1]), moments, saved};
}

// The gradients of the first ten arguments; empty if an argument has none.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor>;

template <typename T>
Gradients backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                   const OptionalTensor& grad_c_n, const Layer& l, const Tensor& recurrent,
                   const Tensor& states, const Tensor& cells, const Tensor& of_steps,
                   const Tensor& term, bool grad_input, bool grad_weight_ih) {
  Call<T> call(l);
  bnrnn::Problem<T>& p = call.p;
  const int64_t H = p.hidden, W = p.width, D = p.input_size;
  // If the sum is normalised, the backward pass does not need the term itself.
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
    }
    p.input_panel_count = p.whole_sequence ? p.steps : p.panel_count;
    p.input_panels =
        p.sums ? p.panels : call.panels(p.input_panel_count, 4 * H, p.bf16_input());
  } else if (grad_weight_ih) {
    const bool by_symbol = l.one_hot() && !l.has_few_symbols();
    of_weight_ih = by_symbol ? call.zeros({D, 4 * H}) : call.zeros({4 * H, D});
    (l.one_hot() ? p.grad_columns : p.grad_weight_ih) = call.data(of_weight_ih);
  }
  const Tensor of_weight_hh = call.empty({4 * H, whole_vectors(H)});
  p.grad_weight_hh = call.data(of_weight_hh);
  bnrnn::backward(p);

  if (p.grad_columns != nullptr && !l.has_few_symbols()) {
    of_weight_ih = of_weight_ih.t().contiguous();
  }
  if (is_dense && grad_weight_ih) of_weight_ih = of_weight_ih.narrow(1, 0, D).contiguous();
  return {of_input, call.batch_major(grad_state), call.batch_major(grad_cell), of_weight_ih,
          of_weight_hh.narrow(1, 0, H).contiguous(), of_bias, of_gamma_ih, of_gamma_hh, of_gamma_c,
          of_beta_c};
}

#define BNRNN_LAYER_ARGUMENTS                                                                     \
  const Tensor &input, const Tensor &h_0, const Tensor &c_0, const Tensor &weight_ih,             \
      const Tensor &weight_hh, const OptionalTensor &bias, const OptionalTensor &gamma_ih,        \
      const OptionalTensor &gamma_hh, const OptionalTensor &gamma_c,                              \
      const OptionalTensor &beta_c, const OptionalTensor &mean_ih, const OptionalTensor &var_ih,  \
      const OptionalTensor &mean_hh, const OptionalTensor &var_hh, const OptionalTensor &mean_c,  \
      const OptionalTensor &var_c, const OptionalTensor &lengths,                                 \
      const OptionalTensor &held_cell, const OptionalTensor &held_hidden,                         \
      const OptionalTensor &dropped_candidate, const OptionalTensor &dropped_hidden,              \
      bool count_padding, std::string_view ih, std::string_view hh, std::string_view c,           \
      double eps, double eps_ih, double zoneout_cell, double zoneout_hidden,                      \
      double recurrent_dropout, double hidden_dropout, bool bfloat16
#define BNRNN_LAYER                                                                               \
  Layer{input,   h_0,    c_0,     weight_ih, weight_hh, bias,  gamma_ih,      gamma_hh,           \
        gamma_c, beta_c, mean_ih, var_ih,    mean_hh,   var_hh, mean_c,       var_c,              \
        lengths, held_cell, held_hidden, dropped_candidate, dropped_hidden, count_padding, ih, hh,\
        c, eps, eps_ih, zoneout_cell, zoneout_hidden, recurrent_dropout, hidden_dropout, bfloat16, \
        by_batch}

Results forward_operator(BNRNN_LAYER_ARGUMENTS, bool keep, bool grad_input) {
  const bool by_batch = !mean_ih && !mean_hh && !mean_c;
  const Layer layer = BNRNN_LAYER;
  layer.check();
  return AT_DISPATCH_FLOATING_TYPES(weight_hh.scalar_type(), "bnrnn_cpu::forward", [&] {
    return forward<scalar_t>(layer, keep, grad_input);
  });
}

Gradients backward_operator(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, BNRNN_LAYER_ARGUMENTS,
                            bool by_batch, const Tensor& recurrent, const Tensor& states,
                            const Tensor& cells, const Tensor& of_steps, const Tensor& term,
                            bool grad_input, bool grad_weight_ih) {
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
int64_t narrow() { return kNarrow; }

#define BNRNN_LAYER_SCHEMA                                                                        \
  "Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias, "      \
  "Tensor? gamma_ih, Tensor? gamma_hh, Tensor? gamma_c, Tensor? beta_c, "                         \
  "Tensor? mean_ih, Tensor? var_ih, Tensor? mean_hh, Tensor? var_hh, Tensor? mean_c, "            \
  "Tensor? var_c, Tensor? lengths, Tensor? held_cell, Tensor? held_hidden, "                      \
  "Tensor? dropped_candidate, Tensor? dropped_hidden, bool count_padding, str ih, str hh, str c, " \
  "float eps, float eps_ih, float zoneout_cell, float zoneout_hidden, float recurrent_dropout, "  \
  "float hidden_dropout, bool bfloat16"

}  // namespace

TORCH_LIBRARY(bnrnn_cpu, m) {
  // `moments`: mean and variance of each term that is normalised by batch statistics.
  // `saved`: the arguments recurrent, states, cells, of_steps and term of backward. The last two
  // are empty if not needed; the list is empty without `keep`.
  m.def("forward(" BNRNN_LAYER_SCHEMA ", bool keep, bool grad_input)"
        " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] moments, Tensor[] saved)");
  // Returns the gradients of the first ten arguments of forward. If `by_batch`, mean_* and var_*
  // are the moments that forward returned.
  m.def("backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, " BNRNN_LAYER_SCHEMA
        ", bool by_batch, Tensor recurrent, Tensor states, Tensor cells, Tensor of_steps, "
        "Tensor term, bool grad_input, bool grad_weight_ih) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor)");
  m.def("bernoulli(Tensor key, int stream, int count, float p) -> Tensor");
#if defined(BNRNN_PROFILE)
  // The names of the parts, and the nanoseconds of all threads in each since the last call.
  m.def("spent() -> (str[], int[])", [] {
    std::vector<int64_t> of;
    for (auto& part : bnrnn::spent) of.push_back(part.exchange(0));
    return std::tuple(std::vector<std::string>(bnrnn::kPartNames.begin(), bnrnn::kPartNames.end()), of);
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
