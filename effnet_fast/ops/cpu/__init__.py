"""From tensors to the C++ kernels: one module per file of `effnet_fast.ops`."""
