"""From tensors to the CPU's kernels: one module per file of `effnet_fast.ops`."""
