// Holds every form of SiLU to a reference in double precision, over all floats or over a grid.
//
// Usage: silu_driver grid | FIRST END
//   grid: 4,096 values of every exponent and sign, and all floats near where a form changes course
//   FIRST END: the floats whose bits / 4096 are in [FIRST, END); 0 1048576 are all
// Prints "ISA FORM ERROR X ACTUAL EXACT" per form, at its largest error in units in the last place
// (ulp) of the exact value; "inf" or "nan" says that NaN, an infinity or a sign is wrong.
// Compile with -O3 and -D'DRIVER_ISAS=ISA(generic) ISA(avx2)', and link the objects of
// silu_forms.cpp for these sets.
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "silu_forms.h"

using effnet::kBlockFloats;
using effnet::SiluForm;
using effnet::SiluForms;

#define ISA(name)                    \
  namespace effnet {                 \
  namespace name {                   \
  extern const SiluForms silu_forms; \
  }                                  \
  }
DRIVER_ISAS
#undef ISA

namespace {

// Below it exp(-x) may be infinite in fp32: a result may be anything from the exact one to 0.
constexpr float kOverflow = -88.7f;
constexpr double kSmallest = 0x1p-149;
constexpr double kExpError = 1e-12;  // relative, allowed to exp_of

enum Form { kSigmoid, kSilu, kSlope, kStoredFp32, kStoredBf16, kForms };
const char* const kNames[] = {"sigmoid", "silu", "slope", "stored_fp32", "stored_bf16"};

// exp(v) for |v| <= 700, and NaN of NaN: 2^n times Taylor's series to degree 10.
inline double exp_of(double v) {
  constexpr double kRound = 0x1.8p52;
  const double shifted = v * 1.4426950408889634 + kRound, n = shifted - kRound;
  const double r = (v - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;  // ln(2) in two parts
  double p = 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) << 52) + (1023ull << 52));
}

struct Reference {
  alignas(64) double sigmoid[kBlockFloats], silu[kBlockFloats], slope[kBlockFloats];
  alignas(64) double slope_terms[kBlockFloats];  // the slope crosses 0, its terms do not

  void compute(const float* x) {
    for (int64_t i = 0; i < kBlockFloats; i++) {
      const double u = x[i];
      double clamped = u < -700 ? -700 : u;
      clamped = clamped > 700 ? 700 : clamped;
      const double power = u > 700 ? 0 : exp_of(-clamped), s = 1 / (1 + power), rest = power * s;
      sigmoid[i] = u < -700 ? 0 : s;
      silu[i] = u * sigmoid[i];
      slope[i] = sigmoid[i] * (1 + u * rest);
      slope_terms[i] = std::fmax(std::fabs(slope[i]), sigmoid[i]);
    }
  }
};

// 1 / ulp of a float of this size.
inline double per_ulp(double size) {
  const double normal = size < 0x1p-126 ? 0x1p-126 : size;
  const uint64_t exponent = std::bit_cast<uint64_t>(normal) & (0x7ffull << 52);
  return std::bit_cast<double>((2069ull << 52) - exponent);  // 2069 = 2 * 1023 + 23
}

// The largest of the block's errors, as bits, whose order is that of non-negative doubles, with NaN
// beyond infinity.
template <bool SIGNED>
uint64_t errors_of(const float* x, const float* y, const double* exact, const double* size,
                   double* errors) {
  uint64_t worst = 0;
  for (int64_t i = 0; i < kBlockFloats; i++) {
    const double actual = y[i], right = exact[i];
    const double error = std::fabs(actual - right) * per_ulp(std::fabs(size[i]));
    const bool both_nan = (actual != actual) & (right != right);
    const bool fades = std::fabs(actual) <= std::fabs(right) * 1.00001 + kSmallest;
    const bool right_sign =
        !SIGNED | (std::bit_cast<int64_t>(actual) >= 0) == (std::bit_cast<int64_t>(right) >= 0);
    const bool passes = both_nan | (actual == right) | ((x[i] < kOverflow) & fades);
    const double counted = passes ? 0 : error;
    const double judged = right_sign | both_nan ? counted : std::numeric_limits<double>::infinity();
    errors[i] = judged;
    const uint64_t bits = std::bit_cast<uint64_t>(judged) & ~(1ull << 63);
    worst = bits > worst ? bits : worst;
  }
  return worst;
}

struct Worst {
  uint64_t bits = 0;
  float x = 0, actual = 0;
  double exact = 0;
};

struct Checked {
  const char* isa;
  const SiluForms& forms;
  Worst worst[kForms];

  SiluForm form(int i) const {
    const SiluForm all[] = {forms.sigmoid, forms.silu, forms.slope, forms.stored_fp32,
                            forms.stored_bf16};
    return all[i];
  }
};

Checked checked[] = {
#define ISA(name) {#name, effnet::name::silu_forms, {}},
    DRIVER_ISAS
#undef ISA
};

alignas(64) float x[kBlockFloats], y[kBlockFloats];
alignas(64) double errors[kBlockFloats];
Reference reference;

const double* exact_of(int form) {
  return form == kSigmoid ? reference.sigmoid : form == kSlope ? reference.slope : reference.silu;
}

// The block's largest error in y, as errors_of says.
uint64_t judge(int form) {
  return form == kSlope ? errors_of<false>(x, y, exact_of(form), reference.slope_terms, errors)
                        : errors_of<true>(x, y, exact_of(form), exact_of(form), errors);
}

Worst worst_of(int form) {
  const uint64_t bits = judge(form);
  int64_t i = 0;
  while ((std::bit_cast<uint64_t>(errors[i]) & ~(1ull << 63)) != bits) i++;
  return {bits, x[i], y[i], exact_of(form)[i]};
}

// What the set before has made of the block: two sets often give the same bits, judged once.
struct Judged {
  alignas(64) float y[kBlockFloats];
  uint64_t bits;
} judged[kForms];

void check_block() {
  reference.compute(x);
  bool has_judged[kForms] = {};
  for (Checked& set : checked) {
    for (int f = 0; f < kForms; f++) {
      if (!set.form(f)) continue;
      set.form(f)(x, y);
      if (!has_judged[f] || std::memcmp(y, judged[f].y, sizeof(y)) != 0) {
        judged[f].bits = judge(f);
        std::memcpy(judged[f].y, y, sizeof(y));
        has_judged[f] = true;
      }
      if (judged[f].bits > set.worst[f].bits) set.worst[f] = worst_of(f);
    }
  }
}

// The floats whose bits are first + i.
void check_from(uint32_t first) {
  for (int64_t i = 0; i < kBlockFloats; i++)
    x[i] = std::bit_cast<float>(first + static_cast<uint32_t>(i));
  check_block();
}

void check_grid() {
  for (uint32_t high = 0; high < 512; high++) {  // sign and exponent
    for (uint32_t i = 0; i < kBlockFloats; i++) {
      const uint32_t low = (high * 4096 + i) * 2654435761u >> 21;  // hashed: any of 2^11
      x[i] = std::bit_cast<float>(high << 23 | i << 11 | low);
    }
    check_block();
  }
  // Where 1 + exp(-x) becomes 1, exp(-x) infinite or 0, and where the forms clamp: 0.25 around.
  const float places[] = {17.33f, 86.64f, 87.34f, 88.03f, 88.73f, 90.53f, 103.97f, 104.0f, 127.0f};
  for (const float place : places)
    for (const float centre : {place, -place}) {
      const uint32_t bits = std::bit_cast<uint32_t>(centre), around = 1 << 15;
      for (uint32_t at = bits - around; at != bits + around; at += kBlockFloats) check_from(at);
    }
}

// exp_of against the C library's on about a million arguments.
bool reference_is_exact() {
  double worst = 0;
  for (double v = -700; v <= 700; v += 0.00137)
    worst = std::fmax(worst, std::fabs(exp_of(v) / std::exp(v) - 1));
  if (worst > kExpError) std::fprintf(stderr, "exp_of errs by %g\n", worst);
  return worst <= kExpError;
}

}  // namespace

int main(int argc, char** argv) {
  const bool grid = argc == 2 && std::strcmp(argv[1], "grid") == 0;
  if (!grid && argc != 3) {
    std::fprintf(stderr, "usage: %s grid | FIRST END\n", argv[0]);
    return 2;
  }
  if (!reference_is_exact()) return 1;
  if (grid) {
    check_grid();
  } else {
    const int64_t end = std::atoll(argv[2]);
    for (int64_t block = std::atoll(argv[1]); block < end; block++)
      check_from(static_cast<uint32_t>(block * kBlockFloats));
  }
  for (const Checked& set : checked)
    for (int f = 0; f < kForms; f++) {
      if (!set.form(f)) continue;
      const Worst& worst = set.worst[f];
      std::printf("%s %s %.4g %.9g %.9g %.9g\n", set.isa, kNames[f],
                  std::bit_cast<double>(worst.bits), worst.x, worst.actual, worst.exact);
    }
  return 0;
}
