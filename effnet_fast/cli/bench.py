"""`effnet-fast bench`: one network, stock against fused, in the same run.

Stock is this package's module tree run unfused by PyTorch in channels_last; fused is the same
weights with backend="auto", which on a CPU uses packed weights, as `effnet_fast.deploy` does.
Both run in evaluation mode under inference_mode.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast import diagnostics, timing
from effnet_fast.cli import common
from effnet_fast.diagnostics import model_report
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.models.variants import VARIANTS
from effnet_fast.modules.layers import ResidualBlock
from effnet_fast.scaling.memory import check_fits, count_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAST_BN_SHRINK = 0.25  # of each block, so that activations do not explode with depth
CALIBRATION_IMAGES = 4
CALIBRATION_SIDE = 224  # pixels at most: one training-mode pass must stay cheap, for B7 too


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time a network, stock against fused",
        description="Times a network's inference: stock PyTorch against the fused kernels. On a "
        "CPU the fused network runs in one call, as effnet_fast.deploy does.",
    )
    common.add_common(parser, default_model="b0")
    parser.add_argument("--batch", type=common.positive_int, default=1, help="images per call")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument(
        "--resolution", type=common.positive_int, help="side in pixels (default: the model's own)"
    )
    parser.add_argument("--rounds", type=common.positive_int, default=5, help="bursts of each")
    common.add_progress(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Builds, calibrates, compares and times; prints a short table or JSON."""
    common.set_threads(arguments)
    common.print_report(arguments, bench(arguments), _print_report)


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that `--json` prints.

    Returns:
        stock_ms and fused_ms (medians) with their percentiles, ratio = fused_ms / stock_ms,
        max_abs_diff of the logits, logits_max_abs (the largest of stock's), how many blocks are
        fused, and the conditions.
    """
    variant = VARIANTS[arguments.model]
    resolution = arguments.resolution or variant.resolution
    dtype = DTYPES[arguments.dtype]
    memory = count_memory(variant, resolution=resolution, batch=arguments.batch, dtype=dtype)
    with common.bad_input(ValueError):
        check_fits(memory.peak, f"--batch {arguments.batch} of {resolution}x{resolution} pixels")
    stock = common.build_model(variant, "reference")
    generator = torch.Generator().manual_seed(common.SEED)
    side = min(resolution, CALIBRATION_SIDE)
    calibrate(stock, random_images(CALIBRATION_IMAGES, side, generator))
    stock.to(dtype)
    stock.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = copy.deepcopy(stock)
    fused.backend = "auto"
    x = random_images(arguments.batch, resolution, generator).to(dtype)
    with (
        torch.inference_mode(),
        common.progress(arguments, 2 * arguments.rounds, "bursts") as bar,
    ):
        expected, actual = stock(x).float(), fused(x).float()
        times = timing.measure(
            {"stock": lambda: stock(x), "fused": lambda: fused(x)},
            rounds=arguments.rounds,
            on_burst=lambda name: bar.update(),
        )
    blocks = model_report.explain_blocks(fused)
    return {
        "model": variant.name,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "resolution": resolution,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        **_flatten(times),
        "ratio": times["fused"].median / times["stock"].median,
        "max_abs_diff": (actual - expected).abs().max().item(),
        "logits_max_abs": expected.abs().max().item(),
        "blocks": len(blocks),
        "fused_blocks": sum(block.reason is None for block in blocks),
        "versions": diagnostics.versions(),
    }


def calibrate(model: EfficientNet, x: Tensor) -> None:
    """Gives random weights BN statistics that make the logits depend on the image, in place.

    With the default statistics every image gets the same logits, which would hide a wrong kernel.
    The last BN of each block is shrunk, then every BN takes the statistics of one pass over the
    images in x [N,3,H,W]. Drop-path and dropout stay off, and evaluation mode is restored.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                *_, last = (m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
                last.weight.mul_(LAST_BN_SHRINK)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def random_images(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Standard normal pixels, [count, 3, side, side] fp32, channels_last."""
    x = torch.randn(count, 3, side, side, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def _flatten(times: dict[str, timing.Timing]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, measured in times.items():
        flat[f"{name}_ms"] = measured.median
        flat[f"{name}_p20_ms"] = measured.p20
        flat[f"{name}_p80_ms"] = measured.p80
        flat[f"{name}_calls"] = measured.calls
    return flat


def _print_report(report: dict[str, Any]) -> None:
    print(
        f"efficientnet_{report['model']}  batch {report['batch']}  {report['dtype']}  "
        f"{report['resolution']}x{report['resolution']}  {report['threads']} threads"
    )
    for name in ("stock", "fused"):
        print(
            f"  {name}  {report[f'{name}_ms']:9.2f} ms  (p20 {report[f'{name}_p20_ms']:.2f}, "
            f"p80 {report[f'{name}_p80_ms']:.2f}, {report[f'{name}_calls']} calls)"
        )
    print(f"  ratio  {report['ratio']:8.3f}     (fused / stock)")
    print(
        f"  largest difference of a logit {report['max_abs_diff']:.2e}, "
        f"where logits reach {report['logits_max_abs']:.2f}"
    )
    print(f"  {report['fused_blocks']} of {report['blocks']} blocks fused")
