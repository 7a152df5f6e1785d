"""The steps and epochs of a run, and its state between them."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from effnet_fast import checkpoints
from effnet_fast.models import EfficientNet
from effnet_fast.training.data.loading import Batch
from effnet_fast.training.runs import logs, network, run_folder, sharding, state
from effnet_fast.training.runs.feeding import Feed
from effnet_fast.training.runs.optimization import MovingAverage, make_optimizer, make_schedule
from effnet_fast.training.runs.outcomes import OF_DEVICE, SUMMED, Outcome, OutcomeReader
from effnet_fast.training.runs.processes import Processes, StoppedError, StopRequest
from effnet_fast.training.runs.recipe import Recipe
from effnet_fast.training.runs.run_folder import RunFolder
from effnet_fast.training.runs.steps import Steps
from effnet_fast.training.runs.unreadable import Unreadable

LOG_STEPS = 10  # steps between two points of TensorBoard's curves
OnStep = Callable[[int, float], None]  # number of steps so far, mean loss of the last


class LossError(ValueError):
    """The loss of a step is NaN or infinite; the batch is saved in the run's folder."""


class Trainer:
    """Trains a network on a feed of images and keeps the run's folder.

    Args:
        model: in training mode on the device, its first layers frozen where the recipe says so.
        weights: of the classes, float32 [classes], or None.
        unreadable_limit: how many training images, and how many validation images, may be left out.
        save_seconds: time between two states within an epoch.
        silent: whether no progress is shown.
        on_step: called after each step.
    """

    def __init__(
        self,
        model: EfficientNet,
        recipe: Recipe,
        feed: Feed,
        folder: RunFolder,
        processes: Processes,
        *,
        weights: Tensor | None = None,
        unreadable_limit: int | None = None,
        save_seconds: float = 600.0,
        silent: bool = True,
        on_step: OnStep | None = None,
    ) -> None:
        self.recipe, self.feed, self.folder, self.processes = recipe, feed, folder, processes
        self.raw, self.device, self.on_step = model, processes.device, on_step
        # Of a sharded network there is no whole one left to save.
        self.whole = copy.deepcopy(model) if processes.is_sharded and processes.is_main else None
        self.average = MovingAverage(model, recipe.ema) if recipe.ema else None
        self.model = processes.prepare(model, sync_bn=recipe.sync_bn)
        if self.average is not None and processes.is_sharded:
            processes.prepare(self.average.model)
        images = recipe.batch * recipe.accumulate * processes.world
        optimizer = make_optimizer(model, recipe, images, is_sharded=processes.is_sharded)
        self.steps_per_epoch = math.ceil(len(feed.sampler) / recipe.accumulate)
        self.schedule = make_schedule(optimizer, recipe, self.steps_per_epoch)
        self.plain_optimizer = optimizer
        self.steps = Steps(
            model, self.model, optimizer, feed.augmentation, recipe, processes, weights
        )
        self.reader = OutcomeReader(self.device)
        self.stop = StopRequest()
        self.save_seconds, self.saved_at = save_seconds, time.monotonic()
        self.progress = logs.Progress(
            silent=silent or not processes.is_main,
            epochs=recipe.epochs,
            images=feed.sampler.length,
            device=self.device,
        )
        self.board: logs.TensorBoard | None = None
        # The position of the run: what `_state` saves.
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.unreadable = Unreadable(unreadable_limit, processes)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.loss_sum = self.images = self.seconds = self.skipped = 0.0

    def run(self) -> dict[str, Any]:
        """Trains to the end of the last epoch; what `loop.train` returns of the metrics.

        Raises:
            StoppedError: by a signal; the state is saved.
            LossError: a loss is no number.
            OSError: the folder cannot be written to.
        """
        if self.processes.is_main:
            self.board = logs.TensorBoard(self.folder / run_folder.TENSORBOARD, self.step)
        try:
            with self.stop.listening():
                while self.epoch < self.recipe.epochs:
                    self._train_epoch()
                    self._end_epoch()
            return self._finish()
        finally:
            self.progress.end()
            if self.board is not None:
                self.board.close()

    # ---- steps

    def _train_epoch(self) -> None:
        """The rest of the epoch's steps."""
        self.model.train()
        self.progress.begin(self.epoch, int(self.images))
        before, begun = self.seconds, time.perf_counter()
        for group in self._groups():
            outcomes = self._step(group)
            self.seconds = before + time.perf_counter() - begun
            if any(o.stop or o.save for o in outcomes):
                stopped = any(o.stop for o in outcomes + self._note(self.reader.flush()))
                self.save()
                if stopped:
                    raise self._stopped()
        self._note(self.reader.flush())
        self.seconds = before + time.perf_counter() - begun
        self.progress.end()

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of each step of the optimizer."""
        batches = self.feed.train(self.epoch)
        while group := list(itertools.islice(batches, self.recipe.accumulate)):
            yield group

    def _step(self, group: list[Batch]) -> list[Outcome]:
        """One step of the optimizer; the outcomes that are there."""
        values = torch.zeros(OF_DEVICE, dtype=torch.float64, device=self.device)
        values[0] = values[5] = self.steps.backward(group)
        values[1] = sum(len(batch.images) for batch in group)
        values[2] = float(self.stop.number > 0)
        due = time.monotonic() - self.saved_at > self.save_seconds
        values[3] = float(due and self.processes.is_main)
        values[4] = sum(self.unreadable.note("train", batch) for batch in group)
        self.skipped += sum(len(batch.problems) for batch in group)
        self.processes.sum(values[:SUMMED])
        rate = self.plain_optimizer.param_groups[-1]["lr"]
        outcomes = self._note(self.reader.put(values, self.step, rate, group))
        is_moved = self.steps.update(group, values[1])
        self.schedule.step()
        self.step += 1
        if is_moved and self.average is not None:
            self.average.update(self.raw)
        return outcomes

    def _note(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Adds losses up and shows them.

        Raises:
            LossError: one is no number.
            UnreadableLimitError: more images cannot be read than allowed.
        """
        for outcome in outcomes:
            self.unreadable.add("train", int(outcome.unreadable))
            if not math.isfinite(outcome.loss):
                self._fail(outcome)
            self.loss_sum += outcome.loss
            self.images += outcome.images
            mean = outcome.loss / max(1.0, outcome.images)
            self.progress.update(int(outcome.images), mean, outcome.rate)
            if self.board is not None and outcome.step % LOG_STEPS == 0:
                self.board.write({"step/loss": mean, "step/rate": outcome.rate}, outcome.step)
            if self.on_step is not None:
                self.on_step(outcome.step + 1, mean)
        return outcomes

    def _fail(self, outcome: Outcome) -> None:
        where = f"epoch {self.epoch + 1}, step {outcome.step + 1}"
        rank = self.processes.rank
        path = self.folder / run_folder.FAILED_BATCH
        if not math.isfinite(outcome.local):
            path = path if rank == 0 else path.with_stem(f"{path.stem}_{rank}")
            paths = self.feed.training.images.paths
            parts = [
                {
                    "images": batch.images,
                    "labels": batch.labels,
                    "indices": batch.indices,
                    "paths": [paths[i] for i in batch.indices.tolist()],
                }
                for batch in outcome.batches
            ]
            state.save({"epoch": self.epoch, "step": outcome.step, "batches": parts}, path)
        raise LossError(
            f"the loss is {outcome.loss} at {where}; its batch is in {path}. {run_folder.STATE} is "
            "of before. A smaller rate, a clip of the gradients or fp32 may help"
        )

    def _stopped(self) -> StoppedError:
        number = self.stop.number or 15
        return StoppedError(
            f"stopped in epoch {self.epoch + 1} after {self.step} steps; the same command with "
            "--resume continues",
            number,
        )

    # ---- ends of epochs

    def _end_epoch(self) -> None:
        """Evaluates, writes the epoch's row, and saves."""
        begun = time.perf_counter()
        if not self.images:
            self.unreadable.exchange()
            path, reason = next(iter(self.unreadable.reasons().items()))
            raise ValueError(f"no training image can be read ({path}: {reason}, ...)")
        found = self._evaluate()
        if found is None:
            self.save()
            raise self._stopped()
        self.unreadable.exchange()
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "rate": self._last_rate(),
            "train_loss": self.loss_sum / self.images,
            **{name: found.get(name) for name in ("loss", "top1", "top5")},
            "images_per_second": self.images / max(1e-9, self.seconds),
            "seconds": self.seconds + time.perf_counter() - begun,
            "memory_mb": logs.memory_mb(self.device),
            "unreadable": sum(self.processes.gather(int(self.skipped))),
        }
        self.history.append(row)
        self.epoch += 1
        self._begin_epoch()
        self.feed.sampler.set_epoch(self.epoch)
        self.save()
        if self.processes.is_main:
            logs.write_metrics(self.history, self.folder / run_folder.METRICS)
            if reasons := self.unreadable.reasons():
                logs.write_unreadable(reasons, self.folder / run_folder.UNREADABLE)
        if self.board is not None:
            numbers = {f"epoch/{name}": row[name] for name in logs.COLUMNS if name != "epoch"}
            self.board.write(numbers, self.step)
            self.board.flush()

    def _last_rate(self) -> float:
        """The classifier's learning rate in the last step."""
        group = self.plain_optimizer.param_groups[-1]
        factor = self.schedule.lr_lambdas[-1](max(0, self.step - 1))
        return float(group["initial_lr"] * factor)

    def _evaluate(self) -> dict[str, float | None] | None:
        """Loss and accuracy of the weights that would be saved; None if a signal came."""
        average = None if self.average is None else self.average.model
        self.processes.share(self.raw.buffers())
        if average is not None:
            self.processes.share(average.buffers())
        model = (self.raw if average is None else average).eval()
        return self.feed.evaluate(model, self._is_stopping)

    def _is_stopping(self, batch: Batch) -> bool:
        """Whether any process has had a signal; counts the images that cannot be read."""
        stop, new = self.stop.number, self.unreadable.note("val", batch)
        if self.processes.world > 1:
            values = torch.tensor([stop, new], device=self.device)
            stop, new = self.processes.sum(values).tolist()
        self.unreadable.add("val", new)
        return stop > 0

    def _finish(self) -> dict[str, Any]:
        """Writes the final weights; returns the metrics."""
        average = None if self.average is None else self.average.model
        model = self.raw if average is None else average
        content = sharding.model_state(model, self.processes.is_sharded)
        if self.processes.is_main:
            if self.whole is not None:  # its state dict has what the files' metadata need
                self.whole.load_state_dict(content)
                content = self.whole.state_dict()
            checkpoints.save(content, self.folder / run_folder.WEIGHTS)
            logs.write_metrics(self.history, self.folder / run_folder.METRICS)
        last = self.history[-1]
        training = sum(row["seconds"] for row in self.history)
        seconds = [self.feed.sampler.length / row["images_per_second"] for row in self.history]
        return {
            "epochs": self.epoch,
            "steps": self.step,
            **{name: last[name] for name in ("top1", "top5", "loss", "train_loss")},
            "images_per_second": self.feed.sampler.length * len(seconds) / sum(seconds),
            "seconds": training,
            "unreadable": len(self.unreadable.reasons()),
        }

    # ---- the state

    def save(self) -> None:
        """Writes the state; all processes take part."""
        content = self._state()
        self.processes.from_main(lambda: state.save(content, self.folder / run_folder.STATE))
        self.saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        sharded = self.processes.is_sharded
        average = self.average
        own = {
            "random": state.random_state(),
            "augmentation": self.feed.augmentation.get_extra_state(),
            "skipped": self.skipped,
            "unreadable": self.unreadable.found,
        }
        return {
            "network": network.described(self.raw),
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "sums": [self.loss_sum, self.images, self.seconds],
            "model": sharding.model_state(self.raw, sharded),
            "average": None
            if average is None
            else {"model": sharding.model_state(average.model, sharded), **average.counters()},
            "optimizer": sharding.optimizer_state(self.raw, self.plain_optimizer, sharded),
            "schedule": self.schedule.state_dict(),
            "scaler": self.processes.scaler and self.processes.scaler.state_dict(),
            "sampler": self.feed.sampler.state_dict(),
            "processes": self.processes.gather(own),
        }

    def load(self, content: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            ValueError: it is of other data or of another number of processes.
        """
        sharded = self.processes.is_sharded
        self.feed.sampler.load_state_dict(content["sampler"])
        self.epoch, self.step = content["epoch"], content["step"]
        self.history = content["history"]
        self.loss_sum, self.images, self.seconds = content["sums"]
        sharding.load_model(self.raw, content["model"], sharded)
        if self.average is not None:
            average = content["average"]
            sharding.load_model(self.average.model, average["model"], sharded)
            self.average.set_counters(average)
        sharding.load_optimizer(self.raw, self.plain_optimizer, content["optimizer"], sharded)
        self.schedule.load_state_dict(content["schedule"])
        if self.processes.scaler is not None and content["scaler"] is not None:
            self.processes.scaler.load_state_dict(content["scaler"])
        own = content["processes"][self.processes.rank]
        self.skipped = own["skipped"]
        self.unreadable.take([part["unreadable"] for part in content["processes"]])
        self.feed.augmentation.set_extra_state(own["augmentation"])
        state.set_random_state(own["random"])
