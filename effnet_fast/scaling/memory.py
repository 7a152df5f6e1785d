"""The memory that a network takes to run and to train, from its table, without building it.

The count follows the steps of `memory_plans` through the network, block by block; the peak is the
most that is alive at one time. It counts the bytes that PyTorch's allocator hands out. It does not
count the interpreter and the libraries, memory that the C library keeps (glibc's heap: up to a
fifth more, unless MALLOC_MMAP_THRESHOLD_ makes it map large blocks), cuDNN's workspaces, and with
SAME padding the padded copies that stock's strided convolutions keep instead of their inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from effnet_fast.models.variants import Variant
from effnet_fast.ops.scratch import KEPT_BYTES
from effnet_fast.scaling.checks import whole
from effnet_fast.scaling.counts import Group, groups
from effnet_fast.scaling.memory_plans import PLANS, MemoryPlan, Step, Steps, plans

OPTIMIZER_TENSORS = 2  # Adam's moments, or RMSprop's with momentum
PADDED = 16  # channels that oneDNN gives to each group of a depthwise convolution
PADDED_FROM_KERNEL = 5  # smaller depthwise kernels have code of their own there
FP32 = 4  # bytes
NORM_VECTORS = 5  # scale, shift, mean, rstd, variance


@dataclass(frozen=True)
class Memory:
    """Bytes that a network takes for a batch.

    Args:
        parameters: parameters, running statistics and counters of the BatchNorms.
        optimizer: the optimizer's state.
        images: the batch itself, held by the caller.
        saved: activations kept for backward, the images left out; 0 for inference.
        peak: the most that is alive at one time, all of the above and the gradients included.
    """

    parameters: int
    optimizer: int
    images: int
    saved: int
    peak: int


def count_memory(
    variant: Variant,
    mode: str = "inference",
    plan: str = "stock",
    resolution: int | None = None,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    optimizer_tensors: int = OPTIMIZER_TENSORS,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Memory:
    """The memory of one forward pass, or of one training step.

    Plans of "inference": "stock" is PyTorch, "fused" is this package's kernels on the CPU, block by
    block; packed weights come on top of that, and with them activations need less. Plans of
    "training": "stock" is PyTorch, "fused" and "fused_lean" are this version's CPU kernels with
    memory="fast" and "lean"; "fast" and "lean" are the design, whose edges are fused as well: it
    normalises on load and saves x, z1, z2, z3 and vectors (lean: z1 is computed again). The images
    are channels_last, the gradients start as None, and the optimizer's step makes no temporary
    tensors.

    Args:
        variant, resolution, num_classes, in_chans: as for `convolutions`.
        mode, plan: one of `memory_plans.PLANS`.
        batch: number of images.
        dtype: of parameters, statistics and activations alike.
        device: "cpu" adds the scratch memory of PyTorch's CPU kernels.
        optimizer_tensors: tensors that the optimizer keeps for each parameter: 0 for plain SGD,
            1 with momentum, 2 for Adam.

    Raises:
        ValueError: an unknown mode or plan, batch below 1 or optimizer_tensors below 0.
    """
    if (mode, plan) not in PLANS:
        allowed = "; ".join(f"{m}: {', '.join(plans(m))}" for m in ("inference", "training"))
        raise ValueError(f"no plan {plan!r} of mode {mode!r}; there are {allowed}")
    batch = whole("batch", batch)
    optimizer_tensors = whole("optimizer_tensors", optimizer_tensors, 0)
    chosen = PLANS[mode, plan]
    rows = groups(variant, resolution, num_classes=num_classes, in_chans=in_chans)
    sized = [(g, _sizes(g, batch, dtype, device)) for g in rows]
    trained = sum(g.repeats * g.parameters for g in rows) * dtype.itemsize
    parameters = trained + _statistics(rows, dtype)
    images = batch * rows[0].elements["x"] * dtype.itemsize
    standing = parameters + images
    if mode == "inference":
        return Memory(parameters, 0, images, 0, standing + _forward(sized, chosen)[1])
    saved, peak = _forward(sized, chosen)
    peak = max(peak, saved + _backward(sized, chosen, dtype), trained)
    optimizer = optimizer_tensors * trained
    return Memory(parameters, optimizer, images, saved, standing + optimizer + peak)


def check_fits(needed: int, what: str) -> None:
    """Refuses what this machine cannot hold: the system may end the process instead of refusing.

    Args:
        needed: bytes.
        what: needs them, for the message.

    Raises:
        ValueError: it is more than the machine's memory.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no such number on this system
        return
    if needed > memory:
        raise ValueError(
            f"{what} needs {needed / 1e9:,.1f} GB of memory, and this machine has "
            f"{memory / 1e9:,.1f} GB"
        )


def _statistics(rows: Iterable[Group], dtype: torch.dtype) -> int:
    """Bytes of all running means and variances, and of the counters."""
    norms = [(g.repeats, conv) for g in rows for conv in g.convs.values() if conv.norm]
    counter = torch.int64.itemsize
    return sum(n * (2 * conv.out_channels * dtype.itemsize + counter) for n, conv in norms)


def _sizes(group: Group, batch: int, dtype: torch.dtype, device: str) -> dict[str, int]:
    """Bytes of each letter of `memory_plans`."""
    size = dtype.itemsize
    sizes = {letter: batch * count * size for letter, count in group.elements.items()}
    last = group.convs.get("project") or next(iter(group.convs.values()))
    sizes |= {"v": 2 * last.out_channels * size, "c": batch * last.out_channels * size}
    sizes |= {"V": NORM_VECTORS * last.out_channels * FP32, "C": batch * last.out_channels * FP32}
    on_cpu = device == "cpu"
    averaged = batch * group.elements.get("d", group.elements["y"])
    sizes["f"] = averaged * FP32 if on_cpu and size < FP32 else 0
    if group.kind == "fused":
        inner = group.convs["fused"].out_channels
        sizes |= {"w": 2 * inner * size, "N": NORM_VECTORS * inner * FP32}
    wide = {"F": "d", "Y": "y"}
    sizes |= {to: sizes[of] // size * FP32 for to, of in wide.items() if of in sizes}
    if group.kind != "block":
        return sizes
    inner = group.convs["depthwise"].out_channels
    gated = inner if group.squeezes else 0
    squeezed = group.convs["reduce"].out_channels if group.squeezes else 0
    sizes |= {"c": batch * gated * size, "r": batch * squeezed * size, "i": sizes["e"]}
    sizes |= {"C": batch * gated * FP32, "R": batch * squeezed * FP32}
    sizes |= {"u": 2 * inner * size, "w": 2 * inner * size}
    sizes["N"] = NORM_VECTORS * inner * FP32
    sizes["o"] = _padded_gradient(group, size) if on_cpu else 0
    matrix = inner * last.out_channels * (FP32 + (size if size < FP32 else 0))
    smaller = last.out_channels <= last.side**2
    sizes["g"] = (batch * matrix if smaller else sizes["d"]) if group.squeezes else 0
    return sizes


def _padded_gradient(group: Group, size: int) -> int:
    """What oneDNN 3 takes for the gradient of a depthwise weight with AVX-512, whatever the batch.

    It computes a group as a convolution of 16 to 16 channels: a weight of that size, in 16 bits
    another in fp32 and one image's input and output. Read off PyTorch's allocator.
    """
    conv = group.convs["depthwise"]
    if conv.kernel < PADDED_FROM_KERNEL:
        return 0
    weight = PADDED**2 * conv.kernel**2
    if size == FP32:
        return conv.out_channels * weight * size
    pixels = conv.side**2 * (1 + conv.stride**2)
    return conv.out_channels * (weight * (size + FP32) + PADDED * pixels * size)


def _runs(step: Step, group: Group) -> bool:
    """Whether the block has what the step belongs to."""
    if step.op in ("expand", "narrow") and (step.op == "expand") != group.expands:
        return False
    if step.op == "squeeze_excite" and not group.squeezes:
        return False
    if step.name.startswith(("residual", "drop_path")):
        return group.residual
    return not (step.name == "plain" and group.residual)


def _follow(steps: Steps, group: Group, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes that one block leaves behind (less than 0 where it frees more), and takes at most."""
    live = peak = 0
    for step in steps:
        if not _runs(step, group):
            continue
        for letter in step.takes:
            live += sizes[letter]
        peak = max(peak, live)
        for letter in step.frees:
            live -= sizes[letter]
    return live, peak


Sized = list[tuple[Group, dict[str, int]]]


def _shared(sized: Sized) -> int:
    """Bytes of the buffers for e and d, which outlast the pass.

    Where they are too large for that (`scratch.KEPT_BYTES`) they grow during the pass, and have
    grown to this when it is at its peak.
    """
    blocks = [(g, sizes) for g, sizes in sized if g.kind == "block"]
    expanded = max((sizes["e"] for g, sizes in blocks if g.expands), default=0)
    return expanded + max((sizes["d"] for _, sizes in blocks), default=0)


def _forward(sized: Sized, plan: MemoryPlan) -> tuple[int, int]:
    """Bytes alive after the forward pass, and the most during it."""
    live = peak = _shared(sized) if plan.shared and not plan.block_backward else 0
    owed = 0
    for index, (group, sizes) in enumerate(sized):
        left, most = _follow(plan.of(group.kind), group, sizes)
        live += group.repeats * left
        peak = max(peak, live - left + most)
        if not plan.block_backward:
            # nn.Sequential holds the input of a stage until its last block is through.
            follows = index + 1 < len(sized) and sized[index + 1][0].stage == group.stage
            live += sizes["x"] if follows else -owed
            owed = sizes["x"] if follows else 0
    return live, peak


# By a block's kind, letters of what lies in the shared buffers for e and d in its backward pass.
_BUFFERS = {"block": ("e", "d"), "fused": ("d", "d"), "dense": ("y", "")}


def _backward(sized: Sized, plan: MemoryPlan, dtype: torch.dtype) -> int:
    """The most during the backward pass, above what stands at its start."""
    live = peak = expanded = filtered = 0
    for group, sizes in reversed(sized):
        left, most = _follow(plan.backward_of(group.kind), group, sizes)
        if plan.shared and group.kind in _BUFFERS:
            # The buffers grow from block to block; too large ones are freed after each.
            before, behind = _BUFFERS[group.kind]
            expanded = max(expanded, sizes[before] if group.kind != "block" or group.expands else 0)
            filtered = max(filtered, sizes[behind] if behind else 0)
            # A block's gradients of parameters are all there, in fp32, before anything is freed.
            cast = dtype.itemsize if dtype.itemsize < FP32 else 0
            most += group.parameters * (FP32 + cast)
        most += expanded + filtered
        if expanded + filtered > KEPT_BYTES:
            expanded = filtered = 0
        left += group.parameters * dtype.itemsize  # the gradients stay
        if group.kind == "head":  # the classifier's are there before the head's activations go
            most += group.convs["classifier"].parameters * dtype.itemsize
        peak = max(peak, live + most, live + (group.repeats - 1) * left + most)
        live += group.repeats * left
    return peak
