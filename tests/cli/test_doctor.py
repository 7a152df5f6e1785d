"""doctor: complete, JSON-ready, and right about what is missing."""

import json

import pytest
import torch
from torch import nn

import effnet_fast
from edit_kinds import Scaling
from effnet_fast import cli, diagnostics
from effnet_fast.backends import BACKENDS, OPS, native
from effnet_fast.cli import common
from effnet_fast.models.variants import VARIANTS
from effnet_fast.modules import fused_forward, structure
from effnet_fast.modules.layers import MBConv, MBConvConfig
from networks import MINI

B0_UNITS = 1 + 16 + 1  # stem, blocks, head


@pytest.fixture(scope="module")
def b0():
    return common.build_model(VARIANTS["b0"], "auto")


def test_json(capsys):
    assert cli.main(["doctor", "--json", "--model", "b0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["backends"]) == list(BACKENDS)
    assert report["backends"]["reference"] == dict.fromkeys(OPS)
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert report["blocks"]


def test_threads(capsys):
    assert cli.main(["doctor", "--json", "--threads", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["threads"]["torch"] == 3


def test_text_without_model(capsys):
    assert cli.main(["doctor"]) == 0
    titles = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    expected = ["versions", "extension", "backends", "isas", "deploy", "cpu"]
    expected += ["threads", "openmp", "cuda"]
    assert titles == expected


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
def test_extension_is_described():
    report = diagnostics.doctor()
    assert report.extension_reason is None
    assert "generic" in report.isas
    assert report.isas["generic"] is None
    assert report.isas[report.best_isa] is None
    assert report.versions["compiler"]
    assert report.backends["cpu"]["dwconv_bn_silu"] is None
    assert isinstance(report.cuda["built"], bool)
    assert report.deploy["reason"] is None
    assert "deploy      float32, bfloat16" in str(report)


def test_works_without_the_extension(monkeypatch):
    def load():
        raise RuntimeError("no extension")

    monkeypatch.setattr(native, "unavailable_reason", lambda: "not built: run pip install .")
    monkeypatch.setattr(native, "load", load)
    report = diagnostics.doctor()
    assert report.extension_reason == "not built: run pip install ."
    assert (report.isas, report.best_isa, report.versions["compiler"]) == ({}, None, None)
    assert report.cuda["reason"] == "the compiled extension is missing"
    assert "extension   not built: run pip install ." in str(report)
    assert "deploy      not built: run pip install ." in str(report)


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
def test_model_blocks(b0):
    blocks = diagnostics.doctor(b0).blocks
    assert all(block.reason is None for block in blocks)
    assert len(blocks) == B0_UNITS
    assert "18 of 18 blocks fused" in str(diagnostics.doctor(b0))


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_dtype_without_kernels(b0, dtype):
    try:
        blocks = diagnostics.doctor(b0.to(dtype)).blocks
    finally:
        b0.float()
    assert len(blocks) > B0_UNITS, "the layers in the blocks are on their own then"
    assert all(f"x is {dtype}, the cpu backend takes" in block.reason for block in blocks)


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
def test_mixed_dtypes_are_explained(b0):
    b0.features[2][0].double()
    reasons = {block.name: block.reason for block in diagnostics.doctor(b0).blocks}
    b0.float()
    assert "x is torch.float64" in reasons["features.2.0"]
    assert reasons["features.2.1"] is None


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
def test_training(b0, monkeypatch):
    """What is said to be fused is what a step of training runs fused, module by module."""

    def first_convolution(given):
        found = structure.structure_of(given) if isinstance(given, nn.Module) else given
        return found.first.conv

    ran = []
    for name in ("_run_block", "_run_spatial", "run_pooled"):
        run = getattr(fused_forward, name)
        monkeypatch.setattr(
            fused_forward, name, lambda *a, run=run: ran.append(first_convolution(a[0])) or run(*a)
        )
    try:
        blocks = diagnostics.doctor(b0.train()).blocks
        b0(torch.randn(2, 3, 32, 32))
    finally:
        b0.eval()
    assert not [block.reason for block in blocks if block.reason]
    assert ran == [first_convolution(b0.get_submodule(block.name)) for block in blocks]


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
def test_autocast(b0):
    with torch.autocast("cpu", torch.float16):
        blocks = diagnostics.doctor(b0).blocks
    assert all("x is torch.float16" in block.reason for block in blocks)


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
def test_hooked_block_is_explained(b0):
    handle = b0.features[2][0].block[1].register_forward_hook(lambda *_: None)
    report = diagnostics.doctor(b0)
    handle.remove()
    reasons = {block.name: block.reason for block in report.blocks}
    assert "hook" in reasons["features.2.0"]
    assert "not fused: features.2.0" in str(report)


def test_reference_backend_fuses_nothing(b0):
    b0.backend = "reference"
    report = diagnostics.doctor(b0)
    b0.backend = "auto"
    assert all(block.reason is not None for block in report.blocks)


def course(model):
    (found,) = diagnostics.doctor(model).networks
    return found


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
def test_what_eval_and_training_run(b0):
    for training in (False, True):
        found = course(b0.train(training))
        assert all(module.training is training for module in b0.modules())
        assert (found.name, found.kind) == ("", "EfficientNet")
        assert (found.eval, found.training) == ("one call", "block by block")
        assert found.eval_reason is found.training_reason is found.deploy_reason is None
        assert not found.wrapped
    text = str(diagnostics.doctor(b0.eval()))
    assert "EfficientNet" in text
    assert "eval: one call" in text


LOSSES = {
    "plan": (lambda m: setattr(m, "plan", False), "its `plan` is False", None),
    "hook": (
        lambda m: m.features[1][0].register_forward_hook(lambda *_: None),
        "features.1.0 has a hook",
        "features.1.0 has a hook",
    ),
    "method": (
        lambda m: setattr(m, "forward_head", m.forward_head),
        "its forward_head is patched",
        "its forward_head is patched",
    ),
    "forward": (lambda m: setattr(m, "forward", m.forward_head), None, "its forward is patched"),
    "dtype": (lambda m: m.double(), "x is float64, allowed is", "dtype must be"),
    "device": (lambda m: m.to("meta"), "the images are on meta", "the model is on meta"),
    "backend": (lambda m: setattr(m, "backend", "reference"), "the backend is 'reference'", None),
}


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
@pytest.mark.parametrize("name", LOSSES)
def test_what_was_lost_and_why(name):
    change, eval_reason, deploy_reason = LOSSES[name]
    model = effnet_fast.EfficientNet(MINI).eval()
    change(model)
    found = course(model)
    assert (eval_reason or "None") in str(found.eval_reason)
    assert (deploy_reason or "None") in str(found.deploy_reason)
    assert found.wrapped is (name == "forward")
    stock = name in ("dtype", "device", "backend")
    assert found.eval == (
        "stock" if stock else "one call" if eval_reason is None else "block by block"
    )
    text = str(diagnostics.doctor(model))
    assert str(found.eval_reason or "one call") in text
    assert ("set on the instance" in text) is found.wrapped


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the extension")
def test_replaced_code_and_modes_are_named(monkeypatch):
    model = effnet_fast.EfficientNet(MINI).eval()
    with Scaling():
        found = course(model)
    reason = "Scaling, a TorchFunctionMode, is active"
    assert found.eval_reason == found.training_reason == found.deploy_reason == reason
    assert found.eval == found.training == "stock"
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: x)
    found = course(nn.ModuleDict({"net": model}))
    assert found.name == "net"
    reasons = (found.eval_reason, found.training_reason, found.deploy_reason)
    assert all("Conv2d.forward is replaced" in reason for reason in reasons)
    assert found.training == "stock"


def test_openmp_runtimes(monkeypatch):
    maps = (
        "7f00-7f01 r-xp 00000000 08:01 1   /venv/torch/lib/libgomp.so.1\n"
        "7f01-7f02 r--p 00000000 08:01 1   /venv/torch/lib/libgomp.so.1\n"
        "7f02-7f03 r-xp 00000000 08:01 2   /venv/torch.libs/libgomp-24e2ab19.so.1.0.0\n"
        "7f03-7f04 r-xp 00000000 08:01 3   /usr/lib/libiomp5.so\n"
        "7f04-7f05 r-xp 00000000 08:01 4   /usr/lib/libomptarget.so\n"
        "7f05-7f06 rw-p 00000000 00:00 0\n"
    )
    monkeypatch.setattr(diagnostics, "_read", lambda path: maps if "maps" in path else "")
    report = diagnostics.doctor()
    assert report.openmp == [
        "/usr/lib/libiomp5.so",
        "/venv/torch.libs/libgomp-24e2ab19.so.1.0.0",
        "/venv/torch/lib/libgomp.so.1",
    ]
    assert "more than one runtime" in str(report)


@pytest.mark.parametrize(
    ("driver", "warned"), [(None, True), ("570.86.15", True), ("580.65.06", False)]
)
def test_cuda_driver(monkeypatch, driver, warned):
    line = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"
    found = line if driver else ""
    monkeypatch.setattr(diagnostics, "_read", lambda path: found if "nvidia" in path else "")
    monkeypatch.setattr(native, "unavailable_reason", lambda: "not built")
    report = diagnostics.doctor()
    assert report.cuda["driver"] == driver
    assert ("want driver 580 or newer" in str(report)) == warned


def test_blocks_that_convert_images_are_told_of():
    config = MBConvConfig(4, 3, 1, 8, 8)
    model = nn.ModuleList([MBConv(config, 0.0, nn.BatchNorm2d) for _ in range(2)]).eval()
    report = diagnostics.doctor(model)
    assert "2 blocks stand in a forward of another's making" in report.layout
    assert "layout: 2 blocks" in str(report)
    assert diagnostics.doctor(model.to(memory_format=torch.channels_last)).layout is None
    assert diagnostics.doctor(effnet_fast.EfficientNet(MINI)).layout is None
    assert diagnostics.doctor(effnet_fast.EfficientNet(MINI).features).layout is None
    assert diagnostics.doctor().layout is None
