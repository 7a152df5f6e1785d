"""Which backend runs an op: the caller's choice, and what each backend can do."""

from effnet_fast.backends.base import OPS, Backend, OpArgs, is_channels_last
from effnet_fast.backends.choice import (
    BACKENDS,
    TEST_BACKENDS,
    backend_of,
    can_run,
    choose,
    current_backend,
    explain,
    in_transform,
    launcher_of,
    module_backend,
    parse,
    resolve,
    use_backend,
)
from effnet_fast.backends.cpu import CPU, NATIVE_DTYPES
from effnet_fast.backends.cuda import CUDA, CUDA_DTYPES, CUDA_KERNELS, SIMT
from effnet_fast.backends.triton import TRITON

__all__ = [
    "BACKENDS",
    "CPU",
    "CUDA",
    "CUDA_DTYPES",
    "CUDA_KERNELS",
    "NATIVE_DTYPES",
    "OPS",
    "SIMT",
    "TEST_BACKENDS",
    "TRITON",
    "Backend",
    "OpArgs",
    "backend_of",
    "can_run",
    "choose",
    "current_backend",
    "explain",
    "in_transform",
    "is_channels_last",
    "launcher_of",
    "module_backend",
    "parse",
    "resolve",
    "use_backend",
]
