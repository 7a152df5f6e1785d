"""Prediction over Ray Data: actors on the machines of a cluster decode and compute.

Every machine must find the images under the same paths, on a shared file system or by http.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from effnet_fast.training import extras
from effnet_fast.training.answers.inference import Answering
from effnet_fast.training.answers.rows import Answers

LOCAL = "local"  # an address that starts a cluster on this machine
BLOCK = 8  # batches that travel together


class Actor:
    """Answers batches of indices, as Ray Data calls it; lives in a process of the cluster."""

    def __init__(self, answering: Answering, device: str) -> None:
        torch.set_num_threads(1)
        if device == "cuda":
            answering.network.to(device)
        self._answering, self._device = answering, torch.device(device)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """From the column "data", indices [N], to the columns of answers."""
        read = self._answering.decoding(rows["data"].tolist())
        result = self._answering.start(read.pixels.to(self._device))
        answer = self._answering.collect(read, result)
        readable = np.array([reason is None for reason in read.reasons])
        columns = {
            "index": rows["data"],
            "label": np.array(read.labels),
            "reason": np.array([reason or "" for reason in read.reasons]),
        }
        for name, values in (("classes", answer.classes), ("values", answer.values)):
            if values.shape[1]:
                columns[name] = np.zeros((len(readable), values.shape[1]), values.dtype)
                columns[name][readable] = values
        return columns


def answers(
    answering: Answering, left: list[int], batch: int, address: str, workers: int | None
) -> Iterator[Answers]:
    """The answers to images of a list, in its order.

    Args:
        answering: whose network is on a GPU where the actors shall use one each.
        left: indices of the images.
        batch: images per call of the network.
        address: of the cluster: "local", "auto", "ray://HOST:10001".
        workers: number of actors; None lets Ray start as many as the cluster has room for.

    Raises:
        ImportError: ray is missing.
        ConnectionError: no cluster is at the address.
    """
    ray = extras.require("ray", "ray")
    data = extras.require("ray.data", "ray")
    started = not ray.is_initialized()
    if started:
        where = {"num_cpus": workers} if address == LOCAL else {"address": address}
        ray.init(**where, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        device = next(answering.network.parameters()).device.type
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        resources = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
        actors = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # At least two blocks for each actor, where there are so many images.
        size = batch * max(1, min(BLOCK, len(left) // (2 * actors * batch)))
        blocks = [np.array(left[i : i + size]) for i in range(0, len(left), size)]
        found = data.from_numpy(blocks).map_batches(
            Actor,
            batch_size=batch,
            fn_constructor_args=(_portable(answering), device),
            concurrency=workers or (1, actors),
            **resources,
        )
        for columns in found.iter_batches(batch_size=None, batch_format="numpy"):
            yield _answers(columns)
    finally:
        if started:
            ray.shutdown()


def _portable(answering: Answering) -> Answering:
    """The same on the CPU, which any machine can read."""
    other = copy.copy(answering)
    other.network = copy.deepcopy(answering.network).cpu()
    return other


def _answers(columns: dict[str, Any]) -> Answers:
    reasons = [str(reason) or None for reason in columns["reason"]]
    readable = np.array([reason is None for reason in reasons])
    values = np.asarray(columns["values"], np.float32)[readable]
    classes = np.zeros((len(values), 0), np.int64)
    if "classes" in columns:
        classes = np.asarray(columns["classes"], np.int64)[readable]
    indices, labels = (columns[name].tolist() for name in ("index", "label"))
    return Answers(indices, labels, reasons, classes, values)
