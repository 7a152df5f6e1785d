"""A scorer for grid searches: trains each network for a short schedule.

What trains is given from above, since training knows of scaling and not the other way round.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from effnet_fast.models.efficientnet import EfficientNet


class Train(Protocol):
    """Trains a network on a data set, its random weights included.

    Args:
        network: randomly initialised; its `variant` has the side of its images.
        data: the data set.
        out: folder of the run, which holds what `resume` continues from.
        resume: whether to continue what is in `out`.
        options: of the schedule.

    Returns:
        metrics by name, on images that it did not train on.
    """

    def __call__(
        self, network: EfficientNet, data: str, out: Path, *, resume: bool, **options: Any
    ) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class ShortTraining:
    """Scores a network by a short training; for `grid_search`.

    A trial that was interrupted continues from the state that its run has saved. Where `train` is
    a function of a module, trials may run in other processes.

    Args:
        train: what trains.
        data: the data set, as `train` takes it.
        runs: folder in which every trial has one of its own.
        options: of the schedule, as `train` takes them: epochs, seed, batch, ...
        metric: which of its metrics is the score, larger is better.
        keep: whether folders of runs stay when a trial has ended.
    """

    train: Train
    data: str
    runs: str
    options: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "top1"
    keep: bool = False

    @property
    def name(self) -> str:
        """The name of its trials in a file: trials of another schedule are refused there."""
        settings = (f"{name}={value}" for name, value in sorted(self.options.items()))
        return " ".join(("train", self.data, *settings))

    def __call__(self, network: EfficientNet) -> float:
        """The score of a network.

        Raises:
            ValueError: `train` returned no such metric.
        """
        out = self.folder(network)
        os.makedirs(self.runs, exist_ok=True)
        metrics = self.train(network, self.data, out, resume=out.exists(), **self.options)
        if self.metric not in metrics:
            raise ValueError(
                f"the training returned no {self.metric!r}, but {', '.join(metrics) or 'nothing'}"
            )
        if not self.keep:
            shutil.rmtree(out, ignore_errors=True)
        return float(metrics[self.metric])

    def folder(self, network: EfficientNet) -> Path:
        """The folder of a network's run: the same for the same network and schedule."""
        v = network.variant
        settings = [v.depth, v.width, v.resolution, self.data, sorted(self.options.items())]
        digest = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:8]
        return Path(self.runs, f"d{v.depth:.3f}-w{v.width:.3f}-r{v.resolution}-{digest}")
