"""Models of other packages under `accelerate`: copies, files, tracing and their own tools."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import timm.layers
import torch
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.efficientnet import EfficientNet as TimmEfficientNet
from timm.models.efficientnet import decode_arch_def
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models import EfficientNet as TorchvisionEfficientNet
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig

import effnet_fast
from effnet_fast.modules import foreign, structure
from effnet_fast.modules.structure import RefusedError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BOUND = 1e-5  # of the largest output, in fp32


def of_torchvision() -> nn.Module:
    """A small network with every block of torchvision's."""
    settings = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        FusedMBConvConfig(4, 3, 2, 8, 8, 1),
        MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0),
        MBConvConfig(4, 3, 2, 8, 16, 2, 1.0, 1.0),
    ]
    return TorchvisionEfficientNet(settings, 0.1, num_classes=5, last_channel=16)


def of_timm() -> nn.Module:
    """The same of timm's."""
    arch = ["cn_r1_k3_s1_c16_skip"], ["er_r1_k3_s2_e4_c16"], ["ds_r1_k3_s1_c16_se0.25"]
    rows = decode_arch_def([*arch, ["ir_r2_k3_s2_e4_c16_se0.25"]])
    return TimmEfficientNet(rows, num_classes=5, num_features=16, stem_size=16)


NETWORKS = {"torchvision": of_torchvision, "timm": of_timm}


@pytest.fixture(params=NETWORKS)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return NETWORKS[request.param]


@pytest.fixture
def stock(make: Callable[[], nn.Module]) -> nn.Module:
    """A network in eval mode whose BatchNorms have seen a batch."""
    model = make().train()
    model(X)
    return model.eval()


@pytest.fixture
def model(stock: nn.Module) -> nn.Module:
    """An accelerated copy of it."""
    return effnet_fast.accelerate(copy.deepcopy(stock))


def blocks(model: nn.Module) -> list[Any]:
    """Its blocks and layers, without what stands around them."""
    return [
        m for m in model.modules() if foreign.is_fused(type(m)) and structure.has_reader(type(m))
    ]


def is_block_fused(block: Any) -> bool:
    try:
        structure.structure_of(block)
    except RefusedError:
        return False
    return True


def require_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= BOUND * expected.abs().max()


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_every_block_is_fused(stock: nn.Module, model: nn.Module) -> None:
    found = blocks(model)
    assert {type(block).__name__ for block in found} in (
        {"Conv2dNormActivation", "MBConv", "FusedMBConv"},
        {"ConvBnAct", "EdgeResidual", "DepthwiseSeparableConv", "InvertedResidual"},
    )
    assert all(map(is_block_fused, found))
    require_same(model(X), stock(X))


def test_it_looks_as_before(stock: nn.Module) -> None:
    before, text = kinds(stock), repr(stock)
    state = stock.state_dict()
    references = [weakref.ref(module) for module in stock.modules()]
    parameters = list(map(id, stock.parameters()))
    effnet_fast.accelerate(stock)
    for kind, module in zip(before, stock.modules(), strict=True):
        assert isinstance(module, kind)
        names = kind.__name__, kind.__qualname__, kind.__module__, kind.__doc__
        now = type(module)
        assert (now.__name__, now.__qualname__, now.__module__, now.__doc__) == names
    assert repr(stock) == text
    assert [reference() for reference in references] == list(stock.modules())
    assert list(map(id, stock.parameters())) == parameters
    assert list(stock.state_dict()) == list(state)
    stock.load_state_dict(state, strict=True)
    assert effnet_fast.restore(stock) is stock
    assert kinds(stock) == before


def test_other_options_take_the_place_of_the_first(model: nn.Module) -> None:
    before = kinds(model)
    effnet_fast.accelerate(model, memory="lean", backend="reference")
    for block in blocks(model):
        assert (block.memory, block.backend) == ("lean", "reference")
    assert effnet_fast.accelerate(model) is model
    assert kinds(model) == before


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_holds_the_packages_own_classes(
    stock: nn.Module, model: nn.Module, protocol: int
) -> None:
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert kinds(loaded) == kinds(stock)
    require_same(loaded(X), stock(X))
    assert len(blocks(effnet_fast.accelerate(loaded))) == len(blocks(model))


def test_a_file_of_the_whole_model(stock: nn.Module, model: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"effnet_fast" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert kinds(loaded) == kinds(stock)


def test_copies_are_accelerated(stock: nn.Module, model: nn.Module) -> None:
    deep = copy.deepcopy(model)
    assert kinds(deep) == kinds(model)
    require_same(deep(X), stock(X))
    assert set(map(id, deep.parameters())).isdisjoint(map(id, model.parameters()))
    block = blocks(model)[-1]
    shallow = copy.copy(block)
    assert type(shallow) is type(block)
    assert shallow is not block
    assert shallow._modules is block._modules  # as nn.Module's own
    shallow.training = not block.training
    assert shallow.training is not block.training


def test_what_is_shared_stays_shared_in_a_copy(model: nn.Module) -> None:
    block = blocks(model)[-1]
    both = nn.ModuleList([block, nn.Sequential(block), next(block.children())])
    copied: Any = copy.deepcopy(both)
    assert copied[0] is copied[1][0]
    assert copied[2] is next(copied[0].children())
    memo: dict[int, Any] = {id(both[2]): both[2]}
    assert next(copy.deepcopy(block, memo).children()) is both[2]
    block.__dict__["itself"] = block
    again = copy.deepcopy(block)
    assert again.itself is again
    del block.__dict__["itself"]


def test_a_copy_is_made_as_the_packages_class_says(monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks(effnet_fast.accelerate(of_timm()))[-1]

    def copied(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        made = InvertedResidual.__new__(InvertedResidual)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo), mark="copied")
        return made

    monkeypatch.setattr(InvertedResidual, "__deepcopy__", copied, raising=False)
    made = copy.deepcopy(block)
    assert type(made) is type(block)
    assert made.mark == "copied"
    monkeypatch.undo()

    def state(self: nn.Module) -> dict[str, Any]:
        return {**self.__dict__, "mark": "state"}

    monkeypatch.setattr(InvertedResidual, "__getstate__", state, raising=False)
    for made in (copy.deepcopy(block), copy.copy(block), pickle.loads(pickle.dumps(block))):
        assert made.mark == "state"
        assert not hasattr(block, "mark")


def test_a_class_below_the_accelerated_one_runs_as_stock() -> None:
    """`torch.nn.utils.parametrize` and FSDP put a class of their own there."""
    stock = of_timm().eval()
    model = effnet_fast.accelerate(copy.deepcopy(stock))
    block = blocks(model)[-1]
    block.register_parameter("extra", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(block, "extra", nn.Identity())
    assert not is_block_fused(block)
    require_same(model(X), stock(X))
    copied = copy.deepcopy(block)
    assert type(copied) is type(block)
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(block)


def test_a_users_subclass_of_a_block_stays_as_it_is() -> None:
    class Doubled(InvertedResidual):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block = Doubled(16, 16)
    model = nn.Sequential(block, InvertedResidual(16, 16)).eval()
    x = torch.randn(1, 16, 8, 8)
    expected = model(x)
    effnet_fast.accelerate(model)
    assert type(block) is Doubled
    require_same(model(x), expected)


def replicated(module: nn.Module) -> nn.Module:
    """As DataParallel makes a replica: its tensors are no parameters."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicated(child))
    for name, tensor in module._parameters.items():
        setattr(replica, name, None if tensor is None else tensor * 1)
    return replica


def test_a_replica_of_data_parallel_runs_as_stock(stock: nn.Module, model: nn.Module) -> None:
    replica = replicated(model)
    assert kinds(replica) == kinds(model)
    assert not any(map(is_block_fused, blocks(replica)))
    require_same(replica(X), replicated(stock)(X))


def test_attributes_of_its_settings_names_are_the_users(model: nn.Module) -> None:
    expected = model(X)
    for module in model.modules():
        if foreign.is_fused(type(module)):
            module.backend, module.own = "none of ours", None
    assert model(X).equal(expected)


@pytest.mark.slow
def test_torchscript(stock: nn.Module, model: nn.Module) -> None:
    expected = stock(X)
    scripted = torch.jit.script(model)
    assert scripted(X).equal(torch.jit.script(stock)(X))
    require_same(scripted(X), expected)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    require_same(torch.jit.load(file)(X), expected)
    require_same(torch.jit.trace(model, X)(X), expected)
    assert all(map(is_block_fused, blocks(model)))


def test_torchscript_of_each_block(model: nn.Module) -> None:
    for block in blocks(model):
        first = next(part for part in block.modules() if isinstance(part, nn.Conv2d))
        x = torch.randn(1, first.in_channels, 8, 8)
        require_same(torch.jit.script(block)(x), block(x))


def test_fx() -> None:
    """timm's networks read sizes, which no symbolic tracer can."""
    stock = of_torchvision().eval()
    traced = torch.fx.symbolic_trace(effnet_fast.accelerate(copy.deepcopy(stock)))
    plain = torch.fx.symbolic_trace(stock)
    assert [node.name for node in traced.graph.nodes] == [node.name for node in plain.graph.nodes]
    assert traced(X).equal(plain(X))


@pytest.mark.slow
def test_export_and_compile(stock: nn.Module, model: nn.Module) -> None:
    expected = stock(X)
    program = torch.export.export(model, (X,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("effnet" in target for target in targets)
    assert program.module()(X).equal(expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(X).equal(expected)


def test_norms_that_another_tool_replaces(stock: nn.Module, model: nn.Module) -> None:
    tools: list[Callable[[Any], Any]] = [
        timm.layers.freeze_batch_norm_2d,
        timm.layers.convert_sync_batchnorm,
        nn.SyncBatchNorm.convert_sync_batchnorm,
    ]
    for tool in tools:
        changed, expected = tool(copy.deepcopy(model)), tool(copy.deepcopy(stock))
        assert len(blocks(changed)) == len(blocks(model))
        assert [k.__name__ for k in kinds(changed)] == [k.__name__ for k in kinds(expected)]
        require_same(changed(X), expected(X))
