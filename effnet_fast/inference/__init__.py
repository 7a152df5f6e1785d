"""A whole network for inference: what of it the kernels know, its packed weights, its engines."""

from effnet_fast.backends import CUDA, SIMT, TRITON

for _backend in (CUDA, SIMT):
    _backend.pack_passes_by("effnet_fast.inference.cuda_passes")
TRITON.pack_passes_by("effnet_fast.inference.triton_passes")
