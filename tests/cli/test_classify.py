"""classify: the same classes as torchvision's network and preset, and every bad input."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import EfficientNet_B0_Weights

from effnet_fast import cli, images
from effnet_fast.cli import bench, common
from effnet_fast.models.variants import VARIANTS

TEN_CLASSES = 10
PROBABILITY_RTOL = 1e-3  # fused against stock in fp32, through a softmax
NO_WEIGHTS_NOTE = "effnet-fast: no --weights: random ones are used, labels mean nothing\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures, and weights for ten classes that tell them apart."""
    path = tmp_path_factory.mktemp("classify")
    rng = np.random.default_rng(0)
    inputs = []
    for name, side in (("a.png", 301), ("b.jpg", 240)):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((side, 260), Image.Resampling.BICUBIC).save(path / name)
        inputs.append(images.preprocess(images.load(path / name), VARIANTS["b0"]))
    model = common.build_model(VARIANTS["b0"], "reference", TEN_CLASSES)
    bench.calibrate(model, torch.cat(inputs))
    save_file(model.state_dict(), path / "ten.safetensors")
    torch.save({"state_dict": model.state_dict()}, path / "ten.pth")
    (path / "labels.txt").write_text("".join(f"name {i}\n" for i in range(TEN_CLASSES)))
    return path


def refused(argv, capsys):
    """Runs a command that must fail; its message, without the program's name."""
    assert cli.main([str(word) for word in argv]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.replace(NO_WEIGHTS_NOTE, "").splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("effnet-fast: ")


def classify(argv, capsys):
    assert cli.main(["classify", "--json", *(str(word) for word in argv)]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


@pytest.mark.parametrize("weights", ["ten.safetensors", "ten.pth"])
def test_agrees_with_torchvision(folder, weights, capsys):
    paths = [folder / "a.png", folder / "b.jpg"]
    report, notes = classify([*paths, "--weights", folder / weights, "--top", 10], capsys)
    assert notes == ""
    assert (report["model"], report["backend"]) == ("b0", "auto")
    stock = torchvision.models.efficientnet_b0(num_classes=TEN_CLASSES).eval()
    stock.load_state_dict(torch.load(folder / "ten.pth", weights_only=True)["state_dict"])
    preset = EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()
    leaders = set()
    for path, result in zip(paths, report["images"], strict=True):
        with torch.inference_mode():
            expected = stock(preset(Image.open(path).convert("RGB"))[None])[0].softmax(0)
        top = result["top"]
        assert result["path"] == str(path)
        assert [entry["class"] for entry in top] == expected.argsort(descending=True).tolist()
        actual = torch.tensor([entry["probability"] for entry in top])
        torch.testing.assert_close(
            actual, expected.sort(descending=True).values, rtol=PROBABILITY_RTOL, atol=0
        )
        leaders.add(tuple(entry["class"] for entry in top))
    assert len(leaders) == 2  # a network that ignored its input would pass otherwise


def test_prints_names_and_top(folder, capsys):
    argv = ["classify", folder / "a.png", "--weights", folder / "ten.pth", "--top", 3]
    assert cli.main([str(word) for word in [*argv, "--labels", folder / "labels.txt"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder / "a.png")
    assert len(lines) == 4
    assert all("%  name " in line for line in lines[1:])
    assert cli.main([str(word) for word in argv]) == 0
    assert "%  class " in capsys.readouterr().out


def test_without_weights_says_that_labels_mean_nothing(folder, capsys):
    report, notes = classify([folder / "a.png"], capsys)
    assert notes == NO_WEIGHTS_NOTE
    assert report["weights"] is None
    assert len(report["images"][0]["top"]) == 5


def test_top_is_at_most_the_number_of_classes(folder, capsys):
    argv = [folder / "a.png", "--weights", folder / "ten.pth", "--top", 1000]
    report, _ = classify(argv, capsys)
    assert len(report["images"][0]["top"]) == TEN_CLASSES


def test_backend_reference_gives_the_same_classes(folder, capsys):
    argv = [folder / "a.png", "--weights", folder / "ten.pth"]
    fused, _ = classify(argv, capsys)
    stock, _ = classify([*argv, "--backend", "reference", "--threads", 1], capsys)
    classes = [[e["class"] for e in r["images"][0]["top"]] for r in (fused, stock)]
    assert classes[0] == classes[1]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("cut.png", lambda content: content[: len(content) // 2], "truncated or corrupt image"),
        ("text.png", lambda content: b"hello", "not an image of type JPEG, PNG, WEBP"),
    ],
)
def test_refuses_bad_images(folder, tmp_path, capsys, name, spoil, message):
    path = tmp_path / name
    path.write_bytes(spoil((folder / "a.png").read_bytes()))
    assert refused(["classify", path], capsys).startswith(f"{path}: {message}")


def test_refuses_image_bombs(folder, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = folder / "a.png"
    assert refused(["classify", path], capsys).startswith(f"{path}: refused as a decompression bo")


def test_refuses_absent_files(folder, tmp_path, capsys):
    absent, image = tmp_path / "absent", folder / "a.png"
    expected = f"{absent}: No such file or directory"
    assert refused(["classify", absent], capsys) == expected
    assert refused(["classify", image, "--weights", absent], capsys) == expected
    assert refused(["classify", image, "--labels", absent], capsys) == expected
    assert refused(["classify", tmp_path], capsys) == f"{tmp_path}: Is a directory"


def test_refuses_weights_of_another_model(folder, capsys):
    weights = folder / "ten.pth"
    argv = ["classify", folder / "a.png", "--model", "b1", "--weights", weights]
    message = refused(argv, capsys)
    assert message.startswith(
        f"{weights}: weights do not fit the model: 148 missing (features.1.1."
    )


def test_refuses_labels_of_another_number(folder, capsys):
    labels = folder / "labels.txt"
    message = refused(["classify", folder / "a.png", "--labels", labels], capsys)
    assert message == f"{labels}: 10 lines, but the network has 1000 classes"


def test_refuses_unknown_backends(folder, capsys):
    message = refused(["classify", folder / "a.png", "--backend", "tpu"], capsys)
    assert message.startswith("unknown backend 'tpu'; allowed are auto, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_refuses_backends_that_cannot_run_here(folder, capsys):
    message = refused(["classify", folder / "a.png", "--backend", "cuda"], capsys)
    assert message.startswith("backend cuda cannot run here: ")
