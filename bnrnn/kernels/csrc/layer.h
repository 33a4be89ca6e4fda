// The arguments of the operators, and their checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "evaluation.h"
#include "recurrence.h"

namespace bnrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Up to this many symbols, the elements of W_x of one feature fit into the first-level cache.
constexpr int64_t kFewSymbols = 256;

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
  // Whether W_h h + W_x x is one term: normalised as such, or not at all. The term of one feature
  // stays apart, because no step needs to compute it (scalar_input.h).
  bool sums() const {
    const bool scalar = !one_hot() && input_size() == 1;
    return hh == "sum" || (ih == "none" && hh == "none" && !scalar);
  }
  bool whole_sequence() const { return ih == "sequence" && by_batch; }
  // A lone sequence, and one or two steps, take longer to round and pack the weights than they
  // save.
  bool bf16() const { return bfloat16 && batch() > 1 && steps() > 2; }
  // Whether evaluation.h runs the forward pass. In double precision, which is for checks, compiling
  // it would take longer than it saves.
  bool is_evaluation_of_few(bool keep) const {
    const bool batch_statistics = by_batch && (is_batch(ih) || is_batch(hh) || is_batch(c));
    const bool masks = held_cell || held_hidden || dropped_candidate || dropped_hidden;
    return weight_hh.scalar_type() == at::kFloat && batch() <= kFewSequences && !keep &&
           !batch_statistics && !masks && !bf16();
  }
  static bool is_batch(std::string_view kind) { return kind != "none" && kind != "layer"; }
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

  // The symbols of a one-hot input, contiguous.
  Tensor symbols() const {
    const Tensor index = input.to(at::kLong).contiguous();
    const int64_t* const first = index.const_data_ptr<int64_t>();
    const auto [low, high] = std::minmax_element(first, first + index.numel());
    TORCH_CHECK_INDEX(*low >= 0 && *high < input_size(), "one-hot indices must be in 0..",
                      input_size() - 1);
    return index;
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
      TORCH_CHECK_VALUE(!mean && !var, term,
                        " is normalised over the features and takes no moments");
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

}  // namespace bnrnn
