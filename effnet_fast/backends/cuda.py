"""The CUDA kernels: on a GPU, and as "simt" on the CPU, where the tests have built that."""

from __future__ import annotations

import torch

from effnet_fast.backends import native
from effnet_fast.backends.base import Backend, OpArgs, kernel_reason

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_KERNELS = (3, 5)  # sides of the depthwise kernels
CUDA_OPS = ("dwconv_bn_silu", "squeeze_excite")
# Of squeeze-and-excite: what a block's shared memory and the grid's second dimension hold.
CUDA_MAX_HIDDEN, CUDA_MAX_IMAGES = 6000, 4 * 65535

_probes: dict[int, str] = {}  # what the extension said, by device


def _cuda_reason(op: str, args: OpArgs | None, isa: str) -> str | None:
    if reason := native.unavailable_reason():
        return reason
    on_cuda = args is not None and args.x.device.type == "cuda"
    device = args.x.device.index if args is not None and on_cuda else 0
    return _probe(device) or _call_reason(CUDA, op, args)


def _simt_reason(op: str, args: OpArgs | None, isa: str) -> str | None:
    return native.simt_unavailable_reason() or _call_reason(SIMT, op, args)


def _call_reason(backend: Backend, op: str, args: OpArgs | None) -> str | None:
    """Why the kernels cannot run a call."""
    if op not in CUDA_OPS:
        return f"this version has no CUDA kernel for {op}"
    if args is None:
        return None
    (device,) = backend.devices
    if args.x.device.type != device:
        return f"x is on {args.x.device}, the {backend.name} backend takes {device.upper()} tensors"
    return kernel_reason(backend, op, args) or _size_reason(backend.name, op, args)


def _probe(device: int) -> str | None:
    if device not in _probes:
        _probes[device] = native.load().cuda_probe(device)
    return _probes[device] or None


def _size_reason(backend: str, op: str, args: OpArgs) -> str | None:
    if op == "dwconv_bn_silu":
        if args.kernel[0] in CUDA_KERNELS:
            return None
        sides = " and ".join(f"{k}x{k}" for k in CUDA_KERNELS)
        return f"the kernel is {args.kernel[0]}x{args.kernel[1]}; {backend} has {sides}"
    reduce_weight = args.others[0]
    assert reduce_weight is not None
    if reduce_weight.shape[0] > CUDA_MAX_HIDDEN:
        return f"R is {reduce_weight.shape[0]}; {backend} takes up to {CUDA_MAX_HIDDEN}"
    if args.x.shape[0] > CUDA_MAX_IMAGES:
        return f"N is {args.x.shape[0]}; {backend} takes up to {CUDA_MAX_IMAGES}"
    return None


# Over packed weights a 1x1 convolution is PyTorch's product, and a kernel of every build after it.
_PACKED_AS = {"pointwise_bn_act": "squeeze_excite"}
_ACTIVATIONS = ("silu", "identity", "relu", "relu6")  # SiLU and clamps
_GATES = ("sigmoid", "hardsigmoid")
CUDA = Backend(
    *("cuda", CUDA_DTYPES, ("cuda",), _cuda_reason, _PACKED_AS),
    activations=_ACTIVATIONS,
    gates=_GATES,
)
SIMT = Backend(
    *("simt", CUDA_DTYPES, ("cpu",), _simt_reason, _PACKED_AS),
    activations=_ACTIVATIONS,
    gates=_GATES,
)
