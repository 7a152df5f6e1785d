// What the bindings share about BatchNorm: its vectors, and folds of partial sums in double.
#pragma once

#include <array>
#include <vector>

#include "bindings/parts.h"
#include "common/mbconv_split.h"
#include "cpu/training/args.h"

namespace effnet {

// BatchNorm as z * scale + shift, and 1 / its standard deviation. Plain loops over few arrays:
// the compiler turns them into vector code.
struct BnVectors {
  std::vector<float> scale, shift, rstd;
  BnVectors(const BatchNorm& bn, double eps, int64_t c);
};

// (n, hw, c)
using PlaneTuple = std::array<int64_t, 3>;

NormVectors norm_vectors(Address norm, int64_t c);

// The norm of z from the moments of its tasks, `chunks` parts of each image's `rows` rows, or from
// the mean and variance given.
void make_norm(float* norm, const float* partial, int64_t n, int64_t chunks, int64_t c,
               int64_t rows, int64_t columns, const BatchNorm& bn, double eps);

// Moves BatchNorm's running statistics towards the batch's by the share `momentum`.
void move_statistics(int64_t c, Address mean, Address var, Address running_mean,
                     Address running_var, double correction, double momentum);

// dz = scale * du + (z - mean) * slope + offset, from norm and sums over `count` values a channel;
// without sums dz = scale * du.
struct GradParts {
  std::vector<float> values;
  GradVectors vectors;
  GradParts(Address norm, Address sums, int64_t c, int64_t count);
};

// out [c] = the sums over parts of partial [parts,c].
void fold_sums(const float* partial, int64_t parts, int64_t c, float* out);

// Each out [N,C] = its factor * the sums over parts of its row of partial [N,parts,3,C].
void fold_per_image(const float* partial, int64_t n, int64_t parts, int64_t c, const float* factors,
                    const std::array<float*, 3>& out);

}  // namespace effnet
