"""A network that answers batches of images, in this process or others: for eval and predict."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast import deployment
from effnet_fast.pretrained.images import ImageClassification
from effnet_fast.training.answers.rows import Answers
from effnet_fast.training.data.decoding import EvaluationCrop
from effnet_fast.training.data.loading import Batch, default_workers
from effnet_fast.training.data.sources import NO_LABEL, ImageList, Sample
from effnet_fast.training.data.workers import Workers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH = {"cpu": 8, "cuda": 64}  # images per call
UNDER_WAY = 2  # batches that a GPU computes while the next ones are decoded


def inference_form(model: nn.Module, dtype: torch.dtype | None, backend: str = "auto") -> nn.Module:
    """The form of a network that runs fastest: deployed, unless stock PyTorch is asked for.

    Args:
        model: in eval mode.
        dtype: as for `deploy`; None means the parameters'.
        backend: as for `deploy`, or "reference" for the network itself, run by PyTorch.

    Raises:
        ValueError, RuntimeError: it cannot be deployed so; or "reference" with another dtype.
    """
    if backend != "reference":
        return deployment.deploy(model, dtype, backend=backend)
    own = next(model.parameters()).dtype
    if dtype not in (None, own):
        raise ValueError(f"backend 'reference' computes in the network's own {own}, not in {dtype}")
    return stock_of(model)


def stock_of(model: Any) -> Any:
    """The same weights, run by PyTorch."""
    stock = copy.deepcopy(model)
    stock.backend = "reference"
    return stock


def without_classifier(model: Any) -> Any:
    """A copy that returns pooled features [N,head_hidden_size]."""
    encoder = copy.deepcopy(model)
    encoder.reset_classifier(0)
    return encoder


class Read(NamedTuple):
    """N images, M of which could be read."""

    indices: list[int]  # in their list [N]
    labels: list[int]  # [N], -1 where they are not known
    reasons: list[str | None]  # why each could not be read, None where it could [N]
    pixels: Tensor  # uint8 channels_last [M,3,R,R]

    @classmethod
    def of_batch(cls, batch: Batch) -> Read:
        """What a Loader has read."""
        problems = batch.problems
        return cls(
            [*batch.indices.tolist(), *(problem.index for problem in problems)],
            [*batch.labels.tolist(), *([NO_LABEL] * len(problems))],
            [*([None] * len(batch.images)), *(problem.reason for problem in problems)],
            batch.images,
        )

    def classes(self) -> Tensor:
        """The labels of the images that could be read, int64 [M]."""
        rows = zip(self.labels, self.reasons, strict=True)
        return torch.tensor([n for n, reason in rows if reason is None], dtype=torch.int64)


class Started(NamedTuple):
    """What a network says of M images; a GPU may still compute."""

    classes: Tensor  # int64 [M,K], or [M,0]
    values: Tensor  # probabilities [M,K], or features [M,D]
    losses: Tensor | None = None  # [M]


class Decoding:
    """Decodes batches of a list's images: what worker processes do where a GPU computes.

    Args:
        images, preset, draft: as for `Answering`.
    """

    def __init__(self, images: ImageList, preset: ImageClassification, draft: bool = False) -> None:
        self.images = images.with_crop(EvaluationCrop(preset, draft=draft))
        self._side = preset.crop_size[0]

    def __call__(self, indices: list[int]) -> Read:
        """Reads images of the list."""
        # As rows of pixels: what a decoder writes is copied once, into its place in the batch.
        pixels = torch.empty((len(indices), self._side, self._side, 3), dtype=torch.uint8)
        labels: list[int] = []
        reasons: list[str | None] = []
        count = 0
        for index in indices:
            sample = self._sample(index)
            labels.append(sample.label)
            reasons.append(sample.reason)
            if sample.image is not None:
                pixels[count] = sample.image.permute(1, 2, 0)
                count += 1
        return Read(indices, labels, reasons, pixels[:count].permute(0, 3, 1, 2))

    def _sample(self, index: int) -> Sample:
        """One image; whatever a decoder stumbles over is the image's reason."""
        try:
            with warnings.catch_warnings():  # as of odd EXIF data: a million rows need no notes
                warnings.simplefilter("ignore")
                return self.images[index]
        except (MemoryError, OSError, ValueError):  # a lack of the machine, or a wrong label
            raise
        except Exception as error:  # Pillow's plugins raise any kind on broken files
            reason = f"cannot be decoded: {type(error).__name__}: {error}"
            return Sample(index, None, self.images.label(index), reason)


class Answering:
    """Decodes and answers batches of a list's images.

    Args:
        network: of `inference_form`.
        images: a list without crop.
        preset: how the network's images are prepared.
        top: how many classes an answer has; 0 takes the network's output for pooled features.
        draft: as for `EvaluationCrop`.
        truth: the network's class of an image, by its index and its label. With it the answers'
            labels are the network's classes, and they have losses.
        always: whether the network is called without any image, too: each process of a sharded one
            has to.
    """

    def __init__(
        self,
        network: nn.Module,
        images: ImageList,
        preset: ImageClassification,
        *,
        top: int,
        draft: bool = False,
        truth: Callable[[int, int], int] | None = None,
        always: bool = False,
    ) -> None:
        self.network, self.preset, self.top = network, preset, top
        self.truth, self.always = truth, always
        self.decoding = Decoding(images, preset, draft)

    def __call__(self, indices: list[int]) -> Answers:
        """The answers to images of the list."""
        read = self.known(self.decoding(indices))
        return self.collect(read, self.start(read.pixels, read.classes()))

    def known(self, read: Read) -> Read:
        """The same images with the network's classes as their labels, where there is a truth.

        Raises:
            ValueError: as the truth.
        """
        if self.truth is None:
            return read
        rows = zip(read.indices, read.labels, read.reasons, strict=True)
        return read._replace(labels=[self.truth(i, n) if r is None else n for i, n, r in rows])

    def start(self, pixels: Tensor, classes: Tensor | None = None) -> Started:
        """What the network says; a GPU may still compute.

        Args:
            pixels: uint8 [M,3,R,R], on the network's device.
            classes: the true ones [M], for losses; there must be a truth.
        """
        if not len(pixels) and not self.always:
            width = self.top or self.features
            return Started(torch.empty((0, self.top), dtype=torch.int64), torch.empty((0, width)))
        with torch.no_grad():  # a network in training makes no use of inference mode's tensors
            y = self.network(self.preset.normalise(pixels)).float()
            if not self.top:
                return Started(torch.empty((len(y), 0), dtype=torch.int64), y)
            values, likeliest = y.softmax(dim=1).topk(min(self.top, y.shape[1]), dim=1)
            losses = None
            if classes is not None and self.truth is not None:
                classes = classes.to(y.device, non_blocking=True)
                losses = F.cross_entropy(y, classes, reduction="none")
        return Started(likeliest, values, losses)

    @staticmethod
    def collect(read: Read, started: Started) -> Answers:
        """The answers; waits for a GPU."""
        classes, values, losses = (None if part is None else part.cpu().numpy() for part in started)
        assert classes is not None and values is not None
        values = values.astype(np.float32, copy=False)
        return Answers(read.indices, read.labels, read.reasons, classes, values, losses)

    @property
    def features(self) -> int:
        """Length of the pooled features."""
        source: Any = getattr(self.network, "source", self.network)
        return int(source.head_hidden_size)


@contextlib.contextmanager
def answers(
    answering: Answering,
    device: torch.device,
    *,
    workers: int,
    descriptors: Sequence[int] = (),
) -> Iterator[Any]:
    """A function from batches of indices to an iterator of their answers, in the same order.

    On a CPU each worker decodes and computes batches of its own on one thread: nothing waits for
    anything else, so that the wall time is decoding's and computing's together. On a GPU workers
    decode ahead, and this process copies and computes.

    Args:
        device: where the network is.
        workers: number of processes, 0 for none beside this one.
        descriptors: as for `Workers`.
    """
    options: dict[str, Any] = {"forks": True, "descriptors": descriptors}
    if device.type == "cpu":
        pool: Workers[list[int], Answers] = Workers(answering, workers, **options)
        with pool:
            yield pool.map
        return
    decoders: Workers[list[int], Read] = Workers(answering.decoding, workers, **options)
    with decoders:
        yield lambda batches: computed(answering, device, decoders.map(batches))


def computed(
    answering: Answering, device: torch.device, reads: Iterable[Read]
) -> Iterator[Answers]:
    """The answers to images that others decode; a GPU computes while the next ones are decoded."""
    ahead = UNDER_WAY if device.type == "cuda" else 0
    under_way: list[tuple[Read, Started]] = []
    for found in reads:
        read = answering.known(found)
        pixels = read.pixels.pin_memory() if device.type == "cuda" else read.pixels
        pixels = pixels.to(device, non_blocking=True)
        under_way.append((read, answering.start(pixels, read.classes())))
        if len(under_way) > ahead:
            yield answering.collect(*under_way.pop(0))
    for entry in under_way:
        yield answering.collect(*entry)


def worker_count(wanted: int | None, images: int, batch: int) -> int:
    """How many processes a number of images needs: one per core, and none for a single batch."""
    batches = -(-images // batch)
    count = min(default_workers() if wanted is None else wanted, batches)
    return 0 if count == 1 and wanted is None else count


def batched(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    """Lists of `size` indices, the last one shorter."""
    source = iter(indices)
    while batch := list(islice(source, size)):
        yield batch
