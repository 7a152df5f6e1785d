"""Bad inputs, each with the outcome that docs/training_data.md states."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_fast.pretrained.images import ImageClassification
from effnet_fast.training.data.decoding import EvaluationCrop, TrainingCrop, decode
from effnet_fast.training.data.loading import batches
from effnet_fast.training.data.sources import open_images
from image_folders import class_folders, encoded, photo

CROPS = {
    "training": TrainingCrop(16),
    "evaluation": EvaluationCrop(ImageClassification(crop_size=16, resize_size=18)),
}


def animated(**options):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    return {"save_all": True, "append_images": frames[1:], "duration": 50, **options}


def red(**options):
    return encoded(Image.new("RGB", (20, 20), "red"), **options)


def grey16(first=0):
    """A ramp up to the largest of 16 bits."""
    ramp = np.linspace(first, 65535, 400).reshape(20, 20).astype(np.uint16)
    return encoded(Image.fromarray(ramp), "PNG")


def truncated(format):
    content = encoded(photo(200, 150), format)
    return content[: len(content) // 2]


READABLE = {  # content, and the mean colour of what is read
    "one_pixel": (encoded(Image.new("RGB", (1, 1), (10, 200, 30)), "PNG"), (10, 200, 30)),
    "png_16_bit_grey": (grey16(), (127, 127, 127)),
    "png_16_bit_white": (grey16(65535), (255, 255, 255)),
    "cmyk_jpeg": (encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0))), (254, 0, 0)),
    "animated_png": (red(format="PNG", **animated()), (255, 0, 0)),
    "animated_webp": (red(format="WEBP", **animated(lossless=True)), (255, 0, 0)),
    "palette": (encoded(Image.new("RGB", (20, 20), (255, 0, 0)).convert("P"), "PNG"), (255, 0, 0)),
    "transparent": (encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 0)), "PNG"), (255, 0, 0)),
    "grey": (encoded(Image.new("L", (20, 20), 77)), (77, 77, 77)),
}  # fmt: skip
UNREADABLE = {  # content, and the reason
    "truncated_jpeg": (truncated("JPEG"), "truncated or corrupt image: "),
    "truncated_png": (truncated("PNG"), "truncated or corrupt image: "),
    "truncated_webp": (truncated("WEBP"), "truncated or corrupt image: "),
    "empty": (b"", "not an image of type JPEG, PNG, WEBP"),
    "text": (b"hello", "not an image of type JPEG, PNG, WEBP"),
    "gif": (red(format="GIF"), "not an image of type JPEG, PNG, WEBP"),
}


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("name", READABLE)
def test_is_read(tmp_path, name, crop):
    content, colour = READABLE[name]
    (tmp_path / "x.jpg").write_bytes(content)
    (batch,) = batches(open_images(tmp_path), None, crop)
    assert batch.problems == ()
    assert batch.images.shape == (1, 3, 16, 16)
    if name != "png_16_bit_grey":  # a random part of a ramp has another mean
        mean = batch.images.float().mean((0, 2, 3))
        assert torch.allclose(mean, torch.tensor(colour).float(), atol=1.5)


def test_16_bits_are_scaled_and_not_clipped():
    pixels = np.asarray(decode(grey16()))[..., 0].ravel()
    assert (pixels[0], pixels[-1]) == (0, 255)
    assert len(np.unique(pixels)) > 200


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("name", UNREADABLE)
def test_is_reported(tmp_path, name, crop):
    content, reason = UNREADABLE[name]
    (tmp_path / "x.jpg").write_bytes(content)
    photo(20, 20).save(tmp_path / "y.jpg")
    (batch,) = batches(open_images(tmp_path), None, crop)
    assert batch.indices.tolist() == [1]
    (problem,) = batch.problems
    assert problem.path == str(tmp_path / "x.jpg")
    assert problem.reason.startswith(reason)


def test_absent_and_dangling_files_are_reported(tmp_path):
    (tmp_path / "list.txt").write_text("gone.jpg\n")
    (tmp_path / "x.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for data in (tmp_path, tmp_path / "list.txt"):
        (batch,) = batches(open_images(data), None, TrainingCrop(8))
        assert batch.problems[0].reason == "No such file or directory"


def test_an_empty_class_keeps_its_label_and_is_warned_of(tmp_path):
    class_folders(tmp_path, {"a": 1, "b": 0, "c": 2})
    with pytest.warns(UserWarning, match="no images in class 'b'"):
        images = open_images(tmp_path)
    assert images.classes == ("a", "b", "c")
    assert images.labels == [0, 2, 2]


def test_no_class_has_images(tmp_path):
    class_folders(tmp_path, {"a": 0, "b": 0})
    with pytest.warns(UserWarning, match="'a', 'b'"), pytest.raises(ValueError, match="no images"):
        open_images(tmp_path)


def test_a_class_that_the_test_set_lacks_is_fine(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_images(class_folders(tmp_path, {"b": 2}), classes=("a", "b"))
    assert images.labels == [1, 1]


def test_a_class_that_the_training_set_lacks(tmp_path):
    class_folders(tmp_path, {"a": 1, "new": 1})
    with pytest.raises(ValueError, match=r"'new' not among the 2 classes .*'a', 'b'"):
        open_images(tmp_path, classes=("a", "b"))


def test_one_image(tmp_path):
    images = open_images(class_folders(tmp_path, {"only": 1}))
    found = list(itertools.chain(batches(images, None, TrainingCrop(8), batch=8)))
    assert [len(b.images) for b in found] == [1]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_symlink_loop(tmp_path, labelled):
    class_folders(tmp_path, {"a": 1})
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match=r"again.*: a symbolic link that leads back"):
        open_images(tmp_path, labelled=labelled)
    (tmp_path / "a" / "again").unlink()
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    with pytest.raises(ValueError, match=r"self: Too many levels of symbolic links"):
        open_images(tmp_path, labelled=labelled)


def test_linked_folders_are_followed(tmp_path):
    class_folders(tmp_path / "real", {"a": 2})
    (tmp_path / "set").mkdir()
    for name in ("x", "y"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "real" / "a", target_is_directory=True)
    assert open_images(tmp_path / "set").labels == [0, 0, 1, 1]


@pytest.mark.parametrize("label", ["-1", "2", "9999999999", "1.5", "bird"])
def test_a_label_out_of_range(tmp_path, label):
    (tmp_path / "t.csv").write_text(f"path,label\nx.jpg,0\ny.jpg,{label}\n")
    with pytest.raises(ValueError, match=rf"t\.csv: row 2 has label '{label}'; allowed are 0 to 1"):
        open_images(tmp_path / "t.csv", classes=("a", "b"))


@pytest.mark.parametrize("label", ["-1", "1000000"])
def test_a_number_that_makes_no_classes(tmp_path, label):
    (tmp_path / "t.csv").write_text(f"path,label\nx.jpg,0\ny.jpg,{label}\n")
    with pytest.raises(ValueError, match=rf"label {label} .*out of range, allowed are 0 to 99999"):
        open_images(tmp_path / "t.csv")


class Labelled:
    classes = ("a", "b")

    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return photo(8, 8), self.label


@pytest.mark.parametrize("label", [-1, 2])
def test_a_datasets_label_out_of_range(label):
    with pytest.raises(RuntimeError, match=rf"Labelled\[0\]: .*label {label} is out of range"):
        list(batches(open_images(Labelled(label)), None, TrainingCrop(8)))


def test_spaces_umlauts_and_bytes_in_paths(tmp_path):
    root = class_folders(tmp_path / "große Bilder, neu", {"schöne Katze": 2, "日本 犬": 1})
    (root / "schöne Katze" / b"\xff raw.png".decode("utf-8", "surrogateescape")).write_bytes(
        encoded(photo(9, 9), "PNG")
    )
    images = open_images(root)
    assert images.classes == ("schöne Katze", "日本 犬")
    assert len(images) == 4
    (root / "t.csv").write_text("path,label\nschöne Katze/0000.jpg,schöne Katze\n", "utf-8")
    for data, count in ((images, 4), (open_images(root / "t.csv"), 1)):
        (batch,) = batches(data, None, TrainingCrop(8), workers=1)
        assert (len(batch.images), batch.problems) == (count, ())
