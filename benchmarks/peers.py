"""Other ways of running the same network, each behind the same small interface.

A peer makes, from stock's network and an input, the function that runs it once. All carry stock's
weights, and the contest compares what they compute with stock's. What is not installed, or refuses
a dtype or a mode, says so.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import engines, held
from benchmarks.contest import OURS, UnavailableError
from benchmarks.setups import Runner, Setup, cast, network_step
from effnet_fast import checkpoints, deploy, use_backend

INFERENCE, TRAINING = ("inference",), ("training",)
BOTH = INFERENCE + TRAINING
LOW = ("bf16", "fp16")
ANY = ("fp32", *LOW)


@dataclass(frozen=True)
class Peer:
    """One contestant in contests of networks.

    Args:
        name: as in the results.
        build: makes the runner.
        dtypes, modes, devices: what it is for.
        requires: modules without which it cannot run.
        compiles: whether building takes long, so that it is left to --full.
        same_numbers: whether it computes what stock does; lukemelas pads otherwise.
        keeps_memory: whether PyTorch's allocator cannot tell what a call needs at its peak.
        holds: whether it can be held to an instruction set (`held.py`).
    """

    name: str
    build: Callable[[Setup], Runner]
    dtypes: tuple[str, ...] = ("fp32",)
    modes: tuple[str, ...] = INFERENCE
    devices: tuple[str, ...] = ("cpu", "cuda")
    requires: tuple[str, ...] = ()
    compiles: bool = False
    same_numbers: bool = True
    keeps_memory: bool = False
    holds: bool = False

    def missing(self) -> list[str]:
        """The modules without which it cannot run here."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]

    def runner(self, setup: Setup) -> Runner:
        """The function that runs the network once and returns the logits or the loss.

        Raises:
            UnavailableError: it cannot, with the reason.
        """
        if missing := self.missing():
            raise UnavailableError(f"{', '.join(missing)} is not installed")
        if held.isa() and not self.holds:
            raise UnavailableError(f"nothing holds it to {held.isa()}")
        try:
            return self.build(setup)
        except UnavailableError:
            raise
        except Exception as error:  # an engine may raise anything: then it does not take part
            first = str(error).strip().splitlines()[:1]
            raise UnavailableError(f"{type(error).__name__}: {' '.join(first)[:200]}") from error


def _eager(setup: Setup) -> Runner:
    return network_step(*cast(setup), setup.mode)


class _Contiguous(nn.Module):
    """Stock's layers alone: the whole model's forward would convert the input to channels_last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            model.features, model.avgpool, nn.Flatten(1), model.classifier
        ).train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        with use_backend("reference"):
            return self.layers(x)


def _contiguous(setup: Setup) -> Runner:
    model = copy.deepcopy(setup.model).to(memory_format=torch.contiguous_format)
    return network_step(_Contiguous(model), setup.x.contiguous(), setup.mode)


def _amp(setup: Setup) -> Runner:
    return network_step(copy.deepcopy(setup.model), setup.x, setup.mode, setup.torch_dtype)


def _ours(setup: Setup) -> Runner:
    model, x = cast(setup)
    model.backend = held.backend()
    return network_step(model, x, setup.mode)


def _ours_amp(setup: Setup) -> Runner:
    model = copy.deepcopy(setup.model)
    model.backend = "auto"
    return network_step(model, setup.x, setup.mode, setup.torch_dtype)


def _deployed(setup: Setup) -> Runner:
    deployed = deploy(copy.deepcopy(setup.model), setup.torch_dtype, backend=held.backend())
    # A graph's other contestants have their images in the dtype, too; a CPU converts as it reads.
    x = setup.x.to(setup.torch_dtype) if setup.device == "cuda" else setup.x
    return network_step(deployed, x, setup.mode)


def _compile(**options: Any) -> Callable[[Setup], Runner]:
    def build(setup: Setup) -> Runner:
        model, x = cast(setup)
        run = network_step(torch.compile(model, **options), x, setup.mode)
        run()
        return run

    return build


def _freeze(setup: Setup) -> Runner:
    """The option makes it another compiler to the cache, the patch is what takes effect."""
    from torch._inductor import config

    options = {"freezing": True}
    with config.patch(options):
        return _compile(options=options)(setup)


def _cuda_graph(build: Callable[[Setup], Runner]) -> Callable[[Setup], Runner]:
    def build_graph(setup: Setup) -> Runner:
        run = build(setup)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

        def replay() -> object:
            graph.replay()
            return result

        return replay

    return build_graph


def _torchvision(setup: Setup) -> Runner:
    import torchvision

    model = getattr(torchvision.models, f"efficientnet_{setup.variant.name}", None)
    drops = {"dropout": 0.0, "stochastic_depth_prob": 0.0}
    return _foreign(setup, model and model(**drops), "torchvision")


def _timm(setup: Setup) -> Runner:
    import timm

    drops = {"drop_rate": 0.0, "drop_path_rate": 0.0}
    prefix = "tf_" if setup.variant.padding == "same" else ""
    name = f"efficientnet_{setup.variant.name}".replace("_v2", "v2")
    model = timm.create_model(prefix + name, **drops)
    return _foreign(setup, model, "timm")


def _lukemelas(setup: Setup) -> Runner:
    from efficientnet_pytorch import EfficientNet

    drops = {"dropout_rate": 0.0, "drop_connect_rate": 0.0}
    model = EfficientNet.from_name(f"efficientnet-{setup.variant.name}", image_size=None, **drops)
    return _foreign(setup, model, "lukemelas")


def _foreign(setup: Setup, model: nn.Module | None, naming: str) -> Runner:
    if model is None:
        raise UnavailableError(f"{naming} has no {setup.variant.name}")
    state = checkpoints.convert(setup.model.state_dict(), to=naming)
    model.load_state_dict(state)
    for ours, theirs in zip(_norms(setup.model), _norms(model), strict=True):
        theirs.eps, theirs.momentum = ours.eps, ours.momentum
    model = model.train(setup.model.training).to(setup.device, memory_format=torch.channels_last)
    return _eager(replace(setup, model=model))


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


CPU, CUDA = ("cpu",), ("cuda",)
_autotune = _compile(mode="max-autotune")
_compiled_graphs = _compile(mode="reduce-overhead")
ONNX = "onnxscript"  # what torch.onnx.export needs
PEERS = (
    Peer(OURS, _ours, ANY, BOTH, holds=True),
    Peer(f"{OURS}_amp", _ours_amp, LOW, BOTH),
    Peer(f"{OURS}_deploy", _deployed, ANY, keeps_memory=True, holds=True),
    Peer(f"{OURS}_graph", _cuda_graph(_ours), ANY, BOTH, CUDA, keeps_memory=True),
    Peer("torch_contiguous", _contiguous, modes=BOTH),
    Peer("torch_channels_last", _eager, ANY, BOTH, holds=True),
    Peer("torch_amp", _amp, LOW, BOTH),
    Peer("torch_graph", _cuda_graph(_eager), ANY, BOTH, CUDA, keeps_memory=True),
    Peer("torch_compile", _compile(), ANY, BOTH, compiles=True),
    Peer("torch_compile_freezing", _freeze, ANY, compiles=True),
    Peer("torch_compile_max_autotune", _autotune, ANY, BOTH, compiles=True),
    Peer(
        *("torch_compile_graphs", _compiled_graphs, ANY, BOTH, CUDA),
        compiles=True,
        keeps_memory=True,
    ),
    Peer("torchvision", _torchvision, ANY, BOTH, requires=("torchvision",), holds=True),
    Peer("timm", _timm, ANY, BOTH, requires=("timm",)),
    Peer(
        *("lukemelas", _lukemelas, ANY, BOTH),
        requires=("efficientnet_pytorch",),
        same_numbers=False,
    ),
    Peer("onnxruntime", engines.onnxruntime, requires=("onnxruntime", ONNX), keeps_memory=True),
    Peer(
        *("openvino", engines.openvino, ("fp32", "bf16")),
        devices=CPU,
        requires=("openvino", ONNX),
        keeps_memory=True,
        holds=True,
    ),
    Peer("jax", engines.jax, ANY, requires=("jax",), compiles=True, keeps_memory=True),
    Peer(
        *("tensorrt", engines.tensorrt, ANY, INFERENCE, CUDA, ("tensorrt", ONNX)),
        compiles=True,
        keeps_memory=True,
    ),
    Peer(
        *("torch_tensorrt", engines.torch_tensorrt, ANY, INFERENCE, CUDA, ("torch_tensorrt",)),
        compiles=True,
        keeps_memory=True,
    ),
)
