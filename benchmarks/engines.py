"""Peers that take the network as a file or a program: each makes, from a setup, its runner."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import held
from benchmarks.contest import UnavailableError
from benchmarks.setups import Runner, Setup, cast, network_step


def export_onnx(setup: Setup, folder: Path) -> Path:
    """Stock's network as an ONNX file for inputs of the contest's shape."""
    path = folder / "network.onnx"
    model = copy.deepcopy(setup.model).cpu().to(memory_format=torch.contiguous_format)
    torch.onnx.export(model, (setup.x.cpu().contiguous(),), path, dynamo=True, verbose=False)
    return path


def onnxruntime(setup: Setup) -> Runner:
    import numpy
    import onnxruntime as ort

    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    provider = providers[setup.device]
    if provider not in ort.get_available_providers():
        raise UnavailableError(f"this onnxruntime has no {provider}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(setup, Path(folder))
        session = ort.InferenceSession(str(path), options, providers=[provider])
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


def openvino(setup: Setup) -> Runner:
    import openvino as ov

    precision = {"fp32": "f32", "bf16": "bf16"}[setup.dtype]
    core = ov.Core()
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        model = core.read_model(export_onnx(setup, Path(folder)))
        compiled = core.compile_model(model, "CPU", options)
    held.require(kernels_of(compiled))
    request, x = compiled.create_infer_request(), setup.x.contiguous().numpy()
    return lambda: torch.from_numpy(request.infer([x], share_inputs=True)[0])


def kernels_of(compiled: Any) -> list[str]:
    """Names of the kernels that OpenVINO has chosen for what takes its time: "brgconv_avx2_f32"."""
    layers = [layer.get_rt_info() for layer in compiled.get_runtime_model().get_ordered_ops()]
    slow = [info for info in layers if info["layerType"].value in ("Convolution", "Subgraph")]
    return [str(info["primitiveType"].value) for info in slow]


def jax(setup: Setup) -> Runner:
    from benchmarks.peers_jax import runner

    return runner(setup.model, setup.x, setup.dtype, setup.device)


def torch_tensorrt(setup: Setup) -> Runner:
    import torch_tensorrt as trt

    model, x = cast(setup)
    program = torch.export.export(model, (x,))
    compiled = trt.dynamo.compile(program, [x], enabled_precisions={x.dtype})
    return network_step(compiled, x, setup.mode)


def tensorrt(setup: Setup) -> Runner:
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    flags = {"bf16": trt.BuilderFlag.BF16, "fp16": trt.BuilderFlag.FP16}
    if setup.dtype in flags:
        config.set_flag(flags[setup.dtype])
    with tempfile.TemporaryDirectory() as folder:
        trt.OnnxParser(network, logger).parse_from_file(str(export_onnx(setup, Path(folder))))
    plan = builder.build_serialized_network(network, config)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context, x = engine.create_execution_context(), setup.x.contiguous()
    y = torch.empty(len(x), 1000, device="cuda")
    for index, tensor in enumerate((x, y)):
        context.set_tensor_address(engine.get_tensor_name(index), tensor.data_ptr())

    def run(kept: tuple[object, ...] = (x, engine)) -> Tensor:  # the context has addresses alone
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return y

    return run
