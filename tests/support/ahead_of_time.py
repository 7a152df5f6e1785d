"""Compiles the kernels for GPUs that are not there: what a network launches, and what it needs.

The launchers run on meta tensors of a network's own shapes while `launching.start` records instead
of running, so that what is compiled are the constants really used.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effnet_fast.inference import packed_passes, triton_passes
from effnet_fast.modules.structure import Geometry
from effnet_fast.triton_kernels import (
    dwconv_bn_silu,
    expand_choice,
    launching,
    mbconv,
    mbconv_passes,
    pointwise_bn_act,
    pointwise_bn_silu_pool,
    squeeze_excite,
    stem_conv_bn_silu,
)
from shapes import BlockShape, shapes_of

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BATCHES = {"b0": 256, "b4": 64, "b7": 16}  # of training, as the benchmarks have them
BUDGETS = Path(__file__).parents[1] / "triton_kernels/budgets.json"
PRODUCTS = (
    "pointwise_fwd_kernel",
    "pointwise_pool_fwd_kernel",
    "pointwise_bwd_data_kernel",
    "pointwise_bwd_weight_kernel",
    "stem_fwd_kernel",
    "stem_bwd_weight_kernel",
)
# Compute capability and dtype of the images, and which kernels, None for all.
TARGETS = {
    (80, torch.bfloat16): None,
    (90, torch.bfloat16): None,
    (100, torch.bfloat16): None,
    (90, torch.float32): None,
    (90, torch.float16): PRODUCTS,
}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
OPTIONS = ("num_warps", "num_stages")


class Kinds(NamedTuple):
    """A block's activations and gate; the latter two are None without squeeze-and-excite."""

    activation: str
    se_activation: str | None
    gate: str | None


SILU = Kinds("silu", "silu", "sigmoid")
LITE = Kinds("relu6", None, None)
MOBILE = Kinds("relu", "relu", "hardsigmoid")


class Build(NamedTuple):
    """One kernel with its constants: what Triton compiles once.

    Attributes:
        name: of the kernel.
        signature: type of each argument.
        constants: the constant arguments.
        options: warps and stages.
    """

    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        parts = [f"{k}={v}" for k, v in (*self.constants, *self.options) if v is not None]
        absent = [k for k, v in self.constants if v is None]
        types = sorted({t for _, t in self.signature if t.startswith("*")})
        return f"{self.name}({', '.join([*types, *parts])}; without {', '.join(absent)})"


class Resources(NamedTuple):
    """What one build takes: registers per thread, bytes of shared memory and of spills."""

    registers: int
    shared: int
    spilled: int


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    return "constexpr" if value is None else "fp32"


def record(run: Callable[[], Any]) -> dict[Build, Any]:
    """What `run` launches, each build once, and the kernel of each."""
    builds = {}

    def start(kernel: Any, grid: Any, args: Any, constants: dict[str, Any]) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        fixed = {}
        for parameter in kernel.params[len(args) :]:
            kind = fixed if parameter.is_constexpr else named
            kind[parameter.name] = constants[parameter.name]
        types = {k: _type(v) for k, v in named.items()} | dict.fromkeys(fixed, "constexpr")
        signature = {name: types[name] for name in kernel.arg_names}
        fixed |= {k: None for k, v in named.items() if v is None}
        options = tuple((k, constants[k]) for k in OPTIONS)
        build = Build(
            kernel.__name__, tuple(signature.items()), tuple(sorted(fixed.items())), options
        )
        builds[build] = kernel

    original, launching.start = launching.start, start
    try:
        run()
    finally:
        launching.start = original
    return builds


def _image(n: int, c: int, size: int, dtype: torch.dtype) -> Tensor:
    return launching.empty_nhwc(torch.empty(0, dtype=dtype, device="meta"), (n, c, size, size))


def _vectors(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def run_training(block: BlockShape, batch: int, dtype: torch.dtype, kinds: Kinds = SILU) -> None:
    """Every pass of a block's training step, on meta tensors; parameters in fp32."""
    activation, *se_kinds = kinds
    c, e, out = block.channels
    k, stride, r = block.kernel, block.stride, block.squeezed
    sides = ((k - 1) // 2,) * 4
    x = _image(batch, c, block.size, dtype)
    rows = _vectors(batch)
    bn = (_vectors(e), _vectors(e), None, None)
    h, norm = x, None
    if block.expands:
        h, norm = mbconv_passes.mbconv_expand(x, _vectors(e, c, 1, 1), *bn, 1e-3, "triton")
    weight = _vectors(e, 1, k, k)
    z2, norm2 = mbconv_passes.mbconv_depthwise(
        h, norm, weight, *bn, stride, sides, 1e-3, activation, "triton"
    )
    layers = (_vectors(r, e), _vectors(r), _vectors(e, r), _vectors(e))
    gate = q = None
    sums2 = _vectors(2, e)
    if kinds.gate:
        pooled, slopes = mbconv_passes.mbconv_squeeze(z2, norm2, activation, "triton")
        hidden, gate = squeeze_excite.excite(pooled, *layers, *se_kinds, "triton")
    project, bn3 = _vectors(out, e, 1, 1), (_vectors(out), _vectors(out), None, None)
    z3, norm3 = mbconv_passes.mbconv_project(
        z2, norm2, gate, project, *bn3, 1e-3, activation, "triton"
    )
    keep, added = (rows, x) if block.residual else (None, None)
    y = mbconv_passes.mbconv_finish(z3, norm3, keep, added, "triton")
    sums3 = mbconv_passes.mbconv_finish_backward(y, keep, z3, norm3, "triton")
    both = [True, True]
    grad, sums, _ = mbconv_passes.mbconv_project_backward(
        y, keep, z3, norm3, sums3, project, z2, norm2, gate, both, activation, "triton"
    )
    if kinds.gate:
        q, sums2, *_ = mbconv_passes.mbconv_excite_backward(
            sums, slopes, pooled, hidden, gate, layers[0], layers[2], 1, *se_kinds, "triton"
        )
    residual = y if block.residual else None
    f, _, sums1 = mbconv_passes.mbconv_depthwise_backward(
        grad, gate, q, z2, norm2, sums2, h, norm, weight, residual, stride, sides, both,
        activation, "triton",
    )  # fmt: skip
    if block.expands:
        mbconv_passes.mbconv_expand_backward(
            f, h, norm, sums1, x, _vectors(e, c, 1, 1), residual, both, "triton"
        )


def run_inference(block: BlockShape, batch: int, dtype: torch.dtype, kinds: Kinds = SILU) -> None:
    """A block's inference, on meta tensors, both ways; parameters in x's dtype."""
    c, e, out = block.channels
    k, r = block.kernel, block.squeezed

    def layer(*shape: int) -> list[Tensor]:
        return [v.to(dtype) for v in (_vectors(*shape), *(_vectors(shape[0]),) * 4)]

    squeeze = (_vectors(r, e), _vectors(r), _vectors(e, r), _vectors(e)) if kinds.gate else ()
    joins = block.expands and c <= expand_choice.MAX_CHANNELS and dtype != torch.float32
    names = [kind or "identity" for kind in kinds[:2]] + [kinds.gate or "sigmoid"]
    ways = (False, True) if joins else (False,)
    for fused in ways:
        mbconv.mbconv_eval(
            _image(batch, c, block.size, dtype), layer(e, c, 1, 1) if block.expands else [],
            layer(e, 1, k, k), [v.to(dtype) for v in squeeze], layer(out, e, 1, 1),
            block.stride, ((k - 1) // 2,) * 4, (1e-3,) * 3, block.residual, *names, "triton",
            fused=fused,
        )  # fmt: skip


def run_deployed(block: BlockShape, batch: int, dtype: torch.dtype) -> None:
    """A block's inference over weights packed ahead, on meta tensors."""
    c, e, out = block.channels
    k, r = block.kernel, block.squeezed
    geometry = Geometry((k, k), (block.stride,) * 2, ((k - 1) // 2,) * 4)

    def product(rows: int, columns: int, activation: str) -> packed_passes.Product:
        weight = _vectors(rows, columns).to(dtype)
        return triton_passes.Product("triton", weight, _vectors(rows), activation)

    layers = (_vectors(r, e), _vectors(r), _vectors(e, r), _vectors(e))
    packed = packed_passes.MBConv(
        product(e, c, "silu") if block.expands else None,
        triton_passes.Depthwise(
            "triton", _vectors(e, 1, k, k), _vectors(e), geometry, dtype, "silu"
        ),
        triton_passes.Excite("triton", layers, dtype, "silu", "sigmoid"),
        product(out, e, "identity"),
        block.residual,
    )
    packed(_image(batch, c, block.size, dtype))


def run_ops(block: BlockShape, batch: int, dtype: torch.dtype) -> None:
    """The ops that stand alone, training, on meta tensors."""
    e, k, stride = block.channels[1], block.kernel, block.stride
    sides = ((k - 1) // 2,) * 4
    x, weight, bn = _image(batch, e, block.size, dtype), _vectors(e, 1, k, k), (_vectors(e),) * 4
    z, *_ = dwconv_bn_silu.dwconv_statistics(x, weight, stride, sides, "triton")
    dwconv_bn_silu.bn_silu(z, *bn, 1e-3, "silu", "triton")
    dwconv_bn_silu.dwconv_bn_silu_backward(
        z, x, z, weight, *bn, stride, sides, 1e-3, True, [True] * 3, "silu", "triton"
    )
    layers = (_vectors(block.squeezed, e), None, _vectors(e, block.squeezed), None)
    kinds = ("silu", "sigmoid", "triton")
    y, pooled, hidden, gate = squeeze_excite.squeeze_excite(z, *layers, *kinds)
    squeeze_excite.squeeze_excite_backward(y, z, layers[0], layers[2], pooled, hidden, gate, *kinds)
    pointwise_bn_act.pointwise_bn_act_eval(
        z, _vectors(2 * e, e, 1, 1), *(_vectors(2 * e),) * 4, None, None, 1e-3, "silu", "triton"
    )


def run_head(variant: str, batch: int, dtype: torch.dtype) -> None:
    """The last convolution with the pooling, on meta tensors; parameters in x's dtype or fp32."""
    head = shapes_of(variant).head
    x = _image(batch, head.channels, head.size, dtype)
    tensors = (_vectors(head.out_channels, head.channels), *(_vectors(head.out_channels),) * 4)
    pointwise_bn_silu_pool.pointwise_bn_silu_pool_eval(
        x, *(t.to(dtype) for t in tensors), 1e-3, "silu", "triton"
    )
    weight, *bn = tensors[:3]
    z, norm = mbconv_passes.mbconv_expand(x, weight, *bn, None, None, 1e-3, "triton")
    pooled, _ = mbconv_passes.mbconv_squeeze(z, norm, "silu", "triton")
    for sums in (norm[:2], None):
        pointwise_bn_silu_pool.pointwise_bn_silu_pool_backward(
            pooled, z, norm, sums, x, weight, [True, True], "silu", "triton"
        )


def run_stem(variant: str, batch: int, dtype: torch.dtype, training: bool) -> None:
    """The first convolution, on meta tensors; parameters in fp32, in inference in x's dtype."""
    stem = shapes_of(variant).stem
    x = torch.empty(batch, 3, stem.size, stem.size, dtype=dtype, device="meta")
    weight, bn = _vectors(stem.out_channels, 3, 3, 3), (_vectors(stem.out_channels),) * 4
    geometry = ((2, 2), (1, 1, 1, 1))
    if not training:
        tensors = (t.to(dtype) for t in (weight, *bn))
        stem_conv_bn_silu.stem_conv_bn_silu_eval(x, *tensors, *geometry, 1e-3, "silu", "triton")
        shift = _vectors(stem.out_channels)
        packed = Geometry((3, 3), (2, 2), (1, 1, 1, 1))
        triton_passes.Convolution("triton", weight.to(dtype), shift, packed, "silu")(x)
        return
    given = (*bn[:2], None, None)
    z, norm = stem_conv_bn_silu.stem_conv(x, weight, *given, *geometry, 1e-3, "triton")
    y = stem_conv_bn_silu.norm_silu(z, norm, "silu", "triton")
    sums = stem_conv_bn_silu.norm_silu_sums(y, z, norm, "silu", "triton")
    for means in (sums, None):
        stem_conv_bn_silu.stem_weight_backward(
            y, z, norm, means, x, weight, *geometry, "silu", "triton"
        )


@functools.cache
def builds_of(variant: str, dtype: torch.dtype) -> dict[Build, Any]:
    """What a network launches: inference of one image, a training step, and the ops alone."""
    found: dict[Build, Any] = {}
    for block in dict.fromkeys(shapes_of(variant).blocks):
        found |= record(functools.partial(run_training, block, BATCHES[variant], dtype))
        found |= record(functools.partial(run_inference, block, BATCHES[variant], dtype))
        found |= record(functools.partial(run_inference, block, 1, dtype))
        found |= record(functools.partial(run_ops, block, BATCHES[variant], dtype))
    for batch in (1, BATCHES[variant]):
        found |= record(functools.partial(run_head, variant, batch, dtype))
        for training in (False, True):
            found |= record(functools.partial(run_stem, variant, batch, dtype, training))
    return found


@functools.cache
def builds(dtype: torch.dtype) -> dict[Build, Any]:
    """What B0, B4 and B7 launch."""
    return {build: kernel for v in BATCHES for build, kernel in builds_of(v, dtype).items()}


def compile_build(kernel: Any, build: Build, capability: int) -> Any:
    """The compiled kernel; Triton keeps results in its cache folder between runs."""
    pointers = [i for i, (_, t) in enumerate(build.signature) if t.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=dict(build.signature),
        constexprs=dict(build.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options = dict(build.options) | {"enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled: Any) -> Resources:
    """Registers and spills as cuobjdump reads them, shared memory as Triton allots it."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin=compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, local = map(int, found.groups())
    return Resources(registers, compiled.metadata.shared, stack + local)


def instructions(compiled: Any) -> Iterator[str]:
    """The opcodes of the machine code, as "HGMMA.64x128x16.F32.BF16"."""
    text = _tool("cuobjdump", "--dump-sass", cubin=compiled.asm["cubin"])
    return (found[1] for found in OPCODE.finditer(text))


def measure() -> dict[str, dict[str, list[int]]]:
    """The most registers and bytes of shared memory, by capability and kernel."""
    table: dict[str, dict[str, list[int]]] = {}
    for (capability, dtype), kernels in TARGETS.items():
        for build, kernel in builds(dtype).items():
            if kernels is None or build.name in kernels:
                found = resources(compile_build(kernel, build, capability))
                if found.spilled:
                    print(f"sm_{capability}: {found.spilled} bytes spilled by {build}")
                most = table.setdefault(f"{capability}", {}).setdefault(build.name, [0, 0])
                most[:] = max(most[0], found.registers), max(most[1], found.shared)
    return table


if __name__ == "__main__":
    rows = {
        capability: "{\n"
        + ",\n".join(f"    {json.dumps(k)}: {v}" for k, v in sorted(kernels.items()))
        + "\n  }"
        for capability, kernels in measure().items()
    }
    text = ",\n".join(f'  "{capability}": {kernels}' for capability, kernels in rows.items())
    BUDGETS.write_text(f"{{\n{text}\n}}\n")
