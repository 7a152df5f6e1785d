// What each file here adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace effnet {

void bind_buffers(pybind11::module_& m);
void bind_norms(pybind11::module_& m);
void bind_block(pybind11::module_& m);
void bind_dwconv(pybind11::module_& m);
void bind_gate(pybind11::module_& m);
void bind_squeeze_excite(pybind11::module_& m);
void bind_mbconv(pybind11::module_& m);
void bind_network(pybind11::module_& m);
void bind_stem(pybind11::module_& m);
void bind_watch(pybind11::module_& m);

namespace cuda {
void bind(pybind11::module_& m);
}

}  // namespace effnet
