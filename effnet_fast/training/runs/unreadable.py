"""The images of a run that cannot be read: of all processes, each once, against a limit."""

from __future__ import annotations

from effnet_fast.training.data.loading import Batch, check_limit
from effnet_fast.training.runs.processes import Processes

PARTS = ("train", "val")  # of the images, for each of which the limit holds
Found = dict[str, dict[int, tuple[str, str]]]


class Unreadable:
    """Notes what this process cannot read and counts what all of them cannot.

    No image comes twice in an epoch, so that the numbers of images that are new to their processes
    add up, once all processes know what an epoch has found (`exchange`).

    Args:
        limit: how many training images, and how many validation images, may be left out.

    Attributes:
        found: path and reason of the known ones, by part and place in the list.
        counts: of the images of all processes, by part.
    """

    def __init__(self, limit: int | None, processes: Processes) -> None:
        self.limit, self._processes = limit, processes
        self.found: Found = {part: {} for part in PARTS}
        self.counts = dict.fromkeys(PARTS, 0)

    def note(self, part: str, batch: Batch) -> int:
        """Notes a batch's images; how many of them were not known."""
        known = self.found[part]
        before = len(known)
        for problem in batch.problems:
            known.setdefault(problem.index, (problem.path, problem.reason))
        return len(known) - before

    def add(self, part: str, count: int) -> None:
        """Counts so many new images of all processes, which call it with the same number.

        Raises:
            UnreadableLimitError: more than the limit, in all processes with the same message.
        """
        self.counts[part] += count
        if self.limit is not None and self.counts[part] > self.limit:
            self.exchange()
            named = (entry for _, entry in sorted(self.found[part].items()))
            check_limit(self.counts[part], self.limit, named)

    def exchange(self) -> None:
        """Tells all processes what each has found."""
        self.take(self._processes.gather(self.found))

    def take(self, everyone: list[Found]) -> None:
        """Takes over what all processes have found."""
        for found in everyone:
            for part in PARTS:
                self.found[part].update(found[part])
        self.counts = {part: len(self.found[part]) for part in PARTS}

    def reasons(self) -> dict[str, str]:
        """The reason by path, in the order of the images."""
        return dict(entry for part in PARTS for _, entry in sorted(self.found[part].items()))
