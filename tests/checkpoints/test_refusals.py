"""Files that would kill the reader, hang it or leave a model half loaded are refused by name."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from effnet_fast import EfficientNet, checkpoints
from networks import TINY

STEM, NORM = "features.0.0.weight", "features.0.1.weight"
CLASSES = 4
STATE = EfficientNet(TINY, num_classes=CLASSES).state_dict()


def save(content: object, path: Path, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def network() -> EfficientNet:
    return EfficientNet(TINY, num_classes=CLASSES)


def assert_nothing_is_loaded(model: nn.Module, path: Path, message: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.load_into(model, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


STRANGE = {
    "sparse": (lambda w: w.to_sparse(), r"bias is a tensor of layout torch\.sparse_coo"),
    "sparse_csr": (lambda w: torch.eye(4).to_sparse_csr(), r"of layout torch\.sparse_csr"),
    "meta": (lambda w: w.to("meta"), "on the meta device"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "a quantized"),
    "nested": (lambda w: torch.nested.nested_tensor([w, w[:1]]), "a nested tensor"),
}


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about layouts that it is still working on
@pytest.mark.parametrize("kind", STRANGE)
def test_a_tensor_without_plain_values_is_refused(tmp_path: Path, kind: str) -> None:
    """The last entry, so that a loader that notices it late has overwritten the others."""
    change, message = STRANGE[kind]
    key = list(STATE)[-1]
    path = save({**STATE, key: change(STATE[key].clone())}, tmp_path / "a.pth")
    assert_nothing_is_loaded(network(), path, rf"1 entries are no plain tensors \(.*{message}")
    for read in (checkpoints.load, EfficientNet.from_checkpoint):
        with pytest.raises(ValueError, match=rf"a\.pth: 1 entries .*{message}"):
            read(path)
    with pytest.raises(ValueError, match=message):
        checkpoints.check(network(), {**STATE, key: change(STATE[key].clone())})


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.bool, torch.int64, torch.float4_e2m1fn_x2], ids=str
)
def test_a_dtype_that_is_no_weights_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    key = list(STATE)[-1]
    value = torch.zeros(STATE[key].numel(), dtype=torch.uint8).view(STATE[key].shape)
    value = value.view(dtype) if dtype is torch.float4_e2m1fn_x2 else value.to(dtype)
    path = save({**STATE, key: value}, tmp_path / "a.pth")
    assert_nothing_is_loaded(network(), path, f"of another dtype .*{dtype} instead of")


@pytest.mark.slow
def test_every_float_that_pytorch_casts_is_taken(tmp_path: Path) -> None:
    value = torch.ones_like(STATE[STEM])
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64):
        path = save({**STATE, STEM: value.to(dtype)}, tmp_path / "a.pth")
        model = network()
        checkpoints.load_into(model, path)
        assert torch.equal(model.state_dict()[STEM], value)


def freed(model: nn.Module) -> None:
    model.classifier[1].weight.untyped_storage().resize_(0)


def expanded(model: nn.Module) -> None:
    weight = model.classifier[1].bias
    model.classifier[1].bias = nn.Parameter(torch.zeros(1).expand(weight.shape))


def tied(model: nn.Module) -> None:
    norm = model.features[0][1]
    norm.running_mean = norm.bias.data


def lazy(model: nn.Module) -> None:
    model.classifier[1] = nn.LazyLinear(CLASSES)


def inference(model: nn.Module) -> None:
    with torch.inference_mode():
        model.classifier[1].bias = nn.Parameter(torch.zeros(CLASSES))


MODELS = {
    "meta": (lambda m: m.classifier[1].to("meta"), r"classifier\.1\.weight is on the meta device"),
    "freed": (freed, r"classifier\.1\.weight is without its memory"),
    "expanded": (expanded, r"elements of classifier\.1\.bias share memory"),
    "tied": (tied, r"0\.1\.bias and features\.0\.1\.running_mean are one tensor in the model"),
    "lazy": (lazy, r"the model is not initialised \(classifier\.1\.weight"),
    "inference": (inference, r"classifier\.1\.bias was made in inference mode"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_take_every_tensor_takes_none(tmp_path: Path, kind: str) -> None:
    change, message = MODELS[kind]
    model = network()
    change(model)
    path = save({**STATE, "features.0.1.bias": STATE[NORM] + 1}, tmp_path / "a.pth")
    before = model.state_dict()[STEM].clone()
    with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
        checkpoints.load_into(model, path)
    assert torch.equal(model.state_dict()[STEM], before)


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_share_memory_do_not_tie_parameters(tmp_path: Path, zipped: bool) -> None:
    shared = torch.arange(12.0)
    state = {**STATE, NORM: shared[:8], "features.0.1.bias": shared[4:]}
    state |= dict.fromkeys(("features.0.1.running_mean", "features.0.1.running_var"), shared[4:])
    one = torch.ones(8)
    state |= dict.fromkeys(("features.1.0.block.0.1.weight", "features.1.0.block.0.1.bias"), one)
    path = save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    model = EfficientNet.from_checkpoint(path, variant=TINY)
    own = model.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in own)
    storages = [value.untyped_storage().data_ptr() for value in own.values()]
    assert len(set(storages)) == len(storages)
    assert all(value.untyped_storage().resizable() for value in own.values())


def twice(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {f"module.{key}": value for key, value in state.items()}
    return {**named, f"module._orig_mod.{NORM}": state[NORM] + 1}


def twice_behind(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {f"module.{key}": value for key, value in state.items()}
    return {**named, f"_orig_mod.module.{NORM}": state[NORM] + 1}


def twice_in_nvidia(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = checkpoints.convert(state, "nvidia")
    key = next(key for key in named if key.startswith("layers.0."))
    return {**named, key.replace("layers.0.", "layer1."): named[key] + 1}


@pytest.mark.parametrize("spoil", [twice, twice_behind, twice_in_nvidia])
def test_entries_that_become_one_name_are_refused(tmp_path: Path, spoil) -> None:
    with pytest.raises(ValueError, match=r"a\.pth: 1 names are given twice"):
        checkpoints.load(save(spoil(STATE), tmp_path / "a.pth"))


def test_networks_under_a_number_and_its_digits_are_two(tmp_path: Path) -> None:
    path = save({1: STATE, "1": STATE}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: holds several networks \(1, 1\)"):
        checkpoints.load(path)


BLOCKS = {
    "torchvision": ("features.0.0.block.0.0.weight", "1 unexpected"),
    "timm": ("blocks.99.0.conv_pw.weight", r"no tensors of the block before blocks\.99"),
    "lukemelas": ("_blocks.99._expand_conv.weight", r"_project_conv\.weight is missing"),
    "nvidia": ("layers.99.block0.expand.conv.weight", r"before layers\.99"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", BLOCKS)
def test_a_block_where_none_belongs_is_named(tmp_path: Path, family: str) -> None:
    key, message = BLOCKS[family]
    state = {**checkpoints.convert(STATE, family), key: STATE[STEM]}
    assert_nothing_is_loaded(network(), save(state, tmp_path / "a.pth"), message)
    with pytest.raises(ValueError, match=rf"unexpected|{message}"):
        EfficientNet.from_checkpoint(tmp_path / "a.pth", variant=TINY)
    if family == "torchvision":
        with pytest.raises(ValueError, match=r"no block belongs at features\.0\.0"):
            checkpoints.convert(state, "timm")


def test_a_block_alone_below_the_first_place_is_refused() -> None:
    state = {STEM: STATE[STEM], "features.0.0.block.0.0.weight": STATE[STEM]}
    with pytest.raises(ValueError, match="no block belongs at"):
        checkpoints.convert(state, "timm")


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    path = save({**STATE, "x" * 100_000: STATE[STEM]}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="1 unexpected") as caught:
        checkpoints.load_into(network(), path)
    assert len(str(caught.value)) < 1000


CONFIGS = {
    "nested": "[" * 100_000,
    "list": '{"architecture": ["tf_efficientnet_b0"]}',
    "digits": '{"a": ' + "9" * 6000 + "}",
    "bytes": "\xff",
}


@pytest.mark.parametrize("kind", [*CONFIGS, "pipe", "folder"])
def test_a_config_of_another_program_is_passed_over(tmp_path: Path, kind: str) -> None:
    checkpoints.save(STATE, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    if kind in CONFIGS:
        config.write_bytes(CONFIGS[kind].encode("latin-1"))
    else:
        os.mkfifo(config) if kind == "pipe" else config.mkdir()
    assert checkpoints.load(tmp_path).keys() == STATE.keys()


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    for path, kind in ((tmp_path / "a.pth", "a pipe"), (Path("/dev/zero"), "a device")):
        assert_nothing_is_loaded(network(), path, f"{path}: {kind}, not a file")


def test_attributes_that_a_file_gives_a_tensor_are_not_called(tmp_path: Path) -> None:
    weight = nn.Parameter(STATE[STEM].clone())
    weight.__dict__.update(detach="x", is_contiguous=3, copy_=None)
    path = save({**STATE, STEM: weight}, tmp_path / "a.pth")
    assert torch.equal(checkpoints.load(path)[STEM], STATE[STEM])


def test_the_bit_that_negates_a_tensor_is_resolved(tmp_path: Path) -> None:
    value = torch.view_as_complex(torch.randn(*STATE[STEM].shape, 2)).conj().imag
    assert value.is_neg()
    path = save({**STATE, STEM: value}, tmp_path / "a.pth")
    for loaded in (
        checkpoints.load(path)[STEM],
        EfficientNet.from_checkpoint(path, variant=TINY).state_dict()[STEM],
    ):
        assert not loaded.is_neg()
        assert torch.equal(loaded, value)


# In a process of its own: what others have freed would do for the tensor.
LOADS_WITHOUT_MEMORY = """
import resource, sys
from effnet_fast import checkpoints
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (16 << 20)
for path in sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        checkpoints.load(path)
    except OSError as error:
        print(error.errno, error.filename, "memory" in str(error))
"""


@pytest.mark.slow
def test_lack_of_memory_is_the_systems_error_with_the_path(tmp_path: Path) -> None:
    state = {STEM: torch.empty(1 << 24)}  # 64 MiB
    paths = [str(tmp_path / f"a{suffix}") for suffix in (".pth", ".old.pth", ".safetensors")]
    torch.save(state, paths[0])
    torch.save(state, paths[1], _use_new_zipfile_serialization=False)
    save_file(state, paths[2])
    argv = [sys.executable, "-c", LOADS_WITHOUT_MEMORY, *paths]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{errno.ENOMEM} {path} True" for path in paths]


def test_a_stem_without_channels_is_refused(tmp_path: Path) -> None:
    path = save({**STATE, STEM: STATE[STEM][:, :0]}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: .* without channels of images"):
        EfficientNet.from_checkpoint(path, variant=TINY)


def test_an_archive_without_a_state_is_corrupt(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/version", "3\n")
    with pytest.raises(ValueError, match=r"a\.pth: truncated or corrupt"):
        checkpoints.load(tmp_path / "a.pth")
