"""Accuracy and speed of training beside stock PyTorch: `python -m benchmarks.training_accuracy`.

Each task trains one network on one data set, three seeds for each contestant: "ours" through
`effnet_fast.training`, and "stock", a plain loop with the same recipe, images and augmentation
around a network that PyTorch's own operators run: torchvision's where it has that network (B0),
else this package's with backend "reference" (Lite0, which torchvision lacks). A row per run goes to
a CSV file; runs that are in it are not repeated, so that a broken or timed-out sequence continues.

    python examples/digits.py digits
    python examples/fashion_mnist.py SOURCE fashion
    python -m benchmarks.training_accuracy --data digits=digits fashion=fashion --out rows.csv
    python -m benchmarks.training_accuracy --out rows.csv --summary
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import effnet_fast
from effnet_fast.training.runs import freezing, loop, network, state
from effnet_fast.training.runs.feeding import RANK_SEEDS, Feed, Images
from effnet_fast.training.runs.optimization import MovingAverage, make_optimizer, make_schedule
from effnet_fast.training.runs.processes import Processes
from effnet_fast.training.runs.recipe import Recipe, read_recipe
from effnet_fast.training.runs.settings import Settings

COLUMNS = (
    *("task", "contestant", "seed", "epochs", "top1", "top5", "loss"),
    *("images_per_second", "seconds", "threads", "machine", "torch", "effnet_fast", "date"),
)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """One network on one data set.

    Args:
        data: the data set's name, a key of --data.
        model, weights, recipe: as for `loop.train`.
        changes: of the recipe.
        torchvision: whether stock is torchvision's network of that name.
    """

    data: str
    model: str
    weights: str | None
    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    resolution: int = 64
    torchvision: bool = False


TASKS = {
    # Mirrored digits are other digits.
    "digits": Task("digits", "lite0", "DEFAULT", "finetune", {"epochs": 3, "flip": 0.0}),
    "fashion": Task("fashion", "lite0", "DEFAULT", "finetune", {"epochs": 2}),
    # As many epochs as ours takes about 15 minutes for on two cores.
    "scratch": Task("fashion", "b0", None, "quick", {"epochs": 4}, torchvision=True),
}


def train_ours(task: Task, data: str, seed: int, changes: Mapping[str, Any]) -> dict[str, float]:
    """`loop.train`, its folder thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return loop.train(
            data,
            Path(folder, "run"),
            model=task.model,
            weights=task.weights,
            recipe=task.recipe,
            resolution=task.resolution,
            seed=seed,
            **changes,
        )


def train_stock(task: Task, data: str, seed: int, changes: Mapping[str, Any]) -> dict[str, float]:
    """A plain loop with the same recipe, images and augmentation."""
    recipe = read_recipe(task.recipe, dict(changes))
    settings = Settings(model=task.model, weights=task.weights, seed=seed, backend="reference")
    processes = Processes("cpu", "fp32", "ddp")
    images = Images(data)
    state.seed_everything(seed)
    own = network.build(
        task.model,
        task.weights,
        recipe,
        images.classes,
        resolution=task.resolution,
        backend="reference",
    )
    freezing.apply(own, recipe)
    state.seed_everything(seed + RANK_SEEDS)
    feed = Feed(images, recipe, settings, network.preset_of(own), processes)
    try:
        return _run_plainly(task, own, recipe, feed)
    finally:
        feed.close()
        processes.close()


def torchvision_network(own: Any, task: Task, recipe: Recipe) -> nn.Module:
    """torchvision's network with the weights and BatchNorm constants of ours."""
    from torchvision.models import efficientnet

    options = {"num_classes": own.num_classes}
    if recipe.dropout is not None:
        options["dropout"] = recipe.dropout
    if recipe.drop_path is not None:
        options["stochastic_depth_prob"] = recipe.drop_path
    stock = getattr(efficientnet, f"efficientnet_{task.model}")(**options)
    stock.load_state_dict(own.state_dict())
    norms = ([m for m in n.modules() if isinstance(m, nn.BatchNorm2d)] for n in (stock, own))
    for theirs, ours in zip(*norms, strict=True):
        theirs.momentum, theirs.eps = ours.momentum, ours.eps
    return stock


def _run_plainly(task: Task, own: Any, recipe: Recipe, feed: Feed) -> dict[str, Any]:
    model = torchvision_network(own, task, recipe) if task.torchvision else own
    model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(Grouped(model, own), recipe, recipe.batch)
    schedule = make_schedule(optimizer, recipe, len(feed.sampler))
    average = MovingAverage(model, recipe.ema) if recipe.ema else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    seconds = 0.0
    for epoch in range(recipe.epochs):
        model.train()
        begun = time.perf_counter()
        for batch in feed.train(epoch):
            x, targets = feed.augmentation(batch.images, batch.labels)
            loss = F.cross_entropy(model(x), targets, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            schedule.step()
            if average is not None:
                average.update(model)
        seconds += time.perf_counter() - begun
    kept = (model if average is None else average.model).eval()
    found = feed.evaluate(kept, lambda _: False)
    assert found is not None
    images = recipe.epochs * feed.sampler.length
    return {**found, "images_per_second": images / seconds, "seconds": seconds}


class Grouped:
    """The parameters of `model` in the groups that `own` has, by name."""

    def __init__(self, model: nn.Module, own: Any) -> None:
        self.model, self.own = model, own

    def param_groups(self, *args: Any, **options: Any) -> list[dict[str, Any]]:
        """As `Backbone.param_groups`."""
        names = {id(p): name for name, p in self.own.named_parameters()}
        theirs = dict(self.model.named_parameters())
        groups = self.own.param_groups(*args, **options)
        return [
            {**group, "params": [theirs[names[id(p)]] for p in group["params"]]} for group in groups
        ]


Runner = Callable[[Task, str, int, Mapping[str, Any]], Mapping[str, float]]
CONTESTANTS: dict[str, Runner] = {"ours": train_ours, "stock": train_stock}


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_all(
    path: Path,
    data: Mapping[str, str],
    tasks: Sequence[str] = tuple(TASKS),
    contestants: Sequence[str] = tuple(CONTESTANTS),
    seeds: Sequence[int] = SEEDS,
    minutes: float | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Runs what is not in the file; begins no run once `minutes` have passed.

    Contestants alternate within a seed, so that a busy spell of the machine hits both.
    """
    begun = time.monotonic()
    for name in tasks:
        task = TASKS[name]
        if task.data not in data:
            continue
        for seed in seeds:
            for contestant in contestants:
                done = {(r["task"], r["contestant"], int(r["seed"])) for r in rows_of(path)}
                if (name, contestant, seed) in done:
                    continue
                if minutes is not None and time.monotonic() - begun > 60 * minutes:
                    print(f"{minutes:g} minutes have passed: the same command continues")
                    return
                used = {**task.changes, **(changes or {})}
                found = CONTESTANTS[contestant](task, data[task.data], seed, used)
                row = {"task": name, "contestant": contestant, "seed": seed, **_facts(), **found}
                row["epochs"] = read_recipe(task.recipe, used).epochs
                append(path, row)
                print(f"{name} {contestant} seed {seed}: top-1 {found['top1']:.4f}", flush=True)


def _facts() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "effnet_fast": effnet_fast.__version__,
        "date": datetime.date.today().isoformat(),
    }


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row, behind the first line of a new file."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def summary(path: Path) -> str:
    """By task and contestant the range of top-1 and the medians of speed and time, as a table."""
    lines = [
        "| task | contestant | runs | top-1 | images/s | seconds |",
        "|---|---|---|---|---|---|",
    ]
    rows = rows_of(path)
    for key in dict.fromkeys((row["task"], row["contestant"]) for row in rows):
        own = [row for row in rows if (row["task"], row["contestant"]) == key]
        top1 = sorted(100 * float(row["top1"]) for row in own)
        speed, seconds = (
            statistics.median(float(row[name]) for row in own)
            for name in ("images_per_second", "seconds")
        )
        shown = f"{top1[0]:.2f}% to {top1[-1]:.2f}%"
        lines.append(f"| {' | '.join(key)} | {len(own)} | {shown} | {speed:.0f} | {seconds:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--tasks", nargs="*", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument(
        "--contestants", nargs="*", choices=tuple(CONTESTANTS), default=tuple(CONTESTANTS)
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, help="instead of the task's own")
    parser.add_argument("--minutes", type=float, help="after which no run begins")
    parser.add_argument("--summary", action="store_true", help="print the file as a table alone")
    arguments = parser.parse_args(argv)
    if not arguments.summary:
        data = dict(item.split("=", 1) for item in arguments.data)
        changes = {} if arguments.epochs is None else {"epochs": arguments.epochs}
        run_all(
            arguments.out,
            data,
            arguments.tasks,
            arguments.contestants,
            arguments.seeds,
            arguments.minutes,
            changes,
        )
    print(summary(arguments.out))


if __name__ == "__main__":
    main()
