// effnet_fast._C_simt: the bindings of the CUDA kernels over the host run. Test only.
#include <pybind11/pybind11.h>

#include "bindings/bind.h"
#include "simt/seed.h"

PYBIND11_MODULE(_C_simt, m) {
  m.doc() = "The CUDA kernels of effnet_fast, run on the CPU by its tests.";
  m.def("set_seed", &effnet::simt::set_seed, pybind11::arg("seed"),
        "Orders the threads of the launches that follow.");
  pybind11::module_ launchers = m.def_submodule("cuda");
  effnet::cuda::bind(launchers);
}
