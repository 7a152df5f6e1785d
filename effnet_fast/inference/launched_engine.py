"""The engine of a GPU: a network packed for kernels that are launched one after another.

It runs wherever its backends do, which for tests is a CPU too. See `packed_passes` for what is
packed and `cuda_graphs` for what saves the launches.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.inference import cuda_graphs
from effnet_fast.inference import packed_passes as passes
from effnet_fast.inference.fold import folded
from effnet_fast.inference.network_spec import BlockSpec, NetworkSpec
from effnet_fast.inference.sizes import sizes_of
from effnet_fast.modules import structure
from effnet_fast.modules.dense_block import DenseBlock


class LaunchedEngine:
    """An `Engine` of launched kernels.

    Args:
        dtype: fp32, bf16 or fp16, in which the passes hand on their results.
        backend: "auto" takes, pass by pass, what `preference` names first; "cuda", "triton" or
            "simt" that alone, where 1x1 convolutions of "cuda" and "simt" are PyTorch's products.
        limit: CUDA graphs that are kept at most; 0 for none.

    Raises:
        RuntimeError: a backend cannot run a pass, or fp16 cannot hold a folded weight.
    """

    def __init__(self, spec: NetworkSpec, dtype: torch.dtype, backend: str, limit: int) -> None:
        weight = spec.stem.tensors[0]
        assert weight is not None
        self.spec, self.sizes = spec, sizes_of(spec)
        self.dtype, self.backend = dtype, backend
        self.device = weight.device
        self.captured = False
        self._overflows: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad(), self._guard():
            self._pack()
        self._check_range()
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors)
        self._recorder = cuda_graphs.recorder_of(self.device)
        self._lent: set[int] = set()
        self._graphs: cuda_graphs.Graphs | None = None
        if self._recorder is not None and limit:
            self._graphs = cuda_graphs.Graphs(
                self.run, dtype, self._recorder, limit, self._settings
            )
        if self.device.type == "cuda":  # every stream may read the weights from now on
            torch.cuda.current_stream(self.device).synchronize()

    def _guard(self) -> AbstractContextManager[Any]:
        on_cuda = self.device.type == "cuda"
        return torch.cuda.device(self.device) if on_cuda else contextlib.nullcontext()

    def _settings(self) -> cuda_graphs.Key:
        """What fp32 products depend on."""
        if self.dtype is not torch.float32:
            return ()
        cudnn: Any = torch.backends.cudnn
        return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision

    def _pack(self) -> None:
        spec = self.spec
        self._stem = self._convolution(spec.stem)
        self._blocks = [self._any_block(block) for block in spec.blocks]
        self._head = self._product(spec.head) if spec.head else None
        self._linear: list[Tensor] = []
        if spec.linear is not None:
            parameters = (spec.linear.weight, spec.linear.bias)
            self._linear = [self._rounded(p.detach()) for p in parameters if p is not None]
        packed = [self._stem, *(p for block in self._blocks for p in block.passes())]
        packed += [self._head] if self._head else []
        self._tensors = [tensor for p in packed for tensor in p.tensors] + self._linear

    def _rounded(self, tensor: Tensor) -> Tensor:
        """A copy in the engine's dtype."""
        rounded = tensor.to(self.dtype, copy=True)
        if self.dtype is torch.float16:
            self._overflows.append((rounded.isinf() & tensor.isfinite()).any())
        return rounded

    def _check_range(self) -> None:
        overflows, self._overflows = self._overflows, []
        if overflows and torch.stack(overflows).any():
            raise RuntimeError(
                "a weight with its BatchNorm folded in is beyond torch.float16's largest value: "
                "deploy the network in torch.bfloat16 or torch.float32"
            )

    def _choose(self, op: str, **sizes: Any) -> str:
        return passes.choose(op, self.backend, self.dtype, self.device, **sizes)

    def _convolution(self, layer: structure.Layer) -> passes.Convolution:
        backend = self._choose("pointwise_bn_act", activations=(layer.activation,))
        weight, shift = folded(layer)
        return passes.on(backend).Convolution(
            backend, self._rounded(weight), shift, layer.geometry, layer.activation
        )

    def _product(self, layer: structure.Layer) -> passes.Product:
        named = (layer.activation,) if layer.activates else ()  # every kernel can do without one
        backend = self._choose("pointwise_bn_act", activations=named)
        weight, shift = folded(layer)
        return passes.on(backend).Product(
            backend, self._rounded(weight.flatten(1)), shift, layer.activation
        )

    def _any_block(self, block: BlockSpec) -> passes.MBConv | passes.FusedMBConv:
        layers = block.layers
        if not isinstance(layers, DenseBlock):
            return self._block(layers)
        project = self._product(layers.project) if layers.project else None
        return passes.FusedMBConv(self._convolution(layers.dense), project, layers.residual)

    def _block(self, layers: structure.Block) -> passes.MBConv:
        geometry, activation = layers.depthwise.geometry, layers.activation
        backend = self._choose(
            "dwconv_bn_silu",
            kernel=geometry.kernel,
            stride=geometry.stride[0],
            activations=(activation,),
        )
        weight, shift = folded(layers.depthwise)
        self._rounded(weight)  # for its range alone
        return passes.MBConv(
            self._product(layers.expand) if layers.expand else None,
            passes.on(backend).Depthwise(backend, weight, shift, geometry, self.dtype, activation),
            self._excite(layers),
            self._product(layers.project),
            layers.residual,
        )

    def _excite(self, block: structure.Block) -> passes.Excite | None:
        if block.excite is None:
            return None
        backend = self._choose(
            "squeeze_excite",
            hidden=block.excite.reduce_weight.shape[0],
            activations=(block.se_activation,),
            gate=block.gate,
        )
        return passes.on(backend).Excite(
            backend, block.excite, self.dtype, block.se_activation, block.gate
        )

    def run(self, x: Tensor) -> list[Tensor]:
        """As `Engine.__call__`, of channels_last images [N,C,H,W] in the engine's dtype."""
        spec, maps = self.spec, {}
        h = self._stem(x)
        if spec.stem_tap >= 0:
            maps[spec.stem_tap] = h
        for block, packed in zip(spec.blocks, self._blocks, strict=True):
            h = packed(h)
            if block.tap >= 0:
                maps[block.tap] = h
        results = [maps[tap] for tap in sorted(maps)]
        if self._head is None:
            return results
        y = passes.on(self._head.backend).pool(self._head(h), self._head.backend)
        if self._linear:
            y = F.linear(y.to(self.dtype), *self._linear)
        return [y, *results]

    def _launch(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """`run` by plain launches, results in `dtype`."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return [result.to(dtype) for result in self.run(x)]

    def _run(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        if self._recorder is None:
            return self._launch(x, dtype)
        if self._recorder.capturing():
            self.captured = True
            return self._launch(x, dtype)
        self._lend(self._recorder)
        results = None if self._graphs is None else self._graphs.run(x, dtype)
        return self._launch(x, dtype) if results is None else results

    def _lend(self, recorder: cuda_graphs.CudaRecorder) -> None:
        """Before a stream reads the weights for the first time."""
        stream = recorder.stream()
        if stream not in self._lent:
            recorder.lend(self._tensors)
            self._lent.add(stream)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
        """As `Engine.__call__` says; the maps are channels_last."""
        outputs = self.sizes.outputs
        n, _, height, width = x.shape
        maps = self.sizes.maps(height, width)
        if n == 0:
            results = [x.new_empty((0, *size), dtype=dtype) for size in maps]
            if outputs:
                results.insert(0, x.new_empty((0, outputs), dtype=dtype))
        else:
            with self._guard(), _without_autocast(x.device.type):
                results = self._run(x, dtype)
        return (results[0], results[1:]) if outputs else (None, results)

    def close(self) -> None:
        """Frees the graphs; calls that are under way end as they began."""
        if self._graphs is not None:
            self._graphs.close()


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
