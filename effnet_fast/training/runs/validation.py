"""Loss and accuracy on the validation images after each epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.training.runs.processes import Processes

TOP = 5


def evaluate(
    run_network: Callable[[Tensor], Tensor],
    batches: Any,
    normalise: Callable[[Tensor], Tensor],
    processes: Processes,
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Evaluates a network on the images of all processes.

    Args:
        run_network: images [N,3,R,R] -> logits [N,classes]; in eval mode.
        normalise: pixels uint8 [N,3,R,R] -> float32, as the preset of the images does.
        batches: of `loading.Loader.batches`; as many in each process.
        should_stop: asked after each batch, with the same answer in all processes.

    Returns:
        the mean "loss" (cross entropy), and "top1" and "top5" as fractions; nothing where no image
        can be read; None if stopped.
    """
    device = processes.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top1, top5, images
    with torch.no_grad():
        for batch in batches:
            if len(batch.images):
                labels = batch.labels.to(device, non_blocking=True)
                logits = run_network(normalise(batch.images.to(device, non_blocking=True))).float()
                best = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
                sums[0] += F.cross_entropy(logits, labels, reduction="sum")
                sums[1] += best[:, 0].sum()
                sums[2] += best.sum()
                sums[3] += len(labels)
            if should_stop():
                return None
    loss, top1, top5, count = processes.sum(sums).tolist()
    if not count:
        return {}
    return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}
