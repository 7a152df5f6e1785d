"""What predictions on labelled images amount to, counted batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

TOP = 5  # of top-5 accuracy
BINS = 15  # of confidences, as Guo et al. (arXiv 1706.04599) have them
MATRIX_LIMIT = 4096  # classes of which a confusion matrix is kept: 128 MiB of counts
# Confidences and losses are added up as integers in this unit, so that their sums do not depend on
# the order of the images or on how many processes count them. A float32 of 2^-8 and more is exact.
UNIT = 2.0**-32
LARGE_LOSS = 1024.0  # from which on losses are added up as they are; 2 million fit below it
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class ClassResult:
    """The counts of one class.

    Args:
        name: of the class.
        images: images that belong to it.
        predicted: images that the network puts into it.
        correct: those of them that belong to it.
    """

    name: str
    images: int
    predicted: int
    correct: int

    @property
    def recall(self) -> float | None:
        """Share of the class's images that are found; None without images."""
        return self.correct / self.images if self.images else None

    @property
    def precision(self) -> float | None:
        """Share of the class's predictions that are right; None without predictions."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of recall and precision; None where the class does not occur."""
        total = self.images + self.predicted
        return 2 * self.correct / total if total else None

    def as_dict(self) -> dict[str, Any]:
        """Its counts and shares, by name."""
        shares = {"recall": self.recall, "precision": self.precision, "f1": self.f1}
        return {**vars(self), **shares}


class Tally:
    """Counts top-1, top-5, loss, each class, which classes are taken for which, and calibration.

    Memory depends on the number of classes, never on the number of images. The same images give the
    same numbers in any order, and in any number of processes.

    Args:
        classes: number of classes.
        matrix: whether classes that are taken for others are counted.

    Attributes:
        confusion: int64 [classes,classes], rows true and columns predicted classes; None without
            `matrix`, and beyond `MATRIX_LIMIT` classes.
    """

    def __init__(self, classes: int, *, matrix: bool = True) -> None:
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes!r}")
        self.classes = classes
        self._totals: Counts = np.zeros(4, dtype=np.int64)  # images, top-1, top-5, loss in UNITs
        self._large_loss = np.zeros(1, dtype=np.float64)
        self._of_class, self._predicted, self._correct = (
            np.zeros(classes, dtype=np.int64) for _ in range(3)
        )
        self.confusion: Counts | None = None
        if matrix and classes <= MATRIX_LIMIT:
            self.confusion = np.zeros((classes, classes), dtype=np.int64)
        self._bin_images, self._bin_correct, self._bin_confidence = (
            np.zeros(BINS, dtype=np.int64) for _ in range(3)
        )

    def add(
        self,
        labels: ArrayLike,
        top: ArrayLike,
        confidences: ArrayLike,
        losses: ArrayLike | None = None,
    ) -> None:
        """Counts a batch.

        Args:
            labels: true classes [N].
            top: the likeliest classes [N,K], the likeliest first.
            confidences: probability of the likeliest class [N], 0 to 1.
            losses: cross entropy [N]; of all batches or of none.

        Raises:
            ValueError: a label that is no class; other shapes.
        """
        labels, top = np.asarray(labels, dtype=np.int64), np.asarray(top, dtype=np.int64)
        confidences = np.asarray(confidences, dtype=np.float64)
        if not len(labels):
            return
        if labels.ndim != 1 or top.ndim != 2 or len(top) != len(labels):
            raise ValueError(f"labels {labels.shape} and top {top.shape} must be [N] and [N,K]")
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(
                f"labels must lie in 0 to {self.classes - 1}, got {labels.min()} to {labels.max()}"
            )
        best = top[:, 0]
        right = best == labels
        in_top = (top[:, :TOP] == labels[:, None]).any(axis=1)
        self._totals[:3] += (len(labels), right.sum(), in_top.sum())
        if losses is not None:
            self._add_losses(np.asarray(losses, dtype=np.float64))
        np.add.at(self._of_class, labels, 1)
        np.add.at(self._predicted, best, 1)
        np.add.at(self._correct, labels[right], 1)
        if self.confusion is not None:
            np.add.at(self.confusion, (labels, best), 1)
        # Bin b holds confidences in (b/BINS, (b+1)/BINS]; a NaN counts as no confidence.
        known = np.nan_to_num(confidences)
        bins = np.clip(np.ceil(known * BINS).astype(np.int64) - 1, 0, BINS - 1)
        np.add.at(self._bin_images, bins, 1)
        np.add.at(self._bin_correct, bins, right)
        np.add.at(self._bin_confidence, bins, np.rint(known / UNIT).astype(np.int64))

    def _add_losses(self, losses: NDArray[np.float64]) -> None:
        small = np.abs(losses) < LARGE_LOSS  # not NaN
        self._totals[3] += np.rint(losses[small] / UNIT).astype(np.int64).sum()
        self._large_loss += losses[~small].sum()

    def share(self, add_up: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Makes the counts those of all processes.

        Args:
            add_up: the sum over all processes of an array that each has.
        """
        counts = [self._totals, self._large_loss, self._of_class, self._predicted, self._correct]
        counts += [self._bin_images, self._bin_correct, self._bin_confidence]
        for array in (*counts, *([] if self.confusion is None else [self.confusion])):
            array[...] = add_up(array)

    @property
    def images(self) -> int:
        """Labelled images that were counted."""
        return int(self._totals[0])

    @property
    def loss(self) -> float | None:
        """Mean cross entropy; None without images. Batches without losses count as 0."""
        total = float(self._totals[3]) * UNIT + float(self._large_loss[0])
        return total / self.images if self.images else None

    @property
    def top1(self) -> float | None:
        """Share of images whose likeliest class is right; None without images."""
        return int(self._totals[1]) / self.images if self.images else None

    @property
    def top5(self) -> float | None:
        """Share of images whose class is among the five likeliest; None without images."""
        return int(self._totals[2]) / self.images if self.images else None

    @property
    def ece(self) -> float | None:
        """Expected calibration error: |accuracy - confidence| of each bin, weighted by its images.

        Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 2.
        """
        if not self.images:
            return None
        gaps = np.abs(self._bin_correct - self._bin_confidence * UNIT)
        return float(gaps.sum() / self.images)

    def calibration(self) -> list[dict[str, Any]]:
        """Of each bin its bounds, images, mean confidence and accuracy; None without images."""
        rows = []
        for b in range(BINS):
            images = int(self._bin_images[b])
            rows.append(
                {
                    "above": b / BINS,
                    "up_to": (b + 1) / BINS,
                    "images": images,
                    "confidence": float(self._bin_confidence[b] * UNIT) / images
                    if images
                    else None,
                    "accuracy": int(self._bin_correct[b]) / images if images else None,
                }
            )
        return rows

    def per_class(self, names: list[str] | None = None) -> list[ClassResult]:
        """The counts of every class, in the order of the logits.

        Args:
            names: of the classes; None numbers them.
        """
        names = names or [str(i) for i in range(self.classes)]
        counts = zip(names, self._of_class, self._predicted, self._correct, strict=True)
        return [ClassResult(name, *map(int, numbers)) for name, *numbers in counts]

    def balanced(self) -> float | None:
        """Mean recall of the classes that have images; None without images."""
        found = self._of_class > 0
        if not found.any():
            return None
        return math.fsum(self._correct[found] / self._of_class[found]) / int(found.sum())
