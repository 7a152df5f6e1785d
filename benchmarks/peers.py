"""Other ways of running the same network, each behind the same small interface.

A peer makes, from stock's network and an input, the function that runs it once. All carry stock's
weights, and the contest compares what they compute with stock's. What is not installed, or refuses
a dtype or a mode, says so.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contest import OURS, UnavailableError
from benchmarks.limits import DTYPES
from effnet_fast import checkpoints, deploy, use_backend
from effnet_fast.models import Variant

INFERENCE, TRAINING = ("inference",), ("training",)
BOTH = INFERENCE + TRAINING
LOW = ("bf16", "fp16")
ANY = ("fp32", *LOW)
Runner = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """What a peer is given.

    Args:
        variant: the network.
        model: effnet_fast's module tree with stock's forward (backend "reference"), fp32, in
            channels_last, on the device and in the mode of the contest.
        x: images [N,3,H,W], fp32, channels_last, on the device.
        dtype, device, mode: of the contest.
    """

    variant: Variant
    model: nn.Module
    x: Tensor
    dtype: str
    device: str
    mode: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Peer:
    """One contestant in contests of networks.

    Args:
        name: as in the results.
        build: makes the runner.
        dtypes, modes, devices: what it is for.
        requires: modules without which it cannot run.
        compiles: whether building takes long, so that --quick leaves it out.
        same_numbers: whether it computes what stock does; lukemelas pads otherwise.
        keeps_memory: whether PyTorch's allocator cannot tell what a call needs at its peak.
        plans: whether that is so of its inference on a CPU, which goes by packed weights.
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
    plans: bool = False

    def hides_memory(self, mode: str, device: str) -> bool:
        """Whether peak memory cannot be told there."""
        return self.keeps_memory or (self.plans and (mode, device) == ("inference", "cpu"))

    def runner(self, setup: Setup) -> Runner:
        """The function that runs the network once and returns the logits or the loss.

        Raises:
            UnavailableError: it cannot, with the reason.
        """
        for module in self.requires:
            if importlib.util.find_spec(module) is None:
                raise UnavailableError(f"{module} is not installed")
        try:
            return self.build(setup)
        except UnavailableError:
            raise
        except Exception as error:  # an engine may raise anything: then it does not take part
            first = str(error).strip().splitlines()[:1]
            raise UnavailableError(f"{type(error).__name__}: {' '.join(first)[:200]}") from error


def network_step(model: nn.Module, x: Tensor, mode: str, amp: torch.dtype | None = None) -> Runner:
    """One inference, or one forward and backward of a cross entropy; with autocast to `amp`."""
    labels = torch.arange(len(x), device=x.device) % 1000

    def context() -> Any:
        return torch.autocast(x.device.type, amp, enabled=amp is not None)

    def infer() -> Tensor:
        with torch.inference_mode(), context():
            return model(x)

    def train() -> Tensor:
        model.zero_grad(set_to_none=True)
        with context():
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        return loss.detach()

    return infer if mode == "inference" else train


def _cast(setup: Setup) -> tuple[nn.Module, Tensor]:
    """Model and input in the contest's dtype, copies."""
    model = copy.deepcopy(setup.model).to(setup.torch_dtype)
    return model, setup.x.to(setup.torch_dtype)


def _eager(setup: Setup) -> Runner:
    return network_step(*_cast(setup), setup.mode)


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
    model, x = _cast(setup)
    model.backend = "auto"
    return network_step(model, x, setup.mode)


def _ours_amp(setup: Setup) -> Runner:
    model = copy.deepcopy(setup.model)
    model.backend = "auto"
    return network_step(model, setup.x, setup.mode, setup.torch_dtype)


def _deployed(setup: Setup) -> Runner:
    deployed = deploy(copy.deepcopy(setup.model), setup.torch_dtype)
    # A graph's other contestants have their images in the dtype, too; a CPU converts as it reads.
    x = setup.x.to(setup.torch_dtype) if setup.device == "cuda" else setup.x
    return network_step(deployed, x, setup.mode)


def _compile(**options: Any) -> Callable[[Setup], Runner]:
    def build(setup: Setup) -> Runner:
        model, x = _cast(setup)
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
    model = timm.create_model(f"efficientnet_{setup.variant.name}", **drops)
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


def export_onnx(setup: Setup, folder: Path) -> Path:
    """Stock's network as an ONNX file for inputs of the contest's shape."""
    path = folder / "network.onnx"
    model = copy.deepcopy(setup.model).cpu().to(memory_format=torch.contiguous_format)
    torch.onnx.export(model, (setup.x.cpu().contiguous(),), path, dynamo=True, verbose=False)
    return path


def _onnxruntime(setup: Setup) -> Runner:
    import numpy
    import onnxruntime

    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    provider = providers[setup.device]
    if provider not in onnxruntime.get_available_providers():
        raise UnavailableError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(setup, Path(folder))
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    # Bound to where the other contestants have their images: no copies from the host.
    binding, x = session.io_binding(), setup.x.contiguous()
    y = torch.empty(len(x), 1000, device=setup.device)
    for bind, node, tensor in (
        (binding.bind_input, session.get_inputs()[0], x),
        (binding.bind_output, session.get_outputs()[0], y),
    ):
        shape, address = tuple(tensor.shape), tensor.data_ptr()
        bind(node.name, setup.device, 0, numpy.float32, shape, address)

    def run(kept: Tensor = x) -> Tensor:  # the binding knows the input's address alone
        session.run_with_iobinding(binding)
        return y

    return run


def _openvino(setup: Setup) -> Runner:
    import openvino

    precision = {"fp32": "f32", "bf16": "bf16"}[setup.dtype]
    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        model = core.read_model(export_onnx(setup, Path(folder)))
        compiled = core.compile_model(model, "CPU", options)
    request, x = compiled.create_infer_request(), setup.x.contiguous().numpy()
    return lambda: torch.from_numpy(request.infer([x], share_inputs=True)[0])


def _jax(setup: Setup) -> Runner:
    from benchmarks.peers_jax import runner

    return runner(setup.model, setup.x, setup.dtype, setup.device)


def _torch_tensorrt(setup: Setup) -> Runner:
    import torch_tensorrt

    model, x = _cast(setup)
    program = torch.export.export(model, (x,))
    compiled = torch_tensorrt.dynamo.compile(program, [x], enabled_precisions={x.dtype})
    return network_step(compiled, x, setup.mode)


def _tensorrt(setup: Setup) -> Runner:
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    flags = {"bf16": tensorrt.BuilderFlag.BF16, "fp16": tensorrt.BuilderFlag.FP16}
    if setup.dtype in flags:
        config.set_flag(flags[setup.dtype])
    with tempfile.TemporaryDirectory() as folder:
        tensorrt.OnnxParser(network, logger).parse_from_file(str(export_onnx(setup, Path(folder))))
    plan = builder.build_serialized_network(network, config)
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(plan)
    context, x = engine.create_execution_context(), setup.x.contiguous()
    y = torch.empty(len(x), 1000, device="cuda")
    for index, tensor in enumerate((x, y)):
        context.set_tensor_address(engine.get_tensor_name(index), tensor.data_ptr())

    def run(kept: tuple[object, ...] = (x, engine)) -> Tensor:  # the context has addresses alone
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return y

    return run


CPU, CUDA = ("cpu",), ("cuda",)
_autotune = _compile(mode="max-autotune")
_compiled_graphs = _compile(mode="reduce-overhead")
ONNX = "onnxscript"  # what torch.onnx.export needs
PEERS = (
    Peer(OURS, _ours, ANY, BOTH, plans=True),
    Peer(f"{OURS}_amp", _ours_amp, LOW, BOTH, plans=True),
    Peer(f"{OURS}_deploy", _deployed, ANY, keeps_memory=True),
    Peer(f"{OURS}_graph", _cuda_graph(_ours), ANY, BOTH, CUDA, keeps_memory=True),
    Peer("torch_contiguous", _contiguous, modes=BOTH),
    Peer("torch_channels_last", _eager, ANY, BOTH),
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
    Peer("torchvision", _torchvision, ANY, BOTH, requires=("torchvision",)),
    Peer("timm", _timm, ANY, BOTH, requires=("timm",)),
    Peer(
        *("lukemelas", _lukemelas, ANY, BOTH),
        requires=("efficientnet_pytorch",),
        same_numbers=False,
    ),
    Peer("onnxruntime", _onnxruntime, requires=("onnxruntime", ONNX), keeps_memory=True),
    Peer(
        *("openvino", _openvino, ("fp32", "bf16")),
        devices=CPU,
        requires=("openvino", ONNX),
        keeps_memory=True,
    ),
    Peer("jax", _jax, ANY, requires=("jax",), compiles=True, keeps_memory=True),
    Peer(
        *("tensorrt", _tensorrt, ANY, INFERENCE, CUDA, ("tensorrt", ONNX)),
        compiles=True,
        keeps_memory=True,
    ),
    Peer(
        *("torch_tensorrt", _torch_tensorrt, ANY, INFERENCE, CUDA, ("torch_tensorrt",)),
        compiles=True,
        keeps_memory=True,
    ),
)
