"""From tensors to the CUDA kernels: one module per file of `effnet_fast.ops`.

Each holds a function per registered op, with the op's name and arguments, and the passes of a fused
MBConv that take more than the op does. The backend is "cuda", or "simt" for the same kernels run on
the CPU by tests. Nothing here synchronises; what a kernel needs is allocated by torch.
"""
