"""Predicted memory against published figures and against what the networks take."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiers
from allocations import peak_bytes, saved_bytes, standing_bytes, train_step
from effnet_fast import EfficientNet, use_backend
from effnet_fast.models import VARIANTS, Stage, Variant, custom_variant
from effnet_fast.ops import scratch
from effnet_fast.scaling import CompoundScaling, count_memory, groups
from effnet_fast.scaling.memory_plans import PLANS

BACKENDS = {"stock": "reference", "fused": "auto", "fused_lean": "auto"}
MEMORY = {"fused_lean": "lean"}
EACH_TRAINING_PLAN = pytest.mark.parametrize("plan", BACKENDS)
DTYPES = (torch.float32, torch.bfloat16)
# Saved for backward, MB an image: torchvision's models in fp32 by saved-tensor hooks, the images
# counted and parameters left out; the design in bf16, by its table of passes.
STOCK_FP32 = {"b0": 88, "b4": 654, "b7": 3850}
DESIGN_BF16 = {"fast": {"b0": 15, "b4": 112, "b7": 652}, "lean": {"b0": 9, "b4": 66, "b7": 392}}
STOCK_BF16 = {"b0": 46, "b4": 339, "b7": 1996}
SHARES = {"fast": 0.34, "lean": 0.20}  # of stock
PEAK_ERROR = 0.05
SMALL = replace(custom_variant(width=0.5, depth=0.5), resolution=96)
OWN = custom_variant(
    stages=(Stage(1, 3, 1, 24, 16, 2), Stage(4, 5, 2, 16, 32, 2), Stage(6, 3, 1, 32, 48, 1)),
    resolution=72,
)
HELD_INPUT = (Stage(1, 3, 1, 48, 16, 3), Stage(2, 3, 2, 16, 8, 1))
WIDE_FIRST = (Stage(6, 3, 2, 32, 8, 1),)
# batch, network: every kind of block, few and many images, a side that strides do not divide.
CASES = {
    "small_b1": (1, SMALL),
    "small_b6": (6, SMALL),
    "odd_side": (2, replace(SMALL, resolution=101)),
    "own_stages": (3, OWN),
    "deep": (2, custom_variant(width=0.4, depth=1.3, resolution=64)),
    "peak_in_first_stage": (2, custom_variant(stages=HELD_INPUT, resolution=96)),
    "lite": (2, replace(VARIANTS["lite0"], width=0.5, depth=0.5, resolution=96)),
    "peak_in_first_backward": (2, custom_variant(stages=WIDE_FIRST, resolution=96)),
    "b0": (2, VARIANTS["b0"]),
}
EACH_CASE = [pytest.param(n, marks=[pytest.mark.slow] if n == "b0" else []) for n in CASES]


def network(variant: Variant, plan: str, dtype: torch.dtype) -> nn.Module:
    memory = MEMORY.get(plan, "fast")
    model = EfficientNet(variant, backend=BACKENDS[plan], memory=memory).to(dtype)
    return model.to(memory_format=torch.channels_last)


def images(variant: Variant, batch: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(batch, 3, variant.resolution, variant.resolution, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def beside_maps(variant: Variant) -> int:
    """What the published bf16 figures leave out: vectors, and the inputs of head and classifier."""
    total = 0
    for group in groups(variant):
        statistics = sum(2 * conv.out_channels for conv in group.convs.values() if conv.norm)
        total += group.repeats * 2 * statistics
        if group.kind == "block":  # pooled, gate and two sums in fp32
            expanded, squeezed = (group.convs[k].out_channels for k in ("depthwise", "reduce"))
            total += group.repeats * 4 * (4 * expanded + squeezed)
    head = list(groups(variant))[-1]
    return total + 2 * (head.elements["x"] + 2 * head.convs["head"].out_channels)


@pytest.mark.parametrize("name", STOCK_FP32)
def test_stock_is_the_published_figure(name: str) -> None:
    counted = count_memory(VARIANTS[name], "training", "stock")
    assert round((counted.saved + counted.images) / 1e6) == STOCK_FP32[name]


@pytest.mark.parametrize("name", STOCK_BF16)
def test_stock_in_bf16_is_the_published_figure_less_a_second_count_of_inputs(name: str) -> None:
    """That table counts the input of every block twice; hooks find it saved once."""
    counted = count_memory(VARIANTS[name], "training", "stock", dtype=torch.bfloat16)
    blocks = [g for g in groups(VARIANTS[name]) if g.kind == "block"]
    inputs = sum(2 * g.repeats * g.elements["x"] for g in blocks)
    total = (counted.saved + counted.images + inputs) / 1e6
    assert total == pytest.approx(STOCK_BF16[name], rel=3e-3)


@pytest.mark.parametrize("plan", DESIGN_BF16)
@pytest.mark.parametrize("name", STOCK_FP32)
def test_design_is_the_published_figure(plan: str, name: str) -> None:
    variant = VARIANTS[name]
    saved = count_memory(variant, "training", plan, dtype=torch.bfloat16).saved
    assert round((saved - beside_maps(variant)) / 1e6) == DESIGN_BF16[plan][name]
    assert beside_maps(variant) < 0.05 * saved


@pytest.mark.parametrize("plan", SHARES)
@pytest.mark.parametrize("name", STOCK_FP32)
def test_design_saves_a_third_and_a_fifth(plan: str, name: str) -> None:
    saved = count_memory(VARIANTS[name], "training", plan).saved
    stock = count_memory(VARIANTS[name], "training", "stock").saved
    assert saved / stock == pytest.approx(SHARES[plan], abs=0.017)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_TRAINING_PLAN
@pytest.mark.parametrize("case", EACH_CASE)
def test_saved_is_what_hooks_count(case: str, plan: str, dtype: torch.dtype) -> None:
    batch, variant = CASES[case]
    counted = count_memory(variant, "training", plan, batch=batch, dtype=dtype)
    model = network(variant, plan, dtype).train()
    measured = saved_bytes(model, images(variant, batch, dtype))
    # fp32 copies of a few vectors per channel are not followed in 16 bits.
    tolerance = 1e-4 if plan == "stock" or dtype is torch.float32 else 5e-3
    assert counted.saved == pytest.approx(measured, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_TRAINING_PLAN
@pytest.mark.parametrize("case", EACH_CASE)
def test_peak_of_training(case: str, plan: str, dtype: torch.dtype) -> None:
    batch, variant = CASES[case]
    model = network(variant, plan, dtype).train()
    x = images(variant, batch, dtype)
    counted = count_memory(variant, "training", plan, batch=batch, dtype=dtype, optimizer_tensors=0)
    train_step(model, x)
    model.zero_grad()
    scratch.release()
    peak = peak_bytes(lambda: train_step(model, x)) + standing_bytes(model) + x.nbytes
    assert counted.parameters == standing_bytes(model)
    assert counted.images == x.nbytes
    if plan == "stock" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        if dtype is torch.bfloat16:  # other convolutions; seen: 0.26 to 1.15 of what is counted
            pytest.skip("the plan of stock in bf16 is that of oneDNN with AVX-512")
        assert peak <= counted.peak * (1 + PEAK_ERROR)  # oneDNN then takes less than is counted
        return
    assert counted.peak == pytest.approx(peak, rel=PEAK_ERROR)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["stock", "fused"])
@pytest.mark.parametrize("case", EACH_CASE)
def test_peak_of_inference(case: str, plan: str, dtype: torch.dtype) -> None:
    batch, variant = CASES[case]
    model = network(variant, plan, dtype).eval()
    model.plan = False  # counted is a forward block by block
    x = images(variant, batch, dtype)

    def run() -> None:
        with torch.inference_mode():
            model(x)

    scratch.release()
    run()
    peak = peak_bytes(run) + scratch.kept_bytes() + standing_bytes(model) + x.nbytes
    scratch.release()
    counted = count_memory(variant, "inference", plan, batch=batch, dtype=dtype)
    assert counted.peak == pytest.approx(peak, rel=PEAK_ERROR)


HIGH_WATER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from allocations import train_step
from effnet_fast import EfficientNet
from effnet_fast.models import VARIANTS
torch.set_num_threads(1)
model = EfficientNet("b0", backend={backend!r}).to(memory_format=torch.channels_last)
def step(batch, side):
    x = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    train_step(model, x)
    model.zero_grad()
step(2, 32)  # libraries that start at the first call
def status(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024
before = status("VmRSS")
step(8, 224)
print(status("VmHWM") - before)  # getrusage would count the parent's, if that was larger
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", tiers.some(("stock", "fused"), ("fused",)))
def test_peak_of_a_process(plan: str, request: pytest.FixtureRequest) -> None:
    """What the system gives a process beyond what stood, for a training step of eight images.

    By default glibc serves blocks of up to 32 MB from its heap and leaves holes there (seen: up to
    20% more than was ever alive, another share in every run); here it maps each by itself.
    """
    script = HIGH_WATER.format(
        tests=str(request.path.parents[1] / "support"), backend=BACKENDS[plan]
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        check=True,
    )
    counted = count_memory(VARIANTS["b0"], "training", plan, batch=8, optimizer_tensors=0)
    assert counted.peak - counted.parameters == pytest.approx(int(found.stdout), rel=PEAK_ERROR)


def test_batch_and_optimizer_are_stated() -> None:
    variant = VARIANTS["b0"]
    plain, adam = (count_memory(variant, "training", optimizer_tensors=n) for n in (0, 2))
    parameters = sum(g.repeats * g.parameters for g in groups(variant)) * 4
    assert adam.peak - plain.peak == adam.optimizer == 2 * parameters
    assert plain.optimizer == 0
    four = count_memory(variant, "training", batch=4, optimizer_tensors=0)
    assert four.images == 4 * plain.images
    assert four.saved == pytest.approx(4 * plain.saved, rel=1e-2)


def test_other_devices_take_no_copies_of_the_cpu() -> None:
    variant = VARIANTS["b0"]
    cpu = count_memory(variant, "training", dtype=torch.bfloat16)
    other = count_memory(variant, "training", dtype=torch.bfloat16, device="cuda")
    assert other.saved == cpu.saved
    assert other.peak < cpu.peak


def test_kernels_save_less_than_stock_whatever_the_network() -> None:
    for variant in (*VARIANTS.values(), OWN):
        saved = {p: count_memory(variant, "training", p).saved for m, p in PLANS if m == "training"}
        assert saved["stock"] > saved["fused"] > saved["fast"] > saved["lean"]
        assert saved["fused"] > saved["fused_lean"] > saved["lean"]


@pytest.mark.parametrize(("plan", "share"), [("fused", 0.40), ("fused_lean", 0.25)])
@pytest.mark.parametrize("name", [f"b{i}" for i in range(8)])
def test_kernels_save_two_fifths_and_a_quarter_of_stock(name: str, plan: str, share: float) -> None:
    saved, stock = (count_memory(VARIANTS[name], "training", p).saved for p in (plan, "stock"))
    assert saved <= share * stock


def test_the_current_backend_changes_no_count() -> None:
    with use_backend("reference"):
        inside = count_memory(VARIANTS["b0"], "inference", "fused")
    assert inside == count_memory(VARIANTS["b0"], "inference", "fused")


@pytest.mark.parametrize("key", PLANS, ids=" ".join)
@settings(max_examples=30, deadline=None)
@given(phi=st.floats(-20, 8), step=st.floats(0, 2), batch=st.integers(1, 64))
def test_grows_with_phi(key: tuple[str, str], phi: float, step: float, batch: int) -> None:
    small, large = (CompoundScaling().at(p).variant for p in (phi, phi + step))
    for dtype in DTYPES:
        options = {"batch": batch, "dtype": dtype}
        assert (
            count_memory(small, *key, **options).peak <= count_memory(large, *key, **options).peak
        )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("inference", "lean"), {}, "no plan 'lean' of mode 'inference'; there are"),
        (("running", "stock"), {}, "no plan 'stock' of mode 'running'"),
        ((), {"batch": 0}, "batch must be an int of at least 1"),
        ((), {"optimizer_tensors": -1}, "optimizer_tensors must be an int of at least 0"),
        ((), {"num_classes": 0}, "num_classes must be an int of at least 1"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_memory(VARIANTS["b0"], *arguments, **options)
