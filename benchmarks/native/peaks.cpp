// Peak arithmetic rates of the CPU: chains of independent instructions on registers.
//
// Each function runs `iterations` rounds on each of `threads` threads and returns the operations
// done, two to a multiply-add; the caller times it. 12 chains cover a latency of 4 cycles on two
// units with room; 16 vector registers hold them and their two operands.

#include <cstdint>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kChains = 12;
#if defined(__x86_64__)
#define IN_REGISTER(value) asm volatile("" : "+v"(value))
#else
#define IN_REGISTER(value) asm volatile("" : "+w"(value))
#endif

using Vector = float __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / sizeof(float);

template <class Function>
void on_threads(int threads, Function function) {
  std::vector<std::thread> team;
  for (int t = 1; t < threads; ++t) team.emplace_back(function);
  function();
  for (auto &thread : team) thread.join();
}

// Written after the loop, so that the chains are computed at all.
volatile float sink;

void fma_chains(int64_t iterations) {
  Vector sum[kChains], factor, term;
  for (int i = 0; i < kLanes; ++i) factor[i] = 0.999f, term[i] = 1e-3f;
  for (auto &s : sum) s = factor;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (auto &s : sum) {
      s = s * factor + term;
      IN_REGISTER(s);
    }
  }
  float total = 0;
  for (auto &s : sum) total += s[0];
  sink = total;
}

}  // namespace

extern "C" {

double run_fma(int threads, int64_t iterations) {
  on_threads(threads, [=] { fma_chains(iterations); });
  return 2.0 * kLanes * kChains * static_cast<double>(iterations) * threads;
}

// Dot products of pairs of bf16 into fp32; 0 where the processor has no such instruction.
double run_dot(int threads, int64_t iterations) {
#ifdef __AVX512BF16__
  on_threads(threads, [=] {
    __m512 sum[kChains];
    for (auto &s : sum) s = _mm512_set1_ps(1.0f);
    const __m512bh a = _mm512_cvtne2ps_pbh(sum[0], sum[0]);
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
      for (auto &s : sum) {
        s = _mm512_dpbf16_ps(s, a, a);
        IN_REGISTER(s);
      }
    }
    float total = 0;
    for (auto &s : sum) total += _mm512_cvtss_f32(s);
    sink = total;
  });
  return 4.0 * 16 * kChains * static_cast<double>(iterations) * threads;
#else
  return 0.0 * threads * static_cast<double>(iterations);
#endif
}

}  // extern "C"
