"""Grad-CAM against a plain implementation by hooks on torchvision's network, and its overlays."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import trained
from effnet_fast import EfficientNet, cli
from effnet_fast.cli.common import CommandError
from effnet_fast.cli.explain import Overlays
from effnet_fast.diagnostics.grad_cam import colours, grad_cam, overlay
from effnet_fast.models import EfficientNetFeatures
from networks import TINY, assert_alike, pair, random_images


def by_hooks(model: nn.Module, x: Tensor, classes: list[int]) -> Tensor:
    """The paper's formula, image by image, with the whole network differentiated."""
    kept = {}

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        kept["map"] = output
        output.register_hook(lambda grad: kept.update(grad=grad))

    hook = model.features[-1].register_forward_hook(keep)
    cams = []
    for image, index in zip(x, classes, strict=True):
        model.zero_grad()
        model(image[None])[0, index].backward()
        maps, grads = kept["map"][0].detach(), kept["grad"][0]
        cam = sum(g.mean() * m for g, m in zip(grads, maps, strict=True)).clamp(min=0)
        cam = F.interpolate(cam[None, None], x.shape[2:], mode="bilinear")[0, 0]
        cams.append(cam / cam.max() if cam.max() > 0 else cam)
    hook.remove()
    return torch.stack(cams)


class TestGradCam:
    def test_equals_torchvision_with_hooks(self) -> None:
        models = pair(TINY, 96)
        x = random_images(3, 96, seed=5)
        classes = models.stock(x).argmax(1).tolist()
        expected = by_hooks(models.stock, x, classes)
        assert (expected.flatten(1).max(1).values == 1).all()  # something speaks for each
        assert expected.std() > 0.05
        assert_alike({"cam": grad_cam(models.actual, x)}, {"cam": expected})

    def test_of_named_classes(self) -> None:
        models = pair(TINY, 96)
        x = random_images(2, 96, seed=6)
        for classes in ([3, 700], [700, 3]):
            expected = by_hooks(models.stock, x, classes)
            assert_alike({"cam": grad_cam(models.actual, x, classes)}, {"cam": expected})

    def test_leaves_the_model_as_it_is(self) -> None:
        model = pair(TINY).actual
        x = random_images(1, 48)
        before = model(x)
        with torch.inference_mode():
            cam = grad_cam(model, x.clone())
        assert not cam.requires_grad
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(model(x), before)

    def test_nothing_speaks_for_a_class(self) -> None:
        model = pair(TINY).actual
        with torch.no_grad():
            model.classifier[1].weight[5] = 0.0
        cam = grad_cam(model, random_images(1, 48), [5])
        assert torch.equal(cam, torch.zeros(1, 48, 48))

    def test_a_photograph(self) -> None:
        """The cup, which the upper left corner does not show, speaks for espresso."""
        cam = grad_cam(trained.network(), trained.photographs()[:1])[0]
        assert cam[64:160, 64:160].mean() > 3 * cam[:32, :32].mean()

    @pytest.mark.parametrize(
        ("model", "classes", "error", "message"),
        [
            (nn.Conv2d(3, 8, 3), None, TypeError, "takes an EfficientNet, got Conv2d"),
            (EfficientNetFeatures(TINY), None, TypeError, "got EfficientNetFeatures"),
            (EfficientNet(TINY), None, ValueError, "in training mode"),
            (EfficientNet(TINY, num_classes=0).eval(), None, ValueError, "no classifier"),
            (EfficientNet(TINY, num_classes=4).eval(), [1], ValueError, "1 classes were given"),
            (EfficientNet(TINY, num_classes=4).eval(), [0, 4], ValueError, "from 0 to 3, got 4"),
            (EfficientNet(TINY, num_classes=4).eval(), [0, True], ValueError, "got True"),
        ],
    )
    def test_bad_input(
        self, model: nn.Module, classes: list[int] | None, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            grad_cam(model, random_images(2, 48), classes)


class TestOverlay:
    def test_colours_grow_brighter(self) -> None:
        table = colours(np.linspace(0, 1, 50))
        assert table.dtype == np.uint8
        grey = table @ np.array([0.299, 0.587, 0.114])
        assert (np.diff(grey) > 0).all()

    def test_cold_places_show_the_image(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cam = torch.zeros(6, 8)
        cam[2, 3] = 1.0
        mixed = np.asarray(overlay(Image.fromarray(pixels), cam))
        differs = (mixed != pixels).any(-1)
        assert differs[2, 3]
        assert differs.sum() == 1

    def test_refuses_maps_of_another_size(self) -> None:
        with pytest.raises(ValueError, match="the map is 8x6 pixels, the image 6x8"):
            overlay(Image.new("RGB", (6, 8)), torch.zeros(6, 8))


class TestClassify:
    """`classify --explain` on photographs."""

    def run(self, argv: list[object], capsys: pytest.CaptureFixture[str]) -> dict:
        assert cli.main(["classify", "--json", "--top", "1", *map(str, argv)]) == 0
        return json.loads(capsys.readouterr().out)

    @pytest.mark.slow
    def test_writes_a_folder(self, tmp_path, capsys) -> None:
        paths = [trained.path_of("coffee"), trained.path_of("camera"), trained.path_of("coffee")]
        folder = tmp_path / "new" / "maps of Zoë"
        report = self.run([*paths, "--explain", folder], capsys)
        names = ["coffee.png", "camera.png", "coffee-2.png"]
        written = [image["explanation"] for image in report["images"]]
        assert written == [str(folder / name) for name in names]
        assert sorted(p.name for p in folder.iterdir()) == sorted(names)
        for path in written:
            with Image.open(path) as image:
                assert (image.format, image.size) == ("PNG", (224, 224))
        assert (folder / names[0]).read_bytes() == (folder / names[2]).read_bytes()

    @pytest.mark.slow
    def test_shows_the_image_under_the_map(self, tmp_path, capsys) -> None:
        """The file is the crop that the network saw, mixed with the map of its first class."""
        path = tmp_path / "cam.png"
        self.run([trained.path_of("coffee"), "--explain", path], capsys)
        x = trained.photographs()[:1]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trained.LITE_MEAN, trained.LITE_STD))
        crop = (x[0] * std + mean).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        cam = grad_cam(trained.network(), x)[0]
        expected = np.asarray(overlay(Image.fromarray(crop), cam)).astype(int)
        assert abs(np.asarray(Image.open(path)).astype(int) - expected).max() <= 1
        assert abs(expected - crop).max() > 50

    @pytest.mark.slow
    def test_prints_the_file(self, tmp_path, capsys) -> None:
        path = tmp_path / "cam.jpg"
        argv = ["classify", str(trained.path_of("coffee")), "--explain", str(path)]
        assert cli.main(argv) == 0
        assert f"what speaks for espresso: {path}" in capsys.readouterr().out
        with Image.open(path) as image:
            assert image.format == "JPEG"

    @pytest.mark.slow
    def test_refusals(self, tmp_path, capsys) -> None:
        coffee, camera = str(trained.path_of("coffee")), str(trained.path_of("camera"))
        (tmp_path / "file").write_text("in the way")
        for argv, message in (
            ([coffee, camera, "--explain", "x.png"], "x.png: one file for 2 images; give a folder"),
            ([coffee, "--explain", "/no/such/x.png"], "there is no folder /no/such"),
            ([coffee, "--explain", str(tmp_path / "file" / "x")], "Not a directory"),
        ):
            assert cli.main(["classify", *argv]) == cli.BAD_INPUT
            captured = capsys.readouterr()
            assert captured.out == ""
            assert captured.err.rstrip().endswith(message)


def test_overlays_keep_off_the_images(tmp_path, monkeypatch) -> None:
    for folder in ("photos", "maps"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    path = tmp_path / "photos" / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.chdir(path.parent)
    for target, image in (("photos", str(path)), ("link", "a.png"), ("link/a.png", "a.png")):
        with pytest.raises(CommandError, match=r"the image .*a\.png, which an overlay could"):
            Overlays(tmp_path / target, [image])
    assert not Overlays(tmp_path / "maps", ["a.png"]).is_file
    assert Overlays(tmp_path / "photos" / "b.png", ["a.png"]).is_file


def test_dtype_of_the_model() -> None:
    """A map of a network in bf16 is one of fp32 numbers, and near it."""
    model = pair(TINY, 96).actual
    x = random_images(2, 96, seed=5)
    classes = [1, 2]
    exact = grad_cam(model, x, classes)
    cam = grad_cam(model.bfloat16(), x.bfloat16(), classes)
    assert cam.dtype == torch.float32
    assert (cam - exact).abs().mean() < 0.1


def test_other_pooling() -> None:
    model = EfficientNet(replace(TINY), num_classes=5, global_pool="catavgmax").eval()
    assert grad_cam(model, random_images(2, 48)).shape == (2, 48, 48)
