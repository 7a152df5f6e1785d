// Squeeze-and-excite by its passes, as Python calls them.
#include <string>

#include "bindings/bind.h"
#include "bindings/mbconv.h"
#include "cpu/isa_dispatch.h"

namespace effnet {
namespace {

// out[n,c] = factor * sum over hw of x, or of x * grad_y where given.
void squeeze(const std::string& isa, int64_t n, int64_t c, int64_t hw, bool is_bf16, Address x,
             Address grad_y, float factor, Address out, int threads) {
  const Kernels& kernels = kernels_for(isa);
  require(n > 0 && c > 0 && hw > 0, "squeeze: every size must be positive");
  const int64_t chunks = host::pixel_chunks(hw);
  const Partials partial(n * chunks * c);
  SqueezeArgs args = {{n, c, hw}, dtype_of(is_bf16), at(x),
                      at(grad_y), partial.data(),    thread_count(threads)};
  launch(kernels.squeeze, args);
  FoldArgs fold = {partial.data(), n, chunks, c, factor, at<float>(out), threads};
  launch(kernels.fold_sum, fold);
}

}  // namespace

void excite(const std::string& isa, int64_t n, int64_t c, int64_t r, bool weight_bf16,
            Address pooled, Address se_reduce_weight, Address se_reduce_bias,
            Address se_expand_weight, Address se_expand_bias, Address hidden, Address gate,
            const ActivationTuple& activation, int gate_kind, int threads) {
  require(n >= 0 && c > 0 && r > 0, "excite: the sizes must be positive");
  ExciteArgs args = {n,
                     c,
                     r,
                     dtype_of(weight_bf16),
                     at<float>(pooled),
                     at(se_reduce_weight),
                     at(se_reduce_bias),
                     at(se_expand_weight),
                     at(se_expand_bias),
                     at<float>(hidden),
                     at<float>(gate),
                     activation_of(activation),
                     gate_kind_of(gate_kind),
                     workspace,
                     thread_count(threads)};
  launch(kernels_for(isa).excite, args);
}

void excite_backward(const std::string& isa, int64_t n, int64_t c, int64_t r, bool weight_bf16,
                     Address pooled, Address hidden, Address gate, Address grad_gate,
                     Address se_reduce_weight, Address se_expand_weight,
                     Address grad_se_reduce_weight, Address grad_se_reduce_bias,
                     Address grad_se_expand_weight, Address grad_se_expand_bias,
                     Address grad_pooled, const ActivationTuple& activation, int gate_kind,
                     int threads) {
  require(n >= 0 && c > 0 && r > 0, "excite_backward: the sizes must be positive");
  const Partials grad_hidden(n * r);
  ExciteBackwardArgs args = {n,
                             c,
                             r,
                             dtype_of(weight_bf16),
                             at<float>(pooled),
                             at<float>(hidden),
                             at<float>(gate),
                             at<float>(grad_gate),
                             at(se_reduce_weight),
                             at(se_expand_weight),
                             at<float>(grad_se_reduce_weight),
                             at<float>(grad_se_reduce_bias),
                             at<float>(grad_se_expand_weight),
                             at<float>(grad_se_expand_bias),
                             at<float>(grad_pooled),
                             grad_hidden.data(),
                             activation_of(activation),
                             gate_kind_of(gate_kind),
                             workspace,
                             thread_count(threads)};
  launch(kernels_for(isa).excite_backward, args);
}

namespace {

void gate(const std::string& isa, int64_t n, int64_t c, int64_t hw, bool is_bf16, Address x,
          Address gate, Address offset, Address y, int threads) {
  require(n >= 0 && c > 0 && hw >= 0, "gate: the sizes must be positive");
  GateArgs args = {{n, c, hw}, dtype_of(is_bf16),    at(x), at<float>(gate), at<float>(offset),
                   at(y),      thread_count(threads)};
  launch(kernels_for(isa).gate, args);
}

}  // namespace

void bind_squeeze_excite(py::module_& m) {
  m.def("squeeze", &squeeze);
  m.def("excite", &excite);
  m.def("excite_backward", &excite_backward);
  m.def("gate", &gate);
}

}  // namespace effnet
