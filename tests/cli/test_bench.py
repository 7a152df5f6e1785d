"""bench: what it reports, and that its network would show a wrong kernel."""

import functools
import json

import pytest
import torch

from effnet_fast import cli, timing
from effnet_fast.cli import bench, common
from effnet_fast.models.variants import VARIANTS
from effnet_fast.modules.layers import MBConv

SIDE = 64
RELATIVE_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.2}  # of the largest logit
KEYS = {
    *("model", "batch", "dtype", "resolution", "threads", "rounds", "versions"),
    *("stock_ms", "stock_p20_ms", "stock_p80_ms", "stock_calls"),
    *("fused_ms", "fused_p20_ms", "fused_p80_ms", "fused_calls"),
    *("ratio", "max_abs_diff", "logits_max_abs", "blocks", "fused_blocks"),
}


@pytest.fixture(autouse=True)
def short_bursts(monkeypatch):
    """Two timed calls a burst."""
    quick = functools.partial(timing.measure, discard_s=0, burst_s=0)
    monkeypatch.setattr(bench.timing, "measure", quick)


def run(argv, capsys):
    assert cli.main(["bench", "--json", "--resolution", str(SIDE), *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_json(dtype, capsys):
    report = run(["--batch", "2", "--dtype", dtype, "--rounds", "3", "--threads", "1"], capsys)
    assert set(report) == KEYS
    assert (report["model"], report["batch"], report["dtype"]) == ("b0", 2, dtype)
    assert (report["resolution"], report["threads"], report["rounds"]) == (SIDE, 1, 3)
    assert report["ratio"] == pytest.approx(report["fused_ms"] / report["stock_ms"])
    assert report["stock_p20_ms"] <= report["stock_ms"] <= report["stock_p80_ms"]
    assert report["fused_p20_ms"] <= report["fused_ms"] <= report["fused_p80_ms"]
    assert report["stock_calls"] == report["fused_calls"] == 3 * timing.MIN_CALLS
    assert report["max_abs_diff"] <= RELATIVE_DIFFERENCE[dtype] * report["logits_max_abs"]


@pytest.mark.slow
def test_text(capsys):
    assert cli.main(["bench", "--resolution", str(SIDE), "--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"efficientnet_b0  batch 1  fp32  {SIDE}x{SIDE}  ")
    for word in ("stock", "fused", "ratio", "largest difference of a logit"):
        assert f"\n  {word}" in text


@pytest.mark.slow
def test_runs_are_reproducible(capsys):
    first, second = (run(["--rounds", "1"], capsys) for _ in range(2))
    assert first["logits_max_abs"] == second["logits_max_abs"]
    assert first["max_abs_diff"] == second["max_abs_diff"]


@pytest.fixture(scope="module")
def calibrated():
    model = common.build_model(VARIANTS["b0"], "reference")
    bench.calibrate(model, bench.random_images(4, SIDE, torch.Generator().manual_seed(0)))
    return model


def test_calibration_leaves_evaluation_mode_and_constants(calibrated):
    variant = VARIANTS["b0"]
    for module in calibrated.modules():
        assert not module.training
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (variant.bn_eps, variant.bn_momentum)
    assert all(parameter.requires_grad for parameter in calibrated.parameters())


def test_calibrated_logits_depend_on_the_image_and_on_every_channel(calibrated):
    x = bench.random_images(2, SIDE, torch.Generator().manual_seed(1))
    visible = 100 * RELATIVE_DIFFERENCE["fp32"]
    with torch.inference_mode():
        logits = calibrated(x)
        assert (logits[0] - logits[1]).abs().max() > visible * logits.abs().max()
        blocks = [module for module in calibrated.modules() if isinstance(module, MBConv)]
        depthwise = blocks[len(blocks) // 2].block[1][0].weight
        kept = depthwise.clone()
        depthwise[[0, 1]] = depthwise[[1, 0]]
        swapped = calibrated(x)
        depthwise.copy_(kept)
        change = (swapped - logits).abs().max() / logits.abs().max()
    assert change > RELATIVE_DIFFERENCE["fp32"]
