// The CUDA part as the bindings see it: plain C++, no CUDA headers.
#pragma once

#include <string>

namespace effnet {

// Runs a trivial kernel on `device` and reads its answer back. Empty where it ran, else the reason.
std::string cuda_probe(int device);

}  // namespace effnet
