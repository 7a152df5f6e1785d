// effnet_fast._C: pointers, sizes and strides in, an exception out. No torch headers.
//
// Tensors come as addresses; the caller has checked dtypes, shapes and layouts, and this file
// guards what would corrupt memory: sizes, strides, and the instruction set against the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/bind.h"
#include "bindings/parts.h"
#include "cpu/isa_dispatch.h"

PYBIND11_MODULE(_C, m) {
  using namespace effnet;
  m.doc() = "Kernels of effnet_fast; called through effnet_fast.ops.";
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Isa& isa : instruction_sets()) names.push_back(isa.name);
        return names;
      },
      "Instruction sets in this build, in ascending order of preference.");
  m.def("best_isa", [] { return std::string(best_isa().name); });
  m.def(
      "isa_unavailable_reason",
      [](const std::string& name) -> py::object {
        const Isa* isa = find_isa(name);
        if (!isa) return py::str("instruction set '" + name + "' is not in this build");
        return isa->missing.empty() ? py::object(py::none()) : py::str(isa->missing);
      },
      "None where this CPU can run the instruction set, else the reason.");
  m.def(
      "running_calls", [] { return Share::calls().load(); },
      "Kernels that run at this moment, which share the cores.");
  m.def(
      "kept_bytes",
      [] {
        const int64_t floats = kernel_scratch().held() + partial_scratch().held();
        return floats * static_cast<int64_t>(sizeof(float));
      },
      "Bytes of scratch memory that this thread keeps for its next calls.");
  m.def("compiler", [] { return std::string("g++ " __VERSION__); });
#ifdef EFFNET_CUDA_ARCHS
  m.def("cuda_built", [] { return true; });
  m.def("cuda_archs", [] { return std::string(EFFNET_CUDA_ARCHS); });
  py::module_ launchers = m.def_submodule("cuda");
  cuda::bind(launchers);
  m.attr("cuda_probe") = launchers.attr("probe");
#else
  m.def("cuda_built", [] { return false; });
  m.def("cuda_archs", [] { return std::string(); });
  m.def(
      "cuda_probe",
      [](int) {
        return std::string("this build has no CUDA part: nvcc was not found or EFFNET_FAST_CUDA=0");
      },
      py::arg("device") = 0);
#endif
  bind_block(m);
  bind_buffers(m);
  bind_norms(m);
  bind_dwconv(m);
  bind_gate(m);
  bind_squeeze_excite(m);
  bind_mbconv(m);
  bind_network(m);
  bind_stem(m);
  bind_watch(m);
}
