"""Ideal traffic: the bytes that each way of running a network must carry to and from memory.

A plan is a list of passes. A pass reads and writes whole activations, each once, however it tiles
them; second reads at the borders of tiles are not counted, and neither are savings by a cache
between passes. Weights are read once per pass over the network, whatever the batch.

The plans of a block, with x its input, e the expanded tensor before the depthwise convolution, d
the one after it, and y its output:

- inference "stock": one pass per PyTorch operator;
- inference "layer_fused": convolution, BN, SiLU, pool and residual in one pass each;
- inference "block_fused": e never reaches memory;
- training "stock": PyTorch's operators and their derivatives;
- training "fast": BN and SiLU applied by whoever reads, five passes over e and d forward and
  eleven backward;
- training "lean": the same, with e computed again from x for the backward passes.

Those of a FusedMBConv stand in `fused_tables`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from effnet_fast.models.variants import Variant
from effnet_fast.scaling import fused_tables
from effnet_fast.scaling.checks import whole
from effnet_fast.scaling.counts import groups


@dataclass(frozen=True)
class Pass:
    """One pass over activations."""

    op: str  # part of: "expand", "depthwise", "squeeze_excite", "project", "fused", "dense"
    name: str  # what it does
    reads: str  # a letter for each tensor that it reads once: x, e, d, y
    writes: str  # the same of those that it writes


def _passes(table: str) -> tuple[Pass, ...]:
    rows = (line.split() for line in table.splitlines() if line)
    return tuple(Pass(op, name, *(t.replace("-", "") for t in ends)) for op, name, *ends in rows)


# Rows of "expand" exist where a block expands, rows of "squeeze_excite" where it has that, rows
# named "residual" where it has a residual; where it does not expand, e is x. Other activations move
# as much as SiLU. The gate and other vectors per channel are not counted.
_STOCK_FORWARD = """
expand          convolution     x    e
expand          bn              e    e
expand          silu            e    e
depthwise       convolution     e    d
depthwise       bn              d    d
depthwise       silu            d    d
squeeze_excite  squeeze         d    -
squeeze_excite  scale           d    d
project         convolution     d    y
project         bn              y    y
project         residual        yx   y
"""
_STOCK_TRAINING = f"""
expand          convolution     x    e
expand          statistics      e    -
expand          bn              e    e
expand          silu            e    e
depthwise       convolution     e    d
depthwise       statistics      d    -
depthwise       bn              d    d
depthwise       silu            d    d
squeeze_excite  squeeze         d    -
squeeze_excite  scale           d    d
{fused_tables.STOCK_PROJECT_TRAINING}
squeeze_excite  gate_product    dd   d
squeeze_excite  gate_sum        d    -
squeeze_excite  scale_bwd       d    d
squeeze_excite  squeeze_bwd     d    d
depthwise       silu_bwd        dd   d
depthwise       bn_sums         dd   -
depthwise       bn_bwd          dd   d
depthwise       data            d    e
depthwise       weight          de   -
expand          silu_bwd        ee   e
expand          bn_sums         ee   -
expand          bn_bwd          ee   e
expand          data            e    x
expand          weight          ex   -
project         residual_bwd    xx   x
"""
_LAYER_FUSED = """
expand          fused           x    e
depthwise       fused           e    d
project         fused           d    y
project         residual        x    -
"""
_BLOCK_FUSED = """
depthwise       fused           x    d
project         fused           d    y
project         residual        x    -
"""
_FAST_FORWARD = """
expand          convolution     x    e
depthwise       convolution     e    d
squeeze_excite  squeeze         d    -
project         convolution     d    y
project         finish          y    y
project         residual        x    -
"""
_FAST_BACKWARD = """
project         finish_bwd      yy   -
project         data            yyd  d
project         weight          yyd  -
depthwise       backward        dde  e
expand          data            ee   x
expand          weight          eex  -
project         residual_bwd    x    -
"""
_RECOMPUTE = "expand recompute x e"

# The stem and the head have x and y alone; the head's last pass feeds the pool.
_STOCK_EDGE = "edge convolution x y\nedge bn y y\nedge silu y y"
_STOCK_EDGE_TRAINING = """
edge            convolution     x    y
edge            statistics      y    -
edge            bn              y    y
edge            silu            y    y
edge            silu_bwd        yy   y
edge            bn_sums         yy   -
edge            bn_bwd          yy   y
edge            weight          yx   -
"""
_FAST_EDGE = "edge convolution x y\nedge finish y y\nedge finish_bwd yy -\nedge weight yyx -"
_HEAD_DATA = "edge data y x"  # the stem's input needs no gradient


@dataclass(frozen=True)
class TrafficPlan:
    """Passes of an MBConv, of the stem and of the head, and over the weights."""

    block: tuple[Pass, ...]
    stem: tuple[Pass, ...]
    head: tuple[Pass, ...]
    weight_passes: int
    fused: tuple[Pass, ...] = ()  # of a FusedMBConv with a projection
    dense: tuple[Pass, ...] = ()  # and of one without

    def of(self, kind: str) -> tuple[Pass, ...]:
        """The passes of a `counts.Group` of this kind."""
        return getattr(self, kind)


def _plan(block: str, edge: str, pool: str, weight_passes: int, extra: str = "") -> TrafficPlan:
    stem = _passes(edge)
    head = _passes(f"{edge}\n{pool}\n{extra}")
    return TrafficPlan(_passes(block), stem, head, weight_passes)


def _with_fused(key: tuple[str, str], plan: TrafficPlan) -> TrafficPlan:
    fused, dense = map(_passes, fused_tables.PASSES[key])
    return replace(plan, fused=fused, dense=dense)


# Weights: read forward; in training read again for the data gradient, and their gradients written.
PLANS = {
    ("inference", "stock"): _plan(_STOCK_FORWARD, _STOCK_EDGE, "edge pool y -", 1),
    ("inference", "layer_fused"): _plan(_LAYER_FUSED, "edge fused x y", "edge pool y -", 1),
    ("inference", "block_fused"): _plan(_BLOCK_FUSED, "edge fused x y", "edge pool y -", 1),
    ("training", "stock"): _plan(
        _STOCK_TRAINING, _STOCK_EDGE_TRAINING, "edge pool y y", 3, _HEAD_DATA
    ),
    ("training", "fast"): _plan(
        _FAST_FORWARD + _FAST_BACKWARD, _FAST_EDGE, "edge pool y -", 3, _HEAD_DATA
    ),
    ("training", "lean"): _plan(
        _FAST_FORWARD + _RECOMPUTE + _FAST_BACKWARD, _FAST_EDGE, "edge pool y -", 4, _HEAD_DATA
    ),
}
PLANS = {key: _with_fused(key, plan) for key, plan in PLANS.items()}
MODES = ("inference", "training")


def plans(mode: str) -> tuple[str, ...]:
    """Names of the plans of "inference" or "training"."""
    return tuple(name for m, name in PLANS if m == mode)


@dataclass(frozen=True)
class Traffic:
    """The bytes that one kind of pass moves in one stage.

    Args:
        stage: 0 for the stem, 1 to n for the stages of blocks, n + 1 for head and classifier.
        op, name: the pass, as in `Pass`; "weights" for those.
        bytes: read and written, for the whole batch.
    """

    stage: int
    op: str
    name: str
    bytes: int


def traffic(
    variant: Variant,
    mode: str = "inference",
    plan: str = "stock",
    resolution: int | None = None,
    *,
    batch: int = 1,
    element_size: int = 4,
    weight_size: int = 4,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> list[Traffic]:
    """The bytes of every pass of a plan, the equal blocks of a stage together.

    Args:
        variant, resolution, num_classes, in_chans: as for `convolutions`.
        mode, plan: one of `PLANS`.
        batch: number of images.
        element_size, weight_size: bytes of an element of an activation and of a weight.

    Raises:
        ValueError: an unknown mode or plan, or a size below 1.
    """
    if (mode, plan) not in PLANS:
        allowed = "; ".join(f"{m}: {', '.join(plans(m))}" for m in MODES)
        raise ValueError(f"no plan {plan!r} of mode {mode!r}; there are {allowed}")
    batch, element_size = whole("batch", batch), whole("element_size", element_size)
    weight_size = whole("weight_size", weight_size)
    chosen = PLANS[mode, plan]
    options = {"num_classes": num_classes, "in_chans": in_chans}
    rows = []
    for group in groups(variant, resolution, **options):
        for row in chosen.of(group.kind):
            elements = moved_elements(
                (row,),
                group.elements,
                expands=group.expands,
                residual=group.residual,
                squeezes=group.squeezes,
            )
            if elements:
                size = elements * group.repeats * batch * element_size
                rows.append(Traffic(group.stage, row.op, row.name, size))
        size = group.repeats * group.parameters * chosen.weight_passes * weight_size
        rows.append(Traffic(group.stage, "weights", "weights", size))
    return rows


def moved_elements(
    rows: tuple[Pass, ...],
    sizes: dict[str, int],
    *,
    expands: bool,
    residual: bool,
    squeezes: bool = True,
) -> int:
    """Elements that the passes of one block read and write.

    Args:
        rows: passes of a `TrafficPlan`.
        sizes: elements of x, e, d and y.
        expands, residual, squeezes: whether the block has an expansion, a residual, and
            squeeze-and-excitation.
    """
    return sum(
        sizes[tensor]
        for row in rows
        if (expands or row.op != "expand")
        and (squeezes or row.op != "squeeze_excite")
        and (residual or not row.name.startswith(("residual", "drop_path")))
        for tensor in row.reads + row.writes
    )
