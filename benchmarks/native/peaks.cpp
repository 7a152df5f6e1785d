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
  for (auto& thread : team) thread.join();
}

// Written after the loop, so that the chains are computed at all.
volatile float sink;

// Named variables: GCC 12 keeps an array of vectors in memory and the chains then time the stack.
#define EACH_CHAIN(STEP) \
  STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)

void fma_chains(int64_t iterations) {
  const Vector factor = Vector{} + 0.999f, term = Vector{} + 1e-3f;
#define BEGIN(i) Vector s##i = factor;
#define STEP(i)                \
  s##i = s##i * factor + term; \
  IN_REGISTER(s##i);
#define ADD(i) total += s##i;
  EACH_CHAIN(BEGIN)
  for (int64_t n = 0; n < iterations; ++n) {
    EACH_CHAIN(STEP)
  }
  Vector total{};
  EACH_CHAIN(ADD)
  sink = total[0];
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
    for (auto& s : sum) s = _mm512_set1_ps(1.0f);
    const __m512bh a = _mm512_cvtne2ps_pbh(sum[0], sum[0]);
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
      for (auto& s : sum) {
        s = _mm512_dpbf16_ps(s, a, a);
        IN_REGISTER(s);
      }
    }
    float total = 0;
    for (auto& s : sum) total += _mm512_cvtss_f32(s);
    sink = total;
  });
  return 4.0 * 16 * kChains * static_cast<double>(iterations) * threads;
#else
  return 0.0 * threads * static_cast<double>(iterations);
#endif
}

}  // extern "C"
