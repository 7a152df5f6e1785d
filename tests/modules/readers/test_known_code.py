"""Other packages' code is known by its source, and what comes in its place is run instead."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.models._efficientnet_blocks as timm_blocks
import torch
import torch.nn.functional as F
import torchvision.models.efficientnet as torchvision_blocks
from torch import nn

import effnet_fast
from effnet_fast.modules import foreign, structure
from effnet_fast.modules.readers.digest import digest
from effnet_fast.modules.structure import RefusedError

# By their names: the packages above them have functions of the same.
activations, conv2d_same, drop, norm_act, padding = (
    importlib.import_module(f"timm.layers.{name}")
    for name in ("activations", "conv2d_same", "drop", "norm_act", "padding")
)
misc, stochastic_depth = (
    importlib.import_module(f"torchvision.ops.{name}") for name in ("misc", "stochastic_depth")
)


def timm_block() -> nn.Module:
    """A block that runs every function below timm's."""
    block = timm_blocks.InvertedResidual(
        8, 8, dw_kernel_size=3, exp_ratio=2.0, pad_type="same", drop_path_rate=0.5,
        act_layer=activations.Swish,
        se_layer=functools.partial(
            timm_blocks.SqueezeExcite, rd_ratio=0.25, gate_layer=activations.Sigmoid
        ),
    )  # fmt: skip
    same = conv2d_same.Conv2dSame(16, 16, 3, groups=16, bias=False)
    block.conv_dw = same
    return block


def torchvision_block() -> nn.Module:
    """The same of torchvision's."""
    config = torchvision_blocks.MBConvConfig(2, 3, 1, 8, 8, 1, 1.0, 1.0)
    return torchvision_blocks.MBConv(config, 0.5, nn.BatchNorm2d)


BLOCKS = {"timm": timm_block, "torchvision": torchvision_block}


def is_fused(block: nn.Module) -> bool:
    try:
        structure.structure_of(block)
    except RefusedError:
        return False
    return True


def _kind(path: str) -> Any:
    home, name = path.split(":")
    return getattr(importlib.import_module(home), name)


INSTALLED = [path for path in foreign.RECIPES if importlib.util.find_spec(path.partition(".")[0])]


@pytest.mark.parametrize("path", INSTALLED)
def test_installed_code_is_known(path: str) -> None:
    kind = _kind(path)
    assert issubclass(foreign.fused_class(kind, "auto", "fast"), kind)


# Who has what is replaced, under which name, and whose block runs it.
REPLACED: list[tuple[str, Any, str]] = [
    ("timm", timm_blocks.InvertedResidual, "forward"),
    ("timm", timm_blocks.SqueezeExcite, "forward"),
    ("timm", norm_act.BatchNormAct2d, "forward"),
    ("timm", conv2d_same.Conv2dSame, "forward"),
    ("timm", drop.DropPath, "forward"),
    ("timm", activations.Swish, "forward"),
    ("timm", activations.Sigmoid, "forward"),
    ("timm", activations, "swish"),
    ("timm", drop, "drop_path"),
    ("timm", conv2d_same, "conv2d_same"),
    ("timm", conv2d_same, "pad_same"),
    ("timm", padding, "get_same_padding"),
    ("timm", norm_act, "_assert"),
    ("timm", F, "batch_norm"),
    ("timm", F, "pad"),
    ("timm", F, "conv2d"),
    ("torchvision", torchvision_blocks.MBConv, "forward"),
    ("torchvision", misc.SqueezeExcitation, "forward"),
    ("torchvision", misc.SqueezeExcitation, "_scale"),
    ("torchvision", stochastic_depth.StochasticDepth, "forward"),
    ("torchvision", stochastic_depth, "stochastic_depth"),
    ("torchvision", stochastic_depth, "_log_api_usage_once"),
    ("torchvision", nn.Sequential, "forward"),
    ("torchvision", F, "silu"),
]
IDS = [f"{package}-{owner.__name__}.{name}" for package, owner, name in REPLACED]


def wrapped(original: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    """The original behind a count of its calls, which looks like it."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(("package", "owner", "name"), REPLACED, ids=IDS)
def test_replaced_code_runs_and_is_forgotten(
    package: str, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign.fused_class.cache_clear()
    foreign.code_of.cache_clear()  # whether a class is refused is asked once
    block = BLOCKS[package]().train()
    late = BLOCKS[package]().train()
    x = torch.randn(2, 8, 6, 6)
    assert is_fused(effnet_fast.accelerate(block))
    calls: list[None] = []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapped(getattr(owner, name), calls))
        block(x)
        assert calls
        foreign.fused_class.cache_clear()
        foreign.code_of.cache_clear()
        with pytest.warns(UserWarning, match="stay as they are"):
            effnet_fast.accelerate(late)
        assert type(late) is foreign.own_class(type(block))
    assert is_fused(block)
    assert is_fused(effnet_fast.accelerate(late))
    calls.clear()
    block(x)
    assert not calls


def test_a_forward_that_comes_later_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = effnet_fast.accelerate(next(iter(BLOCKS.values()))().train())
    own, calls = foreign.own_class(type(block)), []  # type: ignore[var-annotated]
    monkeypatch.setattr(own, "forward", wrapped(own.forward, calls))
    block(torch.randn(2, 8, 6, 6))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (norm_act, "F"),
        (conv2d_same, "F"),
        (padding, "math"),
        (padding, "torch"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_module_behind_a_known_name_is_replaced(
    module: types.ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign.fused_class.cache_clear()
    foreign.code_of.cache_clear()
    block = effnet_fast.accelerate(timm_block().train())
    original = getattr(module, name)
    calls: list[str] = []

    class Spied(types.ModuleType):
        def __getattr__(self, attribute: str) -> Any:
            calls.append(attribute)
            return getattr(original, attribute)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, Spied(original.__name__))
        assert not is_fused(block)
        block(torch.randn(2, 8, 6, 6))
        assert calls
        foreign.fused_class.cache_clear()
        foreign.code_of.cache_clear()
        with pytest.raises(RefusedError, match=f"{name} is replaced"):
            foreign.fused_class(timm_blocks.InvertedResidual, "auto", "fast")
    assert is_fused(block)
    foreign.fused_class.cache_clear()
    foreign.code_of.cache_clear()
    foreign.fused_class(timm_blocks.InvertedResidual, "auto", "fast")


def test_a_known_name_of_another_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of the code that says `F.batch_norm` is the same whatever F is."""
    foreign.fused_class.cache_clear()
    foreign.code_of.cache_clear()
    monkeypatch.setattr(norm_act, "F", torch)
    with pytest.raises(RefusedError, match=r"norm_act\.F is replaced"):
        foreign.fused_class(timm_blocks.InvertedResidual, "auto", "fast")
    monkeypatch.undo()
    monkeypatch.setattr(activations, "swish", F.silu)  # torch's, under another name
    with pytest.raises(RefusedError, match=r"activations\.swish is replaced"):
        foreign.fused_class(timm_blocks.InvertedResidual, "auto", "fast")


def halved(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    return x / 2


def constant_changed(code: types.CodeType) -> types.CodeType:
    """Code that says it is of the same source."""
    return code.replace(co_consts=(*code.co_consts, 0))


@pytest.mark.parametrize("change", [lambda code: halved.__code__, constant_changed])
def test_a_changed_code_object_runs(
    change: Callable[[types.CodeType], types.CodeType], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign.fused_class.cache_clear()
    foreign.code_of.cache_clear()
    block = effnet_fast.accelerate(timm_block().eval())
    stock = timm_block().eval()
    stock.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 6, 6)
    swish = activations.swish
    with monkeypatch.context() as patch:
        patch.setattr(swish, "__code__", change(swish.__code__))
        assert not is_fused(block)
        assert block(x).equal(stock(x))
        foreign.fused_class.cache_clear()
        foreign.code_of.cache_clear()
        with pytest.raises(RefusedError, match=r"swish of timm .* is none that is known"):
            foreign.fused_class(timm_blocks.InvertedResidual, "auto", "fast")
    assert is_fused(block)


def test_a_class_of_a_module_that_was_loaded_again_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = timm_block()
    again = type("InvertedResidual", (timm_blocks.InvertedResidual,), {})
    monkeypatch.setattr(timm_blocks, "InvertedResidual", again)
    foreign.fused_class.cache_clear()
    foreign.code_of.cache_clear()
    with pytest.warns(UserWarning, match="is not what its module has now"):
        effnet_fast.accelerate(block)


def test_a_function_without_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.fused_class.cache_clear()
    foreign.code_of.cache_clear()
    scope = dict(vars(activations))
    exec("def swish(x, inplace: bool = False):\n    return x * 2\n", scope)
    assert digest(scope["swish"]) is None
    assert digest(math.ceil) is None
    monkeypatch.setattr(activations, "swish", scope["swish"])
    with pytest.raises(RefusedError, match="swish"):
        foreign.fused_class(timm_blocks.InvertedResidual, "auto", "fast")


WRITTEN = '''
def f(x, y: int = 1):
    """A docstring."""
    # a comment
    z: int = x + y
    return z * 2
'''


def digest_of(text: str, folder: Path) -> str:
    path = folder / f"written_{len(list(folder.iterdir()))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = digest(module.f)
    assert found
    return found


SAME = {
    "comment": ("# a comment", "# another\n    # and more"),
    "docstring": ('    """A docstring."""\n', ""),
    "annotation of an argument": ("y: int", "y"),
    "annotation of the result": ("= 1):", "= 1) -> int:"),
    "annotation of another type": ("z: int", "z: float"),
    "blanks and lines": ("x + y", "(\n        x +\n        y\n    )"),
    "decorator that returns it": ("def f", "mark = lambda f: f\n\n@mark\ndef f"),
    "its place in the file": ("def f", "above = 1\n\n\ndef f"),
}
OTHER = {
    "statement": ("x + y", "x - y"),
    "constant": ("* 2", "* 3"),
    "type of a constant": ("* 2", "* 2.0"),
    "default": ("= 1)", "= 2)"),
    "keyword alone": ("x, y", "x, *, y"),
    "statement more": ("return", "z += 0\n    return"),
    "string that is read": ('"""A docstring."""', 'doc = """A docstring."""'),
    "name": ("f(x", "f(w, x"),
}


@pytest.mark.parametrize(("old", "new"), SAME.values(), ids=SAME)
def test_words_that_compute_nothing_keep_the_digest(old: str, new: str, tmp_path: Path) -> None:
    assert old in WRITTEN
    assert digest_of(WRITTEN.replace(old, new), tmp_path) == digest_of(WRITTEN, tmp_path)


@pytest.mark.parametrize(("old", "new"), OTHER.values(), ids=OTHER)
def test_another_computation_has_another_digest(old: str, new: str, tmp_path: Path) -> None:
    assert old in WRITTEN
    assert digest_of(WRITTEN.replace(old, new), tmp_path) != digest_of(WRITTEN, tmp_path)


def test_a_decorator_that_wraps_has_the_digest_of_its_wrapper(tmp_path: Path) -> None:
    wraps = (
        "import functools\n\ndef twice(f):\n    @functools.wraps(f)\n    def g(x, y=1):\n"
        "        return 2 * f(x, y)\n    return g\n\n@twice\ndef f"
    )
    changed = WRITTEN.replace("def f", wraps)
    assert digest_of(changed, tmp_path) != digest_of(WRITTEN, tmp_path)


def test_a_file_that_changed_since_it_was_imported_is_no_source(tmp_path: Path) -> None:
    path = tmp_path / "written.py"
    path.write_text(WRITTEN)
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path.write_text(WRITTEN.replace("* 2", "* 32"))
    assert digest(module.f) is None
