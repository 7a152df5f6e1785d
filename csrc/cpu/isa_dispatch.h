// The kernels of each instruction set in this build, and what this CPU can run of them.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/args.h"

namespace effnet {

#ifndef EFFNET_HAS_AVX2
#define EFFNET_HAS_AVX2 0
#define EFFNET_HAS_AVX512 0
#define EFFNET_HAS_AVX512_BF16 0
#endif
#ifndef EFFNET_HAS_NEON
#define EFFNET_HAS_NEON 0
#endif

namespace generic {
extern const Kernels kernels;
}
#if EFFNET_HAS_AVX2
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#if EFFNET_HAS_NEON
namespace neon {
extern const Kernels kernels;
}
#endif

struct Isa {
  const char* name;
  const Kernels* kernels;
  std::string missing;  // empty where this CPU can run it
  bool has_bf16_products = false;
  bool amx = false;  // whether they go to the tile unit
};

inline std::string missing_features(const std::vector<std::pair<const char*, bool>>& wanted) {
  std::string missing;
  for (const auto& [name, present] : wanted)
    if (!present) missing += std::string(missing.empty() ? "this CPU lacks " : ", ") + name;
  return missing;
}

// Why the tile unit cannot be used, "" where it can: Linux lends its registers to a process that
// asks.
inline std::string missing_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID leaf 7, EDX
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile))
    return "this CPU lacks amx_bf16";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl, XSAVE component
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return "the operating system does not lend the AMX registers to this process";
  return "";
#else
  return "this build knows AMX on Linux alone";
#endif
}

// In ascending order of preference.
inline const std::vector<Isa>& instruction_sets() {
  static const std::vector<Isa> sets = [] {
    std::vector<Isa> out = {{"generic", &generic::kernels, ""}};
#if EFFNET_HAS_AVX2
#define EFFNET_HAS(feature) {feature, __builtin_cpu_supports(feature) != 0}
    __builtin_cpu_init();
    std::vector<std::pair<const char*, bool>> wanted = {EFFNET_HAS("avx2"), EFFNET_HAS("fma"),
                                                        EFFNET_HAS("f16c")};
    out.push_back({"avx2", &avx2::kernels, missing_features(wanted)});
    for (auto feature :
         std::vector<std::pair<const char*, bool>>{EFFNET_HAS("avx512f"), EFFNET_HAS("avx512bw"),
                                                   EFFNET_HAS("avx512dq"), EFFNET_HAS("avx512vl")})
      wanted.push_back(feature);
    out.push_back({"avx512", &avx512::kernels, missing_features(wanted)});
    wanted.push_back(EFFNET_HAS("avx512bf16"));
    out.push_back({"avx512_bf16", &avx512_bf16::kernels, missing_features(wanted), true});
    const std::string missing = out.back().missing;
    out.push_back(
        {"amx", &avx512_bf16::kernels, missing.empty() ? missing_amx() : missing, true, true});
#undef EFFNET_HAS
#endif
#if EFFNET_HAS_NEON
    out.push_back({"neon", &neon::kernels, ""});  // every 64-bit Arm CPU has it
#endif
    return out;
  }();
  return sets;
}

inline const Isa& best_isa() {
  const auto& sets = instruction_sets();
  for (size_t i = sets.size(); i-- > 0;)
    if (sets[i].missing.empty()) return sets[i];
  return sets[0];
}

inline const Isa* find_isa(const std::string& name) {
  for (const Isa& isa : instruction_sets())
    if (name == isa.name) return &isa;
  return nullptr;
}

// "" is the best one.
inline const Isa& isa_for(const std::string& name) {
  if (name.empty()) return best_isa();
  const Isa* isa = find_isa(name);
  if (!isa) throw std::invalid_argument("instruction set '" + name + "' is not in this build");
  if (!isa->missing.empty())
    throw std::invalid_argument("instruction set '" + name + "' cannot run: " + isa->missing);
  return *isa;
}

inline const Kernels& kernels_for(const std::string& name) { return *isa_for(name).kernels; }

}  // namespace effnet
