"""`effnet_fast.deploy`: a network in the form that only infers, and does that fastest.

BatchNorm is folded into weights that are packed once, and a call runs the whole network in C++.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast import _native, backends, watching
from effnet_fast.models.efficientnet import EfficientNet, EfficientNetFeatures
from effnet_fast.models.network import METHODS, overridden, recognise
from effnet_fast.models.plan import Plan, complete
from effnet_fast.recognition import RefusedError

KINDS = (EfficientNet, EfficientNetFeatures)


def deploy(
    model: nn.Module, dtype: torch.dtype | None = None, *, backend: str = "auto"
) -> DeployedEfficientNet:
    """The inference form of a network; `model` itself stays as it is.

    Args:
        model: an EfficientNet or EfficientNetFeatures on a CPU, in eval mode.
        dtype: torch.float32 or torch.bfloat16, in which layers hand on their results; None means
            that of the model's parameters. Sums are fp32 in both. Where the instruction set does
            not multiply bf16, the network is computed in fp32, which is more exact.
        backend: "auto", "cpu", or "cpu:<instruction set>" to force one.

    Returns:
        a module that takes images [N,C,H,W] in fp32 or bf16, of any size and strides, and gives
        what the model gives, in the images' dtype. It records no gradient.

    Raises:
        TypeError: model is no network of this package.
        ValueError: another dtype or backend.
        RuntimeError: the model cannot be deployed as it is, with the reason: it is in training
            mode, on another device, has hooks or replaced layers; or the extension is missing.
    """
    return DeployedEfficientNet(model, dtype, backend)


def _uncompiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps torch.compile out of the call, at which it breaks the graph."""

    @functools.wraps(forward)
    def call(self: nn.Module, x: Tensor) -> Any:
        if (
            torch.compiler.is_compiling()
        ):  # only then: `disable` imports Dynamo, which takes seconds
            return torch.compiler.disable(forward)(self, x)
        return forward(self, x)

    return call


class DeployedEfficientNet(nn.Module):
    """What `deploy` returns.

    The network that it was made of stays its `source` and can be changed: parameters and buffers
    are compared at every call, by identity, version counter, address and a few values of each, and
    packed again where they differ. After an edit of single values through `.data`, which moves
    none of these, call `refresh`. State dict, parameters and children are the source's.

    Attributes:
        source: the network.
        dtype: of the packed weights.
        backend: as given to `deploy`.
    """

    source: Any

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, backend: str) -> None:
        super().__init__()
        _check_model(model)
        if dtype is None:
            dtype = next(model.parameters()).dtype
        if dtype not in backends.NATIVE_DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        base, isa = backends.parse(backend)
        if base not in ("auto", "cpu"):
            raise ValueError(
                f"backend must be 'auto', 'cpu' or 'cpu:<instruction set>', got {backend!r}: a "
                "deployed network runs on CPUs so far"
            )
        if reason := backends.can_run(f"cpu:{isa}" if isa else "cpu", backends.OPS[0]):
            raise RuntimeError(f"deploy cannot use backend {backend!r}: {reason}")
        # Not as a child, so that names of parameters are the source's; its children are shared.
        self.__dict__["source"] = model
        self.__dict__["_modules"] = model.__dict__["_modules"]
        self.training = False
        self.dtype = dtype
        self.backend = backend
        self._lock = threading.Lock()
        self._packed: tuple[Any, Plan] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Packs the source's weights again.

        Raises:
            RuntimeError: the source can no longer be deployed, with the reason.
        """
        with self._lock:
            self._pack()

    def _pack(self) -> Plan:
        model = self.source
        _check_model(model)
        try:
            network = recognise(model)
        except RefusedError as refused:
            raise RuntimeError(
                f"{type(model).__name__} cannot be deployed: {refused}; undo that, or call the "
                "model itself"
            ) from None
        isa = backends.parse(self.backend)[1]
        watch = watching.watch(model, network.modules, network.tensors())
        plan = Plan(network, self.dtype is torch.bfloat16, isa)
        self._packed = watch, plan
        return plan

    def _plan(self) -> Plan:
        """The plan of the source as it is now."""
        packed = self._packed
        if packed is None or not _holds(self.source, packed[0]):
            with self._lock:  # another thread may have packed by now
                packed = self._packed
                if packed is None or not _holds(self.source, packed[0]):
                    return self._pack()
        return packed[1]

    @_uncompiled
    def forward(self, x: Tensor) -> Any:
        """As the source's forward.

        Args:
            x: images [N,C,H,W], fp32 or bf16, on a CPU.

        Returns:
            what the source gives, in x's dtype.

        Raises:
            TypeError: x is no tensor of fp32 or bf16.
            ValueError, RuntimeError: x has other dimensions than the source takes, is on another
                device or asks for a gradient; something traces or transforms the call; or the
                source can no longer be deployed.
        """
        _check_images(x)
        with torch.no_grad():
            plan = self._plan()
            _check_size(plan, x)
            return complete(self.source, plan, x, x.dtype)

    def train(self, mode: bool = True) -> DeployedEfficientNet:
        """Only `eval()` and `train(False)` are of any use.

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

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the source, and pack anew at their first call."""
        state = self.__dict__.copy()
        del state["_lock"]
        return {**state, "_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        isa = backends.parse(self.backend)[1] or _native.load().best_isa()
        name = f"{type(self.source).__name__} {self.source.variant.name}"
        return f"{type(self).__name__}({name}, dtype={self.dtype}, instruction set {isa})"


def _holds(model: nn.Module, watch: Any) -> bool:
    hooked = model._forward_hooks or model._forward_pre_hooks
    return not hooked and METHODS.isdisjoint(model.__dict__) and watch.holds()


def _check_model(model: nn.Module) -> None:
    """Raises for what cannot be deployed, whatever its layers."""
    if not isinstance(model, KINDS):
        raise TypeError(
            f"deploy takes an EfficientNet or EfficientNetFeatures of effnet_fast, got "
            f"{type(model).__name__}; load other packages' weights with "
            "EfficientNet.from_checkpoint"
        )
    if name := overridden(model):
        raise RuntimeError(f"{type(model).__name__} cannot be deployed: it overrides {name}")
    if any(parameter.is_cuda for parameter in model.parameters()):
        raise RuntimeError(
            "the model is on a GPU, for which deployment is still to come: use the model itself, "
            "or deploy model.cpu()"
        )
    if model.training:
        raise RuntimeError("the model is in training mode: call model.eval() first")
    if model._forward_hooks or model._forward_pre_hooks:
        raise RuntimeError(
            f"{type(model).__name__} cannot be deployed: it has a hook; remove it, or register it "
            "on what deploy returns"
        )


def _is_traced() -> bool:
    """Whether something records the operators: it would not see what C++ computes."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # exported implicitly
    # Where the module was never imported, nobody traces by it.
    proxies: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    by_proxies = proxies is not None and proxies.get_proxy_mode() is not None
    return tracing or fake or by_proxies or backends.in_transform()


def _check_images(x: Tensor) -> None:
    if _is_traced():
        raise RuntimeError(
            "a deployed network cannot be traced: trace or export the model it was made of"
        )
    if not isinstance(x, Tensor) or x.dtype not in backends.NATIVE_DTYPES:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a tensor of torch.float32 or torch.bfloat16, got {given}")
    if x.device.type != "cpu":
        raise RuntimeError(f"x is on {x.device}, the deployed network on a CPU: use x.cpu()")
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a deployed network records no gradient and x requires one: call it under "
            "torch.no_grad() or with x.detach(), or use the model that it was made of"
        )


def _check_size(plan: Plan, x: Tensor) -> None:
    """PyTorch's own error for images that the first convolution does not take."""
    conv = plan.network.stem.conv
    if x.shape[1] == conv.in_channels and min(x.shape[2:]) > 0:
        return
    copy.deepcopy(conv).to(x.dtype)(x)
    raise ValueError(f"images of shape {list(x.shape)} cannot be taken")
