// The forms of one instruction set, inlined into loops as kernels inline them.
//
// Compile with the set's flags and -DEFFNET_ISA=<instruction set>.
#include "silu_forms.h"

#include "cpu/network/silu.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <Vec (*FORM)(Vec)>
void apply(const float* x, float* y) {
  for (int64_t i = 0; i < kBlockFloats; i += kLanes) store(y + i, FORM(load(x + i)));
}

}  // namespace

extern const SiluForms silu_forms;
#if defined(__AVX512F__)
// Before they are rounded, values stored as bf16 are floats too.
const SiluForms silu_forms = {apply<sigmoid>, apply<silu>, apply<silu_grad>, apply<silu_as<float>>,
                              apply<silu_as<bf16>>};
#else
const SiluForms silu_forms = {apply<sigmoid>, apply<silu>, apply<silu_grad>, apply<silu_as<float>>,
                              nullptr};
#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
