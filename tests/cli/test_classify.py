"""classify: the same classes as torchvision's network and preset, and every bad input."""

import functools
import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import EfficientNet_B0_Weights

from effnet_fast import EfficientNet, cli
from effnet_fast.cli import bench, common
from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import images, weights

TEN_CLASSES = 10
PROBABILITY_RTOL = 1e-3  # fused against stock in fp32, through a softmax
NO_WEIGHTS_NOTE = (
    "effnet-fast: no --weights: the weights are random, and the classes mean nothing\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures, and weights for ten classes that tell them apart."""
    path = tmp_path_factory.mktemp("classify")
    rng = np.random.default_rng(0)
    inputs = []
    for name, side in (("a.png", 301), ("b.jpg", 240)):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((side, 260), Image.Resampling.BICUBIC).save(path / name)
        inputs.append(images.preset(VARIANTS["b0"])(images.load(path / name))[None])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_prints_names_and_top(folder, capsys):
    argv = ["classify", folder / "a.png", "--weights", folder / "ten.pth", "--top", 3]
    assert cli.main([str(word) for word in [*argv, "--labels", folder / "labels.txt"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder / "a.png")
    assert len(lines) == 4
    assert all("%  name " in line for line in lines[1:])
    assert cli.main([str(word) for word in argv]) == 0
    assert "%  class " in capsys.readouterr().out


@pytest.mark.slow
def test_without_weights_says_that_labels_mean_nothing(folder, capsys):
    report, notes = classify([folder / "a.png", "--model", "b0"], capsys)
    assert notes == NO_WEIGHTS_NOTE
    assert report["weights"] is None
    assert len(report["images"][0]["top"]) == 5


@pytest.mark.slow
def test_top_is_at_most_the_number_of_classes(folder, capsys):
    argv = [folder / "a.png", "--weights", folder / "ten.pth", "--top", 1000]
    report, _ = classify(argv, capsys)
    assert len(report["images"][0]["top"]) == TEN_CLASSES


@pytest.mark.slow
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


@pytest.mark.slow
def test_refuses_absent_files(folder, tmp_path, capsys):
    absent, image = tmp_path / "absent", folder / "a.png"
    expected = f"{absent}: No such file or directory"
    assert refused(["classify", absent], capsys) == expected
    assert refused(["classify", image, "--weights", absent], capsys) == expected
    assert refused(["classify", image, "--labels", absent], capsys) == expected
    assert refused(["classify", tmp_path], capsys) == f"{tmp_path}: no images there"
    pattern = tmp_path / "*.jpg"
    assert refused(["classify", pattern], capsys) == f"{pattern}: no images there"


@pytest.mark.slow
def test_takes_folders_and_patterns(folder, tmp_path, capsys):
    (tmp_path / "below").mkdir()
    names = ["b [1].png", "below/a.png", "c.png"]
    for name in names:
        (tmp_path / name).write_bytes((folder / "a.png").read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    cases = [
        ([tmp_path], names),
        ([tmp_path / "*.png"], [names[0], names[2]]),
        ([tmp_path / "**/*.png"], names),
        ([tmp_path / names[0], tmp_path / "below"], names[:2]),  # a file's name is no pattern
    ]
    for words, expected in cases:
        report, _ = classify([*words, "--weights", folder / "ten.pth", "--top", 1], capsys)
        assert [image["path"] for image in report["images"]] == [
            str(tmp_path / name) for name in expected
        ]


@pytest.mark.slow
def test_refuses_weights_of_another_model(folder, capsys):
    weights = folder / "ten.pth"
    argv = ["classify", folder / "a.png", "--model", "b1", "--weights", weights]
    message = refused(argv, capsys)
    assert message.startswith(
        f"{weights}: weights do not fit the model: 148 missing (features.1.1."
    )


@pytest.mark.slow
def test_refuses_weights_for_other_images(folder, tmp_path, capsys):
    model = EfficientNet.from_checkpoint(folder / "ten.pth", in_chans=1)
    path = tmp_path / "grey.pth"
    torch.save(model.state_dict(), path)
    message = refused(["classify", folder / "a.png", "--weights", path], capsys)
    assert message.startswith(f"{path}: the network takes 1-channel images; ")


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


class TestPublishedWeights:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", ["DEFAULT", "IMAGENET1K_V1", "EfficientNet_B0_Weights.IMAGENET1K_V1"]
    )
    def test_names_classes(self, published, folder, capsys, name):
        report, notes = classify([folder / "a.png", "--weights", name], capsys)
        assert notes == ""
        assert (report["model"], report["weights"]) == (
            "b0",
            "EfficientNet_B0_Weights.IMAGENET1K_V1",
        )
        top = report["images"][0]["top"]
        assert len(top) == 5
        categories = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
        assert [entry["label"] for entry in top] == [categories[entry["class"]] for entry in top]

    @pytest.mark.slow
    def test_agrees_with_torchvision(self, published, b0_state, folder, capsys):
        report, _ = classify([folder / "a.png", "--weights", "DEFAULT", "--top", 3], capsys)
        stock = torchvision.models.efficientnet_b0().eval()
        stock.load_state_dict(b0_state)
        preset = EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()
        with torch.inference_mode():
            expected = stock(preset(Image.open(folder / "a.png"))[None])[0].softmax(0).topk(3)
        top = report["images"][0]["top"]
        assert [entry["class"] for entry in top] == expected.indices.tolist()
        actual = torch.tensor([entry["probability"] for entry in top])
        torch.testing.assert_close(actual, expected.values, rtol=PROBABILITY_RTOL, atol=0)

    @pytest.mark.slow
    def test_prepares_images_as_the_weights_say(self, published, folder, monkeypatch, capsys):
        argv = [folder / "a.png", "--weights", "DEFAULT"]
        before, _ = classify(argv, capsys)
        member = weights.EfficientNet_B0_Weights.DEFAULT
        other = functools.partial(member.value.transforms, crop_size=96)
        monkeypatch.setattr(member.value, "transforms", other)
        after, _ = classify(argv, capsys)
        assert before["images"] != after["images"]

    @pytest.mark.slow
    def test_labels_override_names(self, published, folder, tmp_path, capsys):
        labels = tmp_path / "labels.txt"
        labels.write_text("".join(f"own {i}\n" for i in range(1000)))
        argv = [folder / "a.png", "--weights", "DEFAULT", "--labels", labels]
        report, _ = classify(argv, capsys)
        assert all(e["label"] == f"own {e['class']}" for e in report["images"][0]["top"])

    @pytest.mark.slow
    def test_files_of_1000_classes_have_names(self, b0_file, folder, tmp_path, capsys):
        path = tmp_path / "b0.pth"
        path.write_bytes(b0_file)
        for family in ([], ["--family", "torchvision"]):
            report, _ = classify([folder / "a.png", "--weights", path, *family], capsys)
            assert report["weights"] == str(path)
            assert all(e["label"] in weights.CATEGORIES for e in report["images"][0]["top"])

    @pytest.mark.slow
    def test_the_enum_tells_the_model(self, folder, monkeypatch, capsys):
        asked = []

        def get_state_dict(self, *args, **options):
            asked.append(repr(self))
            raise ValueError("stop")

        monkeypatch.setattr(weights.WeightsEnum, "get_state_dict", get_state_dict)
        argv = ["classify", folder / "a.png", "--weights", "EfficientNet_B1_Weights.DEFAULT"]
        assert refused(argv, capsys) == "stop"
        assert refused(["classify", folder / "a.png", "--weights", "DEFAULT"], capsys) == "stop"
        argv = ["classify", folder / "a.png", "--model", "b1", "--weights", "IMAGENET1K_V1"]
        assert refused(argv, capsys) == "stop"
        assert asked == [
            "EfficientNet_B1_Weights.IMAGENET1K_V2",
            "EfficientNet_B0_Weights.IMAGENET1K_V1",
            "EfficientNet_B1_Weights.IMAGENET1K_V1",
        ]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["--weights", "IMAGENET1K_V9"],
                "EfficientNet_B0_Weights has no member 'IMAGENET1K_V9'; allowed are IMAGENET1K_V1",
            ),
            (["--weights", "EfficientNet_B9_Weights.DEFAULT"], "'EfficientNet_B9_Weights.DEFAULT'"),
            (["--weights", "DEFAULT", "--model", "b8"], "efficientnet_b8 has no published weights"),
            (
                ["--weights", "EfficientNet_B1_Weights.DEFAULT", "--model", "b0"],
                "--weights EfficientNet_B1_Weights.DEFAULT are of b1, but --model is b0",
            ),
        ],
    )
    def test_refuses_bad_names(self, folder, capsys, options, message):
        assert refused(["classify", folder / "a.png", *options], capsys).startswith(message)

    @pytest.mark.slow
    def test_refuses_tampered_files(self, published, folder, tmp_path, capsys):
        argv = ["classify", folder / "a.png", "--weights", "DEFAULT"]
        assert cli.main([str(word) for word in argv]) == 0
        capsys.readouterr()
        (path,) = (tmp_path / "torch/hub/checkpoints").iterdir()
        path.write_bytes(path.read_bytes()[:-1])
        assert refused(argv, capsys).startswith(f"{path}: the file's SHA-256 is ")

    def test_says_that_there_is_no_network(self, published, folder, monkeypatch, capsys):
        member = weights.EfficientNet_B0_Weights.DEFAULT
        monkeypatch.setattr(member.value, "url", "http://127.0.0.1:1/b0-01234567.pth")
        message = refused(["classify", folder / "a.png", "--weights", "DEFAULT"], capsys)
        assert message.startswith("http://127.0.0.1:1/b0-01234567.pth: not downloaded: ")

    @pytest.mark.slow
    def test_a_file_with_the_look_of_a_name_is_a_file(self, b0_file, folder, monkeypatch, capsys):
        monkeypatch.chdir(folder)
        (folder / "DEFAULT").write_bytes(b0_file)
        report, _ = classify([folder / "a.png", "--weights", "DEFAULT"], capsys)
        (folder / "DEFAULT").unlink()
        assert report["weights"] == "DEFAULT"
