"""Accelerated models behind PyTorch's wrappers for many processes, of which there is one here."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from timm.models.efficientnet import EfficientNet, decode_arch_def
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import effnet_fast
from effnet_fast.modules import recognition
from effnet_fast.modules.layers import MBConv, MBConvConfig
from networks import random_images


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Module:
    torch.manual_seed(0)
    rows = decode_arch_def([["ds_r1_k3_s1_c8_se0.25"], ["ir_r2_k3_s2_e4_c16_se0.25"]])
    return EfficientNet(rows, num_classes=5, num_features=16, stem_size=8).train()


X = random_images(4, 32)


def step(model: nn.Module) -> dict[str, Tensor]:
    """Output and gradients of a training step, by names without those of wrappers."""
    model.zero_grad()
    y = model(X)
    y.square().mean().backward()
    grads = {}
    for name, parameter in model.named_parameters():
        found = parameter.grad
        full = found.full_tensor() if hasattr(found, "full_tensor") else found
        if full is not None:
            grads[name.replace("module.", "").replace("_fsdp_wrapped_", "")] = full
    return {"y": y.detach()} | grads


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) + 1e-3
        assert (actual[name] - tensor).abs().max() <= 1e-3 * scale, name


def fused(model: nn.Module) -> list[bool]:
    return [block.reason is None for block in effnet_fast.doctor(model).blocks or []]


def test_ddp_before_and_after() -> None:
    expected = step(DistributedDataParallel(network()))
    inside = DistributedDataParallel(effnet_fast.accelerate(network()))
    outside = effnet_fast.accelerate(DistributedDataParallel(network()))
    for model in (inside, outside):
        assert fused(model) == [True] * 3
        assert_same(step(model), expected)
        assert isinstance(model, DistributedDataParallel)
    restored = effnet_fast.restore(outside)
    assert type(restored.module) is EfficientNet


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp_runs_right(use_orig_params: bool) -> None:
    """It puts views of one flat tensor in the place of parameters: blocks may run as stock."""
    expected = step(network())
    for first in (True, False):
        model = network()
        if first:
            effnet_fast.accelerate(model)
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        if not first:
            effnet_fast.accelerate(wrapped)
        found = step(wrapped)
        assert_same({"y": found["y"]}, {"y": expected["y"]})
        for block in effnet_fast.doctor(wrapped).blocks or []:
            assert block.reason is None or block.reason


def own() -> nn.Module:
    block = MBConv(MBConvConfig(4, 3, 1, 8, 8), 0.0, nn.BatchNorm2d)
    return nn.Sequential(nn.Conv2d(3, 8, 1), block)


@pytest.mark.parametrize("accelerated", ["before", "after", "own"])
def test_fully_shard_on_a_block_fuses(accelerated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = dist.init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    stock = own() if accelerated == "own" else network()
    model = copy.deepcopy(stock)
    if accelerated == "before":
        effnet_fast.accelerate(model)
    names = ["1"] if accelerated == "own" else ["blocks.1.0", "blocks.1.1"]
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh)
    if accelerated == "after":
        with pytest.warns(UserWarning, match="sharded by fully_shard already"):
            effnet_fast.accelerate(model)
    fully_shard(model, mesh=mesh)
    read: list[nn.Module] = []  # what was known when it ran
    before = recognition.recognise

    def record(module: nn.Module, *arguments: object) -> object:
        found = before(module, *arguments)
        read.append(module)
        return found

    monkeypatch.setattr(recognition, "recognise", record)
    assert_same(step(model), step(stock))
    is_fused = [model.get_submodule(name) in read for name in names]
    assert is_fused == [accelerated != "after"] * len(names)
