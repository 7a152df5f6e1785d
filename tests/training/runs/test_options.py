"""What single arguments of a run do."""

from __future__ import annotations

import math

import pytest
import torch

from effnet_fast.models import EfficientNet
from effnet_fast.training.runs.feeding import Images
from effnet_fast.training.runs.freezing import resolution_of
from effnet_fast.training.runs.loop import train
from effnet_fast.training.runs.recipe import Recipe
from effnet_fast.training.runs.steps import Steps
from training_runs import CLASSES, SMALL, make_data, make_images

ONE = {**SMALL, "epochs": 1}


def run(data, out, **changes):
    """Losses by step, and metrics."""
    losses = {}
    return losses, train(data, out, on_step=losses.__setitem__, **{**ONE, **changes})


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """The folder and losses of a run without anything special."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    return out, run(data, out)[0]


@pytest.mark.parametrize("options", [{"memory": "lean"}, {"grad_checkpointing": True}])
def test_less_memory_computes_the_same(data, tmp_path, plain, options):
    losses, _ = run(data, tmp_path / "run", **options)
    assert list(losses.values()) == pytest.approx(list(plain[1].values()), rel=1e-4)


def test_the_first_loss_is_that_of_guessing(plain):
    assert plain[1][1] == pytest.approx(math.log(len(CLASSES)))


def test_the_seed_decides(data, tmp_path, plain):
    assert run(data, tmp_path / "same")[0] == plain[1]
    assert run(data, tmp_path / "other", seed=6)[0] != plain[1]


def test_frozen_layers_stay_as_they_were(data, tmp_path, plain):
    before = EfficientNet.from_checkpoint(plain[0]).state_dict()
    run(data, tmp_path / "run", weights=plain[0], model=None, freeze=-1, weight_decay=0.5)
    after = EfficientNet.from_checkpoint(tmp_path / "run").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}
    run(data, tmp_path / "bn", weights=plain[0], model=None, freeze=2, freeze_bn=False)
    after = EfficientNet.from_checkpoint(tmp_path / "bn").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "features.0.1.running_mean" in moved
    assert "features.2.0.block.0.0.weight" not in moved
    assert "features.3.0.block.0.0.weight" in moved


def test_a_classifier_of_other_classes_is_replaced(data, tmp_path, plain):
    own = tmp_path / "data"
    for name, count in (("train", 4), ("val", 1)):
        make_images(own / name, count)
        (own / name / "red").rename(own / name / "purple")
    run(own, tmp_path / "run", weights=plain[0], model=None, freeze=-1)
    model = EfficientNet.from_checkpoint(tmp_path / "run")
    assert model.class_names == ("blue", "green", "purple")


def test_published_weights_are_where_training_begins(data, tmp_path):
    run(data, tmp_path / "run", model="lite0", weights="DEFAULT", freeze=-1)
    model = EfficientNet.from_checkpoint(tmp_path / "run")
    from effnet_fast.models import efficientnet_lite0

    published = efficientnet_lite0(weights="DEFAULT").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, published[name]) != name.startswith("classifier."), name
    assert model.variant.padding == "same"  # Lite's
    assert model.variant.mean == pytest.approx((127 / 255,) * 3)


def test_accumulated_batches_make_the_step_of_a_large_one(data, tmp_path):
    """Two batches of 3 have the gradient of one of 6, as long as nothing looks at the batch."""
    options = {"freeze": -1, "dropout": 0.0, "drop_path": 0.0, "optimizer": "sgd", "clip": 0.0}
    _, one = run(data, tmp_path / "one", **options, batch=6)
    _, two = run(data, tmp_path / "two", **options, batch=3, accumulate=2)
    # The features of a network without training are so small that its weights hardly move.
    biases = [
        EfficientNet.from_checkpoint(tmp_path / name).get_parameter("classifier.1.bias")
        for name in ("one", "two")
    ]
    assert biases[0].abs().max() > 1e-5
    torch.testing.assert_close(*biases, rtol=1e-4, atol=1e-7)
    assert one["steps"] == two["steps"] == 3


def test_balanced_weights_have_a_mean_of_one(tmp_path):
    data = make_data(tmp_path / "data", train=4, val=1)
    for index in range(1, 4):
        (data / "train" / "red" / f"{index}.png").unlink()
    images = Images(data)
    assert images.classes == CLASSES
    weights = images.class_weights(Recipe(class_weights="balanced"))
    assert weights.tolist() == pytest.approx([9 / 12, 9 / 12, 9 / 3])
    assert weights[list(images.train.labels)].mean() == pytest.approx(1.0)
    assert images.class_weights(Recipe()) is None


def test_images_grow():
    recipe = Recipe(epochs=5, progressive=32)
    assert [resolution_of(epoch, recipe, 90) for epoch in range(5)] == [32, 48, 64, 72, 90]
    assert resolution_of(0, Recipe(epochs=5), 90) == 90


def test_progressive_images_are_trained_on(data, tmp_path, monkeypatch):
    sides = []
    plain = Steps.losses
    monkeypatch.setattr(
        Steps, "losses", lambda s, b: sides.append(b.images.shape[-1]) or plain(s, b)
    )
    run(data, tmp_path / "run", epochs=2, progressive=16, batch=9)
    assert sides == [16, 16, 32, 32]


def test_bf16_is_for_training_steps(data, tmp_path, monkeypatch):
    seen = set()
    plain = EfficientNet.forward

    def forward(self, x):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return plain(self, x)

    monkeypatch.setattr(EfficientNet, "forward", forward)
    losses, metrics = run(data, tmp_path / "run", precision="bf16")
    assert seen == {(True, True), (False, False)}
    assert all(math.isfinite(loss) for loss in losses.values())
    assert metrics["top5"] == 1.0


def test_without_validation_images(data, tmp_path):
    _, metrics = run(data / "train", tmp_path / "run")
    assert metrics["top1"] is None
    assert metrics["train_loss"] > 0
    _, metrics = run(data / "train", tmp_path / "other", val=str(data / "val"))
    assert metrics["top5"] == 1.0


def test_an_unreadable_image_is_counted_and_left_out(tmp_path):
    data = make_data(tmp_path / "data", train=4, val=1)
    (data / "train" / "red" / "0.png").write_bytes(b"no image")
    _, metrics = run(data, tmp_path / "run")
    assert metrics["unreadable"] == 1
    head, row = (tmp_path / "run" / "unreadable.csv").read_text().splitlines()
    assert head == "path,reason"
    assert row.startswith(str(data / "train" / "red" / "0.png") + ",")
    with pytest.raises(ValueError, match=r"0\.png"):
        run(data, tmp_path / "other", unreadable_limit=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "b99"}, "model must be one of b0"),
        ({"weights": "NONE_V9"}, "efficientnet_tiny has no published weights"),
        ({"weights": "no/such/file.pth"}, "no/such/file.pth"),
        ({"resolution": 0}, "resolution must be an int of at least 1"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ({"precision": "fp16"}, "needs a CUDA device"),
        ({"strategy": "fsdp"}, "needs several processes: start them with torchrun"),
        ({"memory": "little"}, "memory must be one of"),
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"freeze": 99}, "stages must be an int between"),
        ({"batch": 1}, "one number per channel"),
        ({"val": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_arguments_leave_no_folder(data, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(data, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run(data, tmp_path / "run")  # and a corrected call is welcome


def test_one_image(tmp_path):
    data = tmp_path / "data"
    make_data(data, train=1, val=1)
    for name in ("blue", "green"):
        (data / "train" / name / "0.png").unlink()
        (data / "train" / name).rmdir()
        (data / "val" / name / "0.png").unlink()
        (data / "val" / name).rmdir()
    with pytest.raises(ValueError, match="training needs 2 images per step, or more than 32"):
        run(data, tmp_path / "run")
    _, metrics = run(data, tmp_path / "larger", resolution=40)
    assert metrics["top1"] == 1.0  # of one class
