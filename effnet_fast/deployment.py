"""`effnet_fast.deploy`: the form of a network for inference alone, the fastest there is.

BatchNorm is folded into weights that are packed once. On a CPU a call runs the whole network in
C++; on a GPU it replays a CUDA graph of the kernels, or launches them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.backends import native
from effnet_fast.inference import images
from effnet_fast.inference.cuda_graphs import LIMIT
from effnet_fast.inference.network_spec import spec_of
from effnet_fast.inference.parts import changed_method, network_class, parts_of, presented
from effnet_fast.inference.snapshot import (
    Engine,
    Snapshot,
    SnapshotKeeper,
    run_network,
    runs_in_one_call,
)
from effnet_fast.modules import observed
from effnet_fast.modules.structure import RefusedError

# Backends whose kernels are launched, by device; Triton takes a CPU in its interpreter.
LAUNCHED = {"cuda": ("auto", "cuda", "triton"), "cpu": ("cuda", "triton", "simt")}


def deploy(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
    graphs: int = LIMIT,
) -> DeployedEfficientNet:
    """The inference form of a network; `model` itself stays as it is.

    Args:
        model: an EfficientNet or EfficientNetFeatures on a CPU or a CUDA device, in eval mode, or
            that of a package whose networks `accelerate` takes (encoders, too), accelerated or not.
        dtype: of the activations between layers, None for the dtype of the model's parameters:
            torch.float32 or torch.bfloat16, on a CUDA device torch.float16 too. Sums are always
            fp32. Where a CPU's instruction set does not multiply bf16, the network is computed in
            fp32, which is more exact.
        backend: on a CPU "auto", "cpu", or "cpu:<instruction set>" to force one. On a CUDA device
            "auto", which takes for each pass the preferred kernel that runs there, "triton", or
            "cuda", whose 1x1 convolutions are PyTorch's own products with a kernel after them.
        graphs: the largest number of CUDA graphs, one per shape of the images; 0 for none. The
            first call with a shape captures its graph. Shapes beyond the limit run without a
            graph. Such a shape replaces the least recently used graph once it has been used
            `inference.cuda_graphs.PATIENCE` times since that graph's last use. Ignored on a CPU.

    Returns:
        a module that takes images [N,C,H,W] in fp32 or bf16 (on a CUDA device fp16 too), of any
        size and strides, and returns the model's output in the images' dtype. It records no
        gradient. The output belongs to the caller; any thread and any stream may call.

    Raises:
        TypeError: model is no network that this package knows.
        ValueError: another dtype or backend, or a negative number of graphs.
        RuntimeError: the model cannot be deployed as it is, with the reason: it is in training
            mode, on another device, has hooks or replaced layers; no kernel can run there, or the
            extension is missing.
    """
    return DeployedEfficientNet(model, dtype, backend, graphs)


def _uncompiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps torch.compile out of the call, at which it breaks the graph."""

    @functools.wraps(forward)
    def call(self: nn.Module, x: Tensor) -> Any:
        # Only then: `disable` imports Dynamo, which takes seconds.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(forward)(self, x)
        return forward(self, x)

    return call


class _Packed(SnapshotKeeper):
    """The engine of a deployed network; arguments as for `deploy`."""

    def __init__(self, dtype: torch.dtype, backend: str, graphs: int) -> None:
        super().__init__()
        self.dtype, self.backend, self.graphs = dtype, backend, graphs
        self._captured: list[Engine] = []  # whose weights a graph of the caller's reads

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dtype, self.backend, self.graphs)

    def engine(self, model: nn.Module) -> Engine:
        """The engine of the network as it is now."""
        snapshot = self.current(model)
        assert snapshot is not None
        return snapshot.engine_for(self.dtype, self.backend)

    def _renew(self, model: nn.Module) -> Snapshot:
        _check_model(model)
        device = _device_of(model)
        _check_target(device, self.dtype, self.backend)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the network's weights have changed, and cannot be packed while a CUDA graph is "
                "captured: call it once before the capture"
            )
        try:
            snapshot = Snapshot(model, device, self.graphs)
        except RefusedError as refused:
            raise _refusal(model, refused) from None
        try:
            snapshot.engine_for(self.dtype, self.backend)
        except RuntimeError as error:
            raise RuntimeError(f"deploy cannot use backend {self.backend!r}: {error}") from error
        for old in self.snapshot.engines.values() if self.snapshot else ():
            old.close()
            if old.captured:
                self._captured.append(old)
        return snapshot


class DeployedEfficientNet(nn.Module):
    """The module that `deploy` returns.

    The original network stays its `source` and may change. Every call compares parameters and
    buffers by identity, version counter, address and layout, on a CPU by a few values of each too.
    Where they differ, the weights are packed again and graphs of the old weights are dropped. Some
    edits change none of these; call `refresh` after them: edits of single values through `.data`,
    NumPy or another process, and of tensors made in inference mode, which keep no counter; on a
    CUDA device all such edits. (The source itself, called in eval mode on a CPU, compares every
    byte.) State dict, parameters and children are the source's.

    While the caller captures a CUDA graph, the kernels become part of that graph, with the weights
    of that moment.

    Attributes:
        source: the network.
        dtype: of the packed weights.
        backend, graphs: as given to `deploy`.
    """

    source: Any

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, backend: str, graphs: int = LIMIT
    ) -> None:
        super().__init__()
        _check_model(model)
        if dtype is None:
            dtype = next(model.parameters()).dtype
        if isinstance(graphs, bool) or not isinstance(graphs, int) or graphs < 0:
            raise ValueError(f"graphs must be an int of at least 0, got {graphs!r}")
        # Not as a child, so that names of parameters are the source's; its children are shared.
        self.__dict__["source"] = model
        self.__dict__["_modules"] = model.__dict__["_modules"]
        self.training = False
        self._packed = _Packed(dtype, backend, graphs)
        self.refresh()

    dtype = property(lambda self: self._packed.dtype)
    backend = property(lambda self: self._packed.backend)
    graphs = property(lambda self: self._packed.graphs)

    def refresh(self) -> None:
        """Packs the source's weights again; on a CUDA device it waits for that.

        Raises:
            RuntimeError: the source can no longer be deployed, with the reason.
        """
        self._packed.refresh(self.source)

    @_uncompiled
    def forward(self, x: Tensor) -> Any:
        """As the source's forward.

        Args:
            x: images [N,C,H,W] on the source's device, fp32 or bf16, on a CUDA device fp16 too.

        Returns:
            the source's output, in x's dtype where it is a tensor of floating point numbers.

        Raises:
            TypeError: x is not a tensor of these dtypes, or is of a subclass of torch.Tensor.
            ValueError, RuntimeError: x has other dimensions than the source takes, is on another
                device, has no memory or asks for a gradient; something traces, transforms or
                intercepts the call; or the source can no longer be deployed.
        """
        if who := observed.recorder():  # it would not see what fills the result
            raise RuntimeError(
                f"a deployed network cannot be traced or intercepted, and {who}: call, "
                "trace or export the model it was made of"
            )
        _refuse_changes(self.source)
        engine = self._packed.engine(self.source)
        x = _checked_images(x, engine.device, self.backend)
        with torch.no_grad():
            _check_size(engine, x)
            if engine.spec.is_whole:
                y = run_network(self.source, engine, x, x.dtype, "deploy")
            else:
                y = run_network(self.source, engine, x, engine.spec.dtype, "deploy")
                if isinstance(y, Tensor) and y.is_floating_point():
                    y = y.to(x.dtype)
            return presented(self.source, x, y)

    def train(self, mode: bool = True) -> DeployedEfficientNet:
        """Accepts only `eval()` and `train(False)`.

        Raises:
            RuntimeError: mode is True.
        """
        if mode:
            raise RuntimeError("a deployed network only infers: train the model it was made of")
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.source._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.source._load_from_state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        base, isa = backends.parse(self.backend)
        device = _device_of(self.source)
        where = f"{device}, backend {base}"
        if runs_in_one_call(device, self.backend):
            where = f"instruction set {isa or native.load().best_isa()}"
        variant = getattr(self.source, "variant", None)
        name = f"{type(self.source).__name__}{f' {variant.name}' if variant else ''}"
        return f"{type(self).__name__}({name}, dtype={self.dtype}, {where})"


def _device_of(model: Any) -> torch.device:
    """Where the network's first weight is."""
    return next(model.parameters()).device


def _dtypes(device: torch.device, backend: str) -> tuple[torch.dtype, ...]:
    one_call = runs_in_one_call(device, backend)
    return backends.NATIVE_DTYPES if one_call else backends.CUDA_DTYPES


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *first, last = map(str, dtypes)
    return f"{', '.join(first)} or {last}"


def _check_target(device: torch.device, dtype: torch.dtype, backend: str) -> None:
    """Raises for a device, dtype or backend for which there is no engine."""
    base, isa = backends.parse(backend)
    if device.type not in LAUNCHED:
        raise RuntimeError(f"the model is on {device}; deploy takes a CPU or a CUDA device")
    if dtype not in (allowed := _dtypes(device, backend)):
        raise ValueError(f"dtype must be {_listed(allowed)}, got {dtype}")
    if runs_in_one_call(device, backend):
        name = f"cpu:{isa}" if isa else "cpu"
        if reason := backends.can_run(name, backends.OPS[0]):
            raise RuntimeError(f"deploy cannot use backend {backend!r}: {reason}")
    elif base not in LAUNCHED[device.type]:
        names = {"cpu": "'auto', 'cpu' or 'cpu:<instruction set>'"}
        allowed_names = names.get(device.type, "'auto', 'cuda' or 'triton'")
        raise ValueError(
            f"backend must be {allowed_names} for a model on {device}, got {backend!r}"
        )


def _check_model(model: nn.Module) -> None:
    """Raises for what cannot be deployed, whatever its layers."""
    _learn(model)
    if network_class(type(model)) is None:
        raise TypeError(
            "deploy takes a network of effnet_fast, or the EfficientNet of a package that "
            f"effnet_fast.accelerate takes, got {type(model).__name__}; load other packages' "
            "weights with EfficientNet.from_checkpoint"
        )
    _refuse_changes(model)
    if model.training:
        raise RuntimeError("the model is in training mode: call model.eval() first")


def _learn(model: nn.Module) -> None:
    """Enters the readers of another package's network."""
    if isinstance(model, nn.Module) and network_class(type(model)) is None:
        # Its readers are imported for those who have such a network.
        from effnet_fast.models import foreign

        try:
            foreign.learn(model)
        except RefusedError as refused:
            remedy = "load its weights with EfficientNet.from_checkpoint"
            raise _refusal(model, refused, remedy) from None


def obstacle(model: Any) -> str | None:
    """Why `deploy` refuses the model as it is, None where it takes it; nothing is packed."""
    try:
        _check_model(model)
        device = _device_of(model)
        _check_target(device, next(model.parameters()).dtype, "auto")
        spec_of(model, device)
    except (TypeError, ValueError, RuntimeError, RefusedError) as error:
        return str(error)
    return observed.recorder()


def _refusal(
    model: nn.Module, reason: object, remedy: str = "undo that, or call the model itself"
) -> RuntimeError:
    return RuntimeError(f"{type(model).__name__} cannot be deployed: {reason}; {remedy}")


def _refuse_changes(model: Any) -> None:
    """Raises where a call of the network does more than its layers, or they are no longer stock."""
    if changed := changed_method(model) or parts_of(model).code.replaced():
        raise _refusal(model, changed)
    if model._forward_hooks or model._forward_pre_hooks:
        raise _refusal(model, "it has a hook", "remove it, or register it on what deploy returns")


def _checked_images(x: Tensor, device: torch.device, backend: str) -> Tensor:
    """The images as an engine may read them."""
    allowed = _dtypes(device, backend)
    if not isinstance(x, Tensor) or x.dtype not in allowed:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a tensor of {_listed(allowed)}, got {given}")
    if x.device != device:
        raise RuntimeError(
            f"x is on {x.device}, the deployed network on {device}: use x.to({str(device)!r})"
        )
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a deployed network records no gradient and x requires one: call it under "
            "torch.no_grad() or with x.detach(), or use the model that it was made of"
        )
    return images.checked(x, device.type, allowed)


def _check_size(engine: Engine, x: Tensor) -> None:
    """PyTorch's own error for images that the first convolution does not take."""
    if x.shape[1] == engine.sizes.in_channels and min(x.shape[2:]) > 0:
        return
    copy.deepcopy(engine.spec.stem.conv).to(x.dtype)(x)
    raise ValueError(f"images of shape {list(x.shape)} are not allowed")
