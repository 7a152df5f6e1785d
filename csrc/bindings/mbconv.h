// The passes of MBConv in training, as Python calls them and a whole block does.
#pragma once

#include <array>
#include <string>

#include "bindings/norms.h"

namespace effnet {

// (n, hw, c, out)
using ProductShape = std::array<int64_t, 4>;

void mbconv_pointwise(const std::string& isa, const ProductShape& shape, bool is_bf16,
                      bool weight_bf16, Address x, Address x_norm, Address gate, Address weight,
                      const BatchNorm& bn, double eps, Address z, Address norm,
                      const ActivationTuple& activation, int threads);

void mbconv_project_backward(const std::string& isa, const ProductShape& shape, bool is_bf16,
                             bool weight_bf16, Address grad_y, Address row_scale, Address z3,
                             Address norm3, Address sums3, Address weight, Address z2,
                             Address norm2, Address gate, Address e, Address sums,
                             Address grad_weight, const ActivationTuple& activation, int threads);

void mbconv_expand_backward(const std::string& isa, const ProductShape& shape, bool is_bf16,
                            bool weight_bf16, Address f, Address z1, Address norm1, Address sums1,
                            Address weight, Address x, Address residual, Address grad_x,
                            Address grad_weight, int threads);

void mbconv_depthwise(const std::string& isa, const ShapeTuple& shape, bool is_bf16,
                      bool weight_bf16, Address x, Address x_norm, Address weight,
                      const BatchNorm& bn, double eps, Address z, Address norm,
                      const ActivationTuple& activation, int threads);

void mbconv_depthwise_backward(const std::string& isa, const ShapeTuple& shape, bool is_bf16,
                               bool weight_bf16, Address e, Address gate, Address q, Address z2,
                               Address norm2, Address sums2, Address x, Address x_norm,
                               Address residual, Address weight, Address f, Address grad_weight,
                               Address sums, const ActivationTuple& activation, int threads);

void mbconv_squeeze(const std::string& isa, const PlaneTuple& shape, bool is_bf16, Address z,
                    Address norm, Address pooled, Address slopes, const ActivationTuple& activation,
                    int threads);

void mbconv_finish(const std::string& isa, const PlaneTuple& shape, bool is_bf16, Address z,
                   Address norm, Address row_scale, Address residual, Address y, int threads);

void mbconv_finish_backward(const std::string& isa, const PlaneTuple& shape, bool is_bf16,
                            Address grad_y, Address row_scale, Address z, Address norm,
                            Address sums, int threads);

void mbconv_excite_sums(int64_t n, int64_t c, int64_t pixels, Address grad_pooled, Address gate,
                        Address sums, Address slopes, Address sums2);

// Of squeeze_excite.cpp.
void excite(const std::string& isa, int64_t n, int64_t c, int64_t r, bool weight_bf16,
            Address pooled, Address se_reduce_weight, Address se_reduce_bias,
            Address se_expand_weight, Address se_expand_bias, Address hidden, Address gate,
            const ActivationTuple& activation, int gate_kind, int threads);

void excite_backward(const std::string& isa, int64_t n, int64_t c, int64_t r, bool weight_bf16,
                     Address pooled, Address hidden, Address gate, Address grad_gate,
                     Address se_reduce_weight, Address se_expand_weight,
                     Address grad_se_reduce_weight, Address grad_se_reduce_bias,
                     Address grad_se_expand_weight, Address grad_se_expand_bias,
                     Address grad_pooled, const ActivationTuple& activation, int gate_kind,
                     int threads);

}  // namespace effnet
