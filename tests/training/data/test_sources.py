"""Lists of images: what is found, in which order, with which labels."""

import os
import warnings

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from effnet_fast.training.data.decoding import TrainingCrop
from effnet_fast.training.data.loading import batches
from effnet_fast.training.data.sources import ImageList, open_images, splits
from image_folders import class_folders, photo


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        class_folders(tmp_path / split, {"cat": count, "dog": count + 1, "Ant": 1})
    return tmp_path


def relative(images, root):
    return [os.path.relpath(path, root) for path in images.paths]


def test_class_folders_are_torchvisions(data):
    deep = data / "train" / "cat" / "deeper"
    deep.mkdir()
    photo(8, 8).save(deep / "x.PNG")
    (data / "train" / "cat" / "notes.txt").write_text("no image")
    images = open_images(data, split="train")
    stock = ImageFolder(str(data / "train"))
    assert images.classes == tuple(stock.classes) == ("Ant", "cat", "dog")
    assert sorted(zip(images.paths, images.labels, strict=True)) == sorted(stock.samples)


def test_splits(data):
    assert splits(data) == ("train", "val")
    assert len(open_images(data, split="train")) == 8
    assert len(open_images(data, split="val")) == 6
    (data / "val").rename(data / "test")
    assert splits(data) == ("train", "val")
    assert open_images(data, split="val").paths[0].startswith(str(data / "test"))
    assert splits(data / "test") == ()
    assert len(open_images(data / "test", split="train")) == 6
    (data / "test").rename(data / "other")
    with pytest.raises(FileNotFoundError, match="has no val/ or test/ and no table of that name"):
        open_images(data, split="val")
    with pytest.raises(ValueError, match="split must be one of train, val, got 'dev'"):
        open_images(data, split="dev")


def test_a_folder_of_splits_is_no_set_of_classes(data):
    with pytest.raises(ValueError, match=r"'train', 'val' not among .*hold splits"):
        open_images(data, classes=("Ant", "cat", "dog"))


def test_plain_and_unlabelled_folders(data):
    (data / "x.jpg").write_bytes((data / "train" / "cat" / "0000.jpg").read_bytes())
    (data / ".hidden.jpg").write_text("")
    plain = open_images(data / "train" / "cat")
    assert (plain.labels, plain.classes, len(plain)) == (None, None, 3)
    everything = open_images(data, labelled=False)
    assert len(everything) == 15
    assert everything.labels is None
    assert relative(everything, data)[-1] == "x.jpg"
    assert len(open_images(data / "x.jpg")) == 1
    assert open_images([data / "x.jpg", "y.jpg"]).paths == [str(data / "x.jpg"), "y.jpg"]
    assert open_images(plain) is plain


def test_loose_images_are_warned_of(data):
    photo(8, 8).save(data / "train" / "loose.jpg")
    with pytest.warns(UserWarning, match="1 images lie beside the classes' folders"):
        assert len(open_images(data, split="train")) == 8


def test_classes_of_the_training_set_number_the_labels(data):
    images = open_images(data, split="val", classes=("dog", "cat", "bird", "Ant"))
    assert images.classes == ("dog", "cat", "bird", "Ant")
    assert images.labels == [3, 1, 1, 0, 0, 0]


def table(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_of_names_and_numbers(data):
    names = table(
        data / "a.csv",
        "label,path,split\ndog,train/dog/0000.jpg,train\ncat,train/cat/0001.jpg,train\n"
        'cat,"train/cat/0,1.jpg",test\n',
    )
    images = open_images(names)
    assert images.classes == ("cat", "dog")
    assert images.labels == [1, 0, 0]
    assert relative(images, data)[2] == "train/cat/0,1.jpg"
    assert open_images(names, split="val").labels == [0]
    assert open_images(names, split="train", classes=("x", "dog", "cat")).labels == [1, 2]
    with pytest.warns(UserWarning, match=r"no images in class '1'"):
        numbers = open_images(table(data / "b.csv", "\ufeffpath,label\na.jpg,2\nb.jpg,0\n"))
    assert numbers.classes == ("0", "1", "2")
    assert numbers.labels == [2, 0]
    assert open_images(data / "b.csv", classes=("x", "y", "z")).labels == [2, 0]
    without = open_images(table(data / "c.csv", "path\na.jpg\n"))
    assert (without.labels, without.classes) == (None, None)


def test_numbers_that_are_names(data):
    csv = table(data / "a.csv", "path,label\na.jpg,2\nb.jpg,1\nc.jpg,02\n")
    assert open_images(csv, classes=("1", "2", "3")).labels == [1, 0, 1]
    with pytest.raises(ValueError, match=r"row 2 has label '1'; allowed are the classes' names"):
        open_images(csv, classes=("0", "10", "2"))
    with pytest.raises(ValueError, match=r"label '2' is the name of a class, and '02' is none"):
        open_images(csv, classes=("x", "2", "y"))


def test_a_list_may_begin_with_a_mark_and_have_odd_names(data):
    images = open_images(table(data / "a.txt", "\ufeffa.jpg\nb\u2028\x85.jpg\n"), labelled=False)
    assert relative(images, data) == ["a.jpg", "b\u2028\x85.jpg"]


def test_tables_named_for_a_split(data):
    for split in ("train", "val"):
        (data / split).rename(data / f"{split}-images")
    table(data / "train.csv", "path,label\ntrain-images/cat/0000.jpg,cat\n")
    table(data / "val.txt", "val-images/cat/0000.jpg\n\n")
    assert splits(data) == ("train", "val")
    assert open_images(data, split="train").classes == ("cat",)
    assert relative(open_images(data, split="val"), data) == ["val-images/cat/0000.jpg"]


def test_parquet_equals_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"path": ["a.jpg", "b/ü.jpg"], "label": ["x", "y"], "more": [1.5, 2.5]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    images = open_images(tmp_path / "t.parquet")
    assert relative(images, tmp_path) == columns["path"]
    assert (images.labels, images.classes) == ([0, 1], ("x", "y"))
    parquet.write_table(pyarrow.table({"file": ["a.jpg"]}), tmp_path / "u.parquet")
    with pytest.raises(ValueError, match=r"needs the columns path and label, has 'file'"):
        open_images(tmp_path / "u.parquet")
    (tmp_path / "v.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"v\.parquet: "):
        open_images(tmp_path / "v.parquet")


BAD_TABLES = {
    "file,label\na.jpg,1\n": "needs the columns path and label, has 'file', 'label'",
    "path,label\na.jpg\n": "line 2 has 1 fields, the header 2",
    "path,label\n,1\n": "row 1 has no path",
    "path,label\na.jpg,cat\nb.jpg,\n": "row 2 has label ''",
    "": "needs the columns path and label",
    "path,label\n": "no images",
}


@pytest.mark.parametrize("text", BAD_TABLES)
def test_bad_tables(tmp_path, text):
    with pytest.raises(ValueError, match=BAD_TABLES[text]) as caught:
        open_images(table(tmp_path / "t.csv", text))
    assert "t.csv" in str(caught.value)


class Pairs:
    """A dataset in torchvision's style."""

    classes = ("b", "a")
    targets = (0, 1, 1)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Image.new("RGB", (4, 4), (index, 0, 0)), self.targets[index]


def test_datasets_with_classes_and_targets():
    images = open_images(Pairs())
    assert (images.labels, images.classes) == ([0, 1, 1], ("b", "a"))
    images = open_images(Pairs(), classes=("a", "x", "b"))
    assert (images.labels, images.classes) == ([2, 0, 0], ("a", "x", "b"))
    (batch,) = batches(images, None, TrainingCrop(4))
    assert batch.labels.tolist() == [2, 0, 0]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"Pairs: 'b' not among the 1 classes"):
        open_images(Pairs(), classes=("a",))


def test_tensor_datasets():
    x, y = torch.arange(4 * 48, dtype=torch.uint8).view(4, 3, 4, 4), torch.tensor([0, 1, 0, 2])
    images = open_images(torch.utils.data.TensorDataset(x, y))
    whole = TrainingCrop(4, scale=(1, 1), ratio=(1, 1))
    (batch,) = batches(images, None, whole)
    assert torch.equal(batch.images, x)
    assert torch.equal(batch.labels, y)
    assert images.labels is None
    (alone,) = batches(open_images(Bare()), None, whole)
    assert alone.labels.tolist() == [-1]


class Bare:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(3, 4, 4)


def test_what_is_no_data(tmp_path):
    with pytest.raises(TypeError, match="got generator"):
        open_images(x for x in [])
    with pytest.raises(FileNotFoundError):
        open_images(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        open_images(tmp_path / "gone.csv")
    (tmp_path / "x.bin").write_text("")
    with pytest.raises(ValueError, match=r"x\.bin: not among what holds images: a folder, \.csv"):
        open_images(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"no images \(\.jpg"):
        open_images([])


def test_lists_refuse_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="2 paths, but 1 labels"):
        ImageList(["a", "b"], [0])
    with pytest.raises(ValueError, match="b: label 2 is out of range, allowed is 0 to 1"):
        ImageList(["a", "b"], [0, 2], ["x", "y"])


def test_a_good_set_gives_no_warning(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(data, split="train")
