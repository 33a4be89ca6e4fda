// The operators that Python calls: bnrnn_cpu::forward, backward, multiply, packed_size and lanes.
//
// Tensors come by name, as bnrnn/kernels/cpu.py calls them; those left out are not there.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "multiply.h"
#include "recurrence.h"

namespace {

using Tensors = c10::Dict<std::string, at::Tensor>;

class Named {
 public:
  explicit Named(const Tensors& tensors) : tensors_(tensors) {}

  bool has(const char* name) const { return tensors_.contains(name); }
  at::Tensor at(const char* name) const { return tensors_.at(name); }

  template <typename T>
  T* data(const std::string& name) const {
    if (!tensors_.contains(name)) return nullptr;
    const at::Tensor tensor = tensors_.at(name);
    TORCH_CHECK(tensor.is_contiguous() && tensor.is_cpu(), name, " must be contiguous, on the CPU");
    return tensor.data_ptr<T>();
  }

  template <typename T>
  bnrnn::Slot<T> slot(const std::string& term, double eps, bool per_step) const {
    bnrnn::Slot<T> slot;
    slot.eps = static_cast<T>(eps);
    slot.gamma = data<T>("gamma_" + term);
    slot.grad_gamma = data<T>("grad_gamma_" + term);
    slot.mean = data<T>("mean_" + term);
    slot.var = data<T>("var_" + term);
    slot.rows = slot.mean == nullptr ? 0 : tensors_.at("mean_" + term).size(0);
    slot.per_step = per_step && slot.gamma != nullptr;
    return slot;
  }

 private:
  const Tensors& tensors_;
};

template <typename T>
bnrnn::Problem<T> problem_of(const Named& tensors, int64_t steps, int64_t batch, double eps,
                             double eps_ih, bool by_batch, bool keep, int64_t threads) {
  bnrnn::Problem<T> p;
  const at::Tensor states = tensors.at("states");
  p.steps = steps, p.batch = batch;
  p.hidden = states.size(1), p.width = states.size(2);
  p.input_size = tensors.has("weight_ih") ? tensors.at("weight_ih").size(1) : 0;
  p.threads = static_cast<int>(threads);
  p.keep = keep;
  p.term = tensors.data<T>("term");
  p.index = tensors.data<int64_t>("index");
  p.columns = tensors.data<T>("columns");
  p.narrow = tensors.data<T>("narrow");
  p.weight_ih = tensors.data<T>("weight_ih");
  p.sequence_weights = tensors.data<T>("sequence_weights");
  if (p.sequence_weights != nullptr) {
    p.sequence_total = tensors.at("sequence_weights").sum(at::kDouble).item<double>();
  }
  p.weight_hh = tensors.data<T>("weight_hh");
  p.bias = tensors.data<T>("bias");
  p.beta_c = tensors.data<T>("beta_c");
  p.ih = tensors.slot<T>("ih", eps_ih, by_batch && p.sequence_weights == nullptr);
  p.hh = tensors.slot<T>("hh", eps, by_batch);
  p.c = tensors.slot<T>("c", eps, by_batch);
  p.live = tensors.data<T>("live");
  p.counted = tensors.data<T>("counted");
  p.inverse_count = tensors.data<T>("inverse_count");
  p.mask_stride = tensors.at("live").size(0) == 1 ? 0 : p.width;
  p.count_stride = tensors.at("inverse_count").size(0) == 1 ? 0 : 1;
  p.recurrent = tensors.data<T>("recurrent");
  p.states = tensors.data<T>("states");
  p.cells = tensors.data<T>("cells");
  p.output = tensors.data<T>("output");
  p.grad_output = tensors.data<T>("grad_output");
  p.grad_recurrent = tensors.data<T>("grad_recurrent");
  p.grad_state = tensors.data<T>("grad_state");
  p.grad_cell = tensors.data<T>("grad_cell");
  p.grad_term = tensors.data<T>("grad_term");
  p.grad_columns = tensors.data<T>("grad_columns");
  p.grad_weight_ih = tensors.data<T>("grad_weight_ih");
  p.grad_weight_hh = tensors.data<T>("grad_weight_hh");
  if (p.grad_weight_hh != nullptr) p.grad_weight_columns = tensors.at("grad_weight_hh").size(1);
  p.grad_bias = tensors.data<T>("grad_bias");
  p.grad_beta_c = tensors.data<T>("grad_beta_c");
  p.packed = tensors.data<T>("packed");
  p.panels = tensors.data<T>("panels");
  return p;
}

void forward(const Tensors& tensors, int64_t steps, int64_t batch, double eps, double eps_ih,
             bool by_batch, bool keep, int64_t threads) {
  const Named named(tensors);
  if (named.at("states").scalar_type() == at::kDouble) {
    bnrnn::forward(
        problem_of<double>(named, steps, batch, eps, eps_ih, by_batch, keep, threads));
  } else {
    bnrnn::forward(
        problem_of<float>(named, steps, batch, eps, eps_ih, by_batch, keep, threads));
  }
}

void backward(const Tensors& tensors, int64_t steps, int64_t batch, double eps, double eps_ih,
              bool by_batch, int64_t threads) {
  const Named named(tensors);
  if (named.at("states").scalar_type() == at::kDouble) {
    bnrnn::backward(
        problem_of<double>(named, steps, batch, eps, eps_ih, by_batch, true, threads));
  } else {
    bnrnn::backward(
        problem_of<float>(named, steps, batch, eps, eps_ih, by_batch, true, threads));
  }
}

template <typename T>
bnrnn::Matrix<const T> matrix(const at::Tensor& m) {
  return {m.const_data_ptr<T>(), m.size(0), m.size(1), m.stride(0), m.stride(1)};
}

at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, int64_t threads) {
  TORCH_CHECK(a.size(1) == b.size(0), "multiply: ", a.sizes(), " by ", b.sizes());
  const at::Tensor c = at::empty({a.size(0), b.size(1)}, a.options());
  const int n = static_cast<int>(threads);
  if (a.scalar_type() == at::kDouble) {
    bnrnn::multiply(matrix<double>(a), matrix<double>(b), c.data_ptr<double>(), n);
  } else {
    bnrnn::multiply(matrix<float>(a), matrix<float>(b), c.data_ptr<float>(), n);
  }
  return c;
}

int64_t packed_size(int64_t hidden, int64_t threads) {
  return bnrnn::packed_size(hidden, static_cast<int>(threads));
}

int64_t lanes(bool is_double) { return bnrnn::lanes(is_double); }

}  // namespace

TORCH_LIBRARY(bnrnn_cpu, m) {
  m.def(
      "forward(Dict(str, Tensor) tensors, int steps, int batch, float eps, float eps_ih, "
      "bool by_batch, bool keep, int threads) -> ()",
      forward);
  m.def(
      "backward(Dict(str, Tensor) tensors, int steps, int batch, float eps, float eps_ih, "
      "bool by_batch, int threads) -> ()",
      backward);
  m.def("multiply(Tensor a, Tensor b, int threads) -> Tensor", multiply);
  m.def("packed_size(int hidden, int threads) -> int", packed_size);
  m.def("lanes(bool is_double) -> int", lanes);
}
