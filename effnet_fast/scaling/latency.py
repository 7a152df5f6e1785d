"""The time of a call, predicted from a network's table by a model fitted to this machine.

The model is a sum of prices: for each block, for each multiply-add by kind of convolution, for each
byte of activations moved and of weights read. The prices are fitted
to a handful of measured networks, none below 0, by least squares of relative errors in which those
that lie far off count less. Each network is then predicted once by a fit without it: the errors of
those predictions are reported.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch

from effnet_fast import files, timing
from effnet_fast.backends import can_run
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.models.variants import Variant, custom_variant
from effnet_fast.scaling.conditions import DTYPES, Conditions, to_json
from effnet_fast.scaling.counts import groups
from effnet_fast.scaling.least_squares import solve_nonnegative
from effnet_fast.scaling.memory import check_fits

FORMAT = 1  # of the file
# What runs each plan that can be measured: the backend given to the network.
BACKENDS = {"stock": "reference", "fused": "auto"}
FEATURES = (
    "blocks",
    "pointwise_macs",
    "depthwise_macs",
    "stem_macs",
    "activation_bytes",
    "weight_bytes",
)
# Index in FEATURES; dense convolutions of many channels are products, as 1x1 ones are.
_MACS = {"expand": 1, "project": 1, "head": 1, "fused": 1, "dense": 1, "depthwise": 2, "stem": 3}
# Depth, width and resolution of the networks that are measured: along the paper's rule from a
# fiftieth of B0 to B3, and beside it, so that depth, width and resolution have prices of their own.
NETWORKS = (
    (0.48, 0.68, 128),
    (0.69, 0.83, 168),
    (1.0, 1.0, 224),
    (1.2, 1.1, 256),
    (1.4, 1.2, 304),
    (1.0, 0.5, 96),
    (0.5, 1.0, 96),
    (0.5, 0.5, 224),
    (2.0, 0.7, 160),
    (1.0, 1.4, 160),
    (0.6, 1.0, 320),
    (1.5, 0.8, 256),
)
ROUNDS = 4  # over all networks, so that a busy spell of the machine does not hit one of them alone
DISCARD_S, BURST_S = 0.05, 0.1  # of each burst
REWEIGHTINGS = 10
EXACT = 0.02  # relative error below which all samples count the same


def features(
    variant: Variant, conditions: Conditions, *, num_classes: int = 1000, in_chans: int = 3
) -> tuple[float, ...]:
    """The amounts of `FEATURES` in one call, whose prices are fitted; all grow with phi."""
    size = conditions.dtype.itemsize
    row = [0.0] * len(FEATURES)
    for group in groups(variant, num_classes=num_classes, in_chans=in_chans):
        row[0] += group.repeats
        for conv in group.convs.values():
            if conv.kind in _MACS:
                row[_MACS[conv.kind]] += conditions.batch * group.repeats * conv.macs
        elements = sum(group.elements.get(letter, 0) for letter in "edy")
        row[4] += conditions.batch * group.repeats * elements * size
        row[5] += group.repeats * group.parameters * size
    return tuple(row)


@dataclass(frozen=True)
class Sample:
    """A measured network: its multipliers, its side in pixels, and seconds a call by plan."""

    depth: float
    width: float
    resolution: int
    seconds: dict[str, float]

    @property
    def variant(self) -> Variant:
        """The network."""
        return custom_variant(depth=self.depth, width=self.width, resolution=self.resolution)


@dataclass(frozen=True)
class Prices:
    """What a plan pays for each of `FEATURES`."""

    seconds: dict[str, float]  # by feature, per block, multiply-add or byte
    median_error: float  # relative, as the largest, of networks predicted by a fit without them
    largest_error: float


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the time of a call under the conditions that were measured.

    Args:
        conditions: those of the measurement; `predict` uses their `plan` unless it gets another.
        prices: by plan.
        samples: the measurements.
        machine, versions, threads: where the samples were measured.
    """

    conditions: Conditions
    prices: dict[str, Prices]
    samples: tuple[Sample, ...]
    machine: str
    versions: dict[str, str]
    threads: int

    def predict(
        self,
        variant: Variant,
        plan: str | None = None,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> float:
        """Seconds of a call on the whole batch.

        Raises:
            ValueError: a plan that was not measured.
        """
        plan = plan or self.conditions.plan
        if plan not in self.prices:
            raise ValueError(
                f"plan {plan!r} was not measured; measured are {', '.join(self.prices)}"
            )
        amounts = features(variant, self.conditions, num_classes=num_classes, in_chans=in_chans)
        prices = self.prices[plan].seconds
        return sum(prices[name] * n for name, n in zip(FEATURES, amounts, strict=True))

    def check(self, conditions: Conditions) -> None:
        """Refuses conditions other than the measured ones.

        Raises:
            ValueError: which of them differ.
        """
        for name in ("batch", "dtype", "training", "device"):
            measured, asked = getattr(self.conditions, name), getattr(conditions, name)
            if measured != asked:
                raise ValueError(f"the latency was measured with {name}={measured}, not {asked}")
        if conditions.plan not in self.prices:
            raise ValueError(
                f"the latency of plan {conditions.plan!r} was not measured; measured are "
                f"{', '.join(self.prices)}"
            )

    def foreign(self) -> str | None:
        """How the measured machine differs from this one; None where it does not."""
        here = {"machine": _machine(self.conditions.device), **_versions()}
        there = {"machine": self.machine, **self.versions}
        if self.conditions.device == "cpu":
            here["threads"], there["threads"] = str(torch.get_num_threads()), str(self.threads)
        parts = [f"{n} {there.get(n)}, not {here[n]}" for n in here if there.get(n) != here[n]]
        return "; ".join(parts) or None

    def save(self, path: str | Path) -> None:
        """Writes everything to a JSON file."""
        content = asdict(self) | {"format": FORMAT, "conditions": to_json(self.conditions)}
        with files.replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> LatencyModel:
        """Reads what `save` has written.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no calibration, or of another format.
        """
        text = files.read_text(path)
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r} is not {FORMAT}")
            prices = {plan: Prices(**fields) for plan, fields in content["prices"].items()}
            if not prices or any(set(p.seconds) != set(FEATURES) for p in prices.values()):
                raise ValueError(f"prices must be of {', '.join(FEATURES)}")
            for p in prices.values():
                _check_amounts((*p.seconds.values(), p.median_error, p.largest_error))
            conditions = content["conditions"]
            conditions["dtype"] = DTYPES[conditions["dtype"]]
            return LatencyModel(
                Conditions(**conditions),
                prices,
                tuple(Sample(**sample) for sample in content["samples"]),
                str(content["machine"]),
                dict(content["versions"]),
                int(content["threads"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no latency calibration: {error}") from error


def _check_amounts(amounts: Iterable[object]) -> None:
    for amount in amounts:
        number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not (number and 0 <= amount < math.inf):  # type: ignore[operator]
            raise ValueError(f"a price or an error is {amount!r}, not a number of at least 0")


def fit_prices(samples: Iterable[Sample], conditions: Conditions, plan: str) -> Prices:
    """The prices that explain the samples best, and how well they predict what they have not seen.

    Raises:
        ValueError: fewer samples than two more than there are features.
    """
    samples = list(samples)
    if len(samples) < len(FEATURES) + 2:
        raise ValueError(f"{len(samples)} samples are too few for {len(FEATURES)} prices")
    seconds = numpy.array([sample.seconds[plan] for sample in samples])
    rows = numpy.array([features(sample.variant, conditions) for sample in samples])
    relative = rows / seconds[:, None]
    errors = []
    for index in range(len(samples)):
        prices = _robust(numpy.delete(relative, index, axis=0))
        errors.append(abs(float(relative[index] @ prices) - 1.0))
    named = dict(zip(FEATURES, _robust(relative).tolist(), strict=True))
    return Prices(named, statistics.median(errors), max(errors))


def _robust(relative: numpy.ndarray) -> numpy.ndarray:
    """Prices x >= 0 with relative x ~ 1, outliers counting by their size instead of its square."""
    weights = numpy.ones(len(relative))
    for _ in range(REWEIGHTINGS):
        prices = solve_nonnegative(relative * weights[:, None], weights)
        weights = 1.0 / numpy.sqrt(numpy.maximum(abs(relative @ prices - 1.0), EXACT))
    return prices


def calibrate(
    conditions: Conditions,
    *,
    networks: Iterable[tuple[float, float, int]] = NETWORKS,
    on_burst: Callable[[str], None] | None = None,
) -> LatencyModel:
    """Measures networks on this machine, by every plan that can run, and fits the prices.

    A network's time is the median of the quickest of its bursts: other processes on the machine can
    only add to it. Calibration takes about half a minute for one image per call.

    Args:
        conditions: those to measure; the plan must be one of `BACKENDS`.
        networks: depth, width and resolution of each.
        on_burst: called after each of `bursts(conditions)` bursts, for a progress bar.

    Raises:
        ValueError: a plan that cannot be measured, or a missing device.
    """
    check_measurable(conditions)
    networks = list(networks)
    variants = [custom_variant(depth=d, width=w, resolution=side) for d, w, side in networks]
    seconds = measure(variants, conditions, on_burst=on_burst)
    samples = tuple(Sample(*row, times) for row, times in zip(networks, seconds, strict=True))
    plans = measured_plans(conditions)
    prices = {plan: fit_prices(samples, conditions, plan) for plan in plans}
    machine = _machine(conditions.device)
    return LatencyModel(conditions, prices, samples, machine, _versions(), torch.get_num_threads())


def check_measurable(conditions: Conditions) -> None:
    """Refuses conditions that cannot be measured here.

    Raises:
        ValueError: a plan that is not among `BACKENDS` or cannot run, or a device that is not
            there.
    """
    if conditions.plan not in BACKENDS:
        raise ValueError(
            f"plan {conditions.plan!r} cannot be measured; allowed are {', '.join(BACKENDS)}"
        )
    if conditions.plan == "fused" and (reason := can_run("cpu", "dwconv_bn_silu")):
        raise ValueError(f"plan 'fused' cannot be measured: {reason}")
    if conditions.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch finds no GPU that it can use")


def measured_plans(conditions: Conditions) -> tuple[str, ...]:
    """The plans that `calibrate` measures: stock, and the one of the conditions."""
    assert conditions.plan is not None
    return tuple(dict.fromkeys(("stock", conditions.plan)))


def bursts(conditions: Conditions, networks: int = len(NETWORKS)) -> int:
    """How often `calibrate` calls `on_burst`."""
    return networks * ROUNDS * len(measured_plans(conditions))


def measure(
    variants: Sequence[Variant],
    conditions: Conditions,
    *,
    on_burst: Callable[[str], None] | None = None,
) -> list[dict[str, float]]:
    """Seconds of a call by plan for each network, as `calibrate` takes them."""
    if conditions.device == "cpu":
        for variant in variants:
            check_fits(conditions.memory(variant).peak, f"a batch of {conditions.batch}")
    quickest: list[dict[str, float]] = [{} for _ in variants]
    for _ in range(ROUNDS):
        for variant, best in zip(variants, quickest, strict=True):
            times = timing.measure(
                contestants(variant, conditions),
                rounds=1,
                discard_s=DISCARD_S,
                burst_s=BURST_S,
                on_burst=on_burst,
            )
            for plan, taken in times.items():
                best[plan] = min(best.get(plan, math.inf), taken.median / 1e3)
    return quickest


def contestants(variant: Variant, conditions: Conditions) -> Mapping[str, Callable[[], object]]:
    """By plan, a function that runs the network once on random images and waits for the end."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = EfficientNet(variant).to(conditions.dtype)
        x = torch.randn(conditions.batch, 3, variant.resolution, variant.resolution)
    model = model.to(conditions.device).train(conditions.training)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.to(conditions.device, conditions.dtype).contiguous(memory_format=torch.channels_last)

    def run(plan: str) -> None:
        model.backend = BACKENDS[plan]
        if conditions.training:
            model.zero_grad()
            model(x).float().logsumexp(1).mean().backward()
        else:
            with torch.inference_mode():
                model(x)
        if conditions.device == "cuda":
            torch.cuda.synchronize()

    return {plan: lambda plan=plan: run(plan) for plan in measured_plans(conditions)}  # type: ignore[misc]


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__}
