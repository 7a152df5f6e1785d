"""Grid search of alpha, beta and gamma at equal work, as in the paper, with the user's scorer.

Trials in the CSV file are not run again: an interrupted search continues where it stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from threading import Event

import torch

from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.scaling.accuracy import LABEL, estimate_top1
from effnet_fast.scaling.checks import whole
from effnet_fast.scaling.compound import CompoundScaling, Point
from effnet_fast.scaling.counts import count
from effnet_fast.scaling.trials import Trial, TrialFile

WORK = 2.0  # growth of the multiply-adds for each unit of phi
STEP, TOLERANCE = 0.05, 0.1
ENGINES = ("process", "ray")

Scorer = Callable[[EfficientNet], float]


@dataclass(frozen=True)
class _Job:
    """One trial to run; it travels to other processes."""

    scaling: CompoundScaling
    phi: float
    scorer: Scorer | None
    seed: int

    @property
    def point(self) -> Point:
        return self.scaling.at(self.phi)


def candidates(step: float = STEP, tolerance: float = TOLERANCE) -> list[CompoundScaling]:
    """All constants on a grid with alpha * beta**2 * gamma**2 near 2 and none below 1.

    Args:
        step: distance of neighbours in each constant.
        tolerance: how far the product may lie from 2.

    Raises:
        ValueError: step or tolerance not positive, more than a million points, or nothing on the
            grid is near enough.
    """
    if not (step > 0 and tolerance > 0):
        raise ValueError(f"step and tolerance must be positive, got {step!r} and {tolerance!r}")
    alphas = _axis(step, WORK + tolerance)
    others = _axis(step, math.sqrt(WORK + tolerance))
    if len(alphas) * len(others) ** 2 > 1_000_000:
        raise ValueError(f"a step of {step:g} makes more than a million points")
    found = [
        CompoundScaling(*constants)
        for constants in itertools.product(alphas, others, others)
        if abs(CompoundScaling(*constants).growth - WORK) <= tolerance
    ]
    if not found:
        raise ValueError(
            f"no alpha, beta and gamma on a grid of {step:g} have a product within {tolerance:g} "
            f"of {WORK:g}: take a smaller step or a larger tolerance"
        )
    return found


def _axis(step: float, largest: float) -> list[float]:
    steps = math.floor((largest - 1.0) / step + 1e-9)
    return [round(1.0 + index * step, 9) for index in range(steps + 1)]


def grid_search(
    scorer: Scorer | None = None,
    *,
    scorer_name: str | None = None,
    scalings: Iterable[CompoundScaling] | None = None,
    phi: float = 1.0,
    csv: str | Path | None = None,
    workers: int | None = None,
    engine: str = "process",
    seed: int = 0,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Scores the network of every rule at `phi`.

    Args:
        scorer: takes a randomly initialised `EfficientNet` and returns its score, larger is better;
            the network's `variant` has its resolution and size. None takes the
            built-in estimate of ImageNet top-1 in percent, for which nothing is built or trained.
            With more than one worker it must be picklable: a function of a module.
        scorer_name: the name of its trials in the file; None means its qualified
            name.
        scalings: the rules to try; None means `candidates()`.
        phi: the compound coefficient at which the networks are compared.
        csv: file to which each trial is appended as it ends, and whose trials are not repeated.
        workers: how many trials run side by side. With engine "process", 1 or None runs them in
            this process, and more share its threads among them; with "ray", None hands Ray all.
        engine: "process", or "ray" to let Ray place them (the package must be installed).
        seed: of the random weights, the same in every trial.
        on_trial: called after each trial, also for those in the file.

    Returns:
        all trials, the best first.

    Raises:
        ValueError: an argument outside what is allowed, or a file that holds something else.
        RuntimeError: the scorer failed or returned no finite number; the file has the finished
            trials.
        ImportError: engine "ray" without the package.
    """
    if workers is not None:
        workers = whole("workers", workers)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    jobs = [_Job(s, phi, scorer, seed) for s in (candidates() if scalings is None else scalings)]
    for job in jobs:  # refuses a phi out of range before anything is run or written
        job.scaling.at(phi)
    scorer_name = scorer_name or _name(scorer)
    file = TrialFile(csv, scorer_name)
    known = {(trial.scaling, trial.phi): trial for trial in file.trials}
    trials = []
    for job in jobs:
        if (trial := known.get((job.scaling, phi))) is not None:
            trials.append(trial)
            if on_trial is not None:
                on_trial(trial)
    waiting = [job for job in jobs if (job.scaling, phi) not in known]
    with closing(_run(waiting, workers, engine)) as results:
        for job, score in results:
            trial = _trial(job, score, scorer_name)
            file.append(trial)
            trials.append(trial)
            if on_trial is not None:
                on_trial(trial)
    rule = attrgetter("alpha", "beta", "gamma")
    return sorted(trials, key=lambda trial: (-trial.score, rule(trial.scaling)))


def _name(scorer: Scorer | None) -> str:
    if scorer is None:
        return LABEL
    try:
        return f"{scorer.__module__}:{scorer.__qualname__}"
    except AttributeError:
        raise ValueError(
            f"the scorer {scorer!r} has no name under which a file could keep its trials: give "
            "scorer_name"
        ) from None


def _trial(job: _Job, score: float, scorer_name: str) -> Trial:
    point = job.point
    counts = count(point.variant)
    return Trial(
        job.scaling, job.phi, scorer_name, score, counts.parameters, counts.macs, point.resolution
    )


def _score(job: _Job) -> float:
    """Runs in whichever process the trial is given to."""
    point = job.point
    if job.scorer is None:
        return estimate_top1(point.variant)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(job.seed)
        return float(job.scorer(EfficientNet(point.variant)))


Results = Generator[tuple[_Job, Callable[[], float]], None, None]


def _run(
    jobs: list[_Job], workers: int | None, engine: str
) -> Generator[tuple[_Job, float], None, None]:
    """Jobs and their scores in the order in which they end; a failure is raised at the end.

    After one, no trial begins that has not begun, but those that run are waited for.
    """
    if not jobs:
        return
    stop = Event()
    if engine == "ray":
        results = _run_on_ray(jobs, workers or len(jobs), stop)
    elif workers in (None, 1) or len(jobs) == 1:
        results = _run_here(jobs, stop)
    else:
        results = _run_in_processes(jobs, min(workers or 1, len(jobs)), stop)
    failure: tuple[CompoundScaling, Exception] | None = None
    with closing(results):
        for job, result in results:
            try:
                score = result()
                if not math.isfinite(score):
                    raise ValueError(f"its score is {score}, which is no finite number")
            except Exception as error:  # of the scorer, which is the user's
                stop.set()
                failure = failure or (job.scaling, error)
            else:
                yield job, score
    if failure is not None:
        rule, cause = failure
        name = f"alpha={rule.alpha:g}, beta={rule.beta:g}, gamma={rule.gamma:g}"
        raise RuntimeError(
            f"the trial of {name} failed: {type(cause).__name__}: {cause}"
        ) from cause


def _run_here(jobs: list[_Job], stop: Event) -> Results:
    for job in jobs:
        if stop.is_set():
            return
        yield job, partial(_score, job)


def _run_in_processes(jobs: list[_Job], workers: int, stop: Event) -> Results:
    # A forked child of a process that has used OpenMP hangs in its first parallel region.
    context = torch.multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,))
    try:
        futures = {pool.submit(_score, job): job for job in jobs}
        for future in as_completed(futures):
            if future.cancelled():
                continue
            yield futures[future], future.result
            if stop.is_set():
                for other in futures:
                    other.cancel()
    finally:
        pool.shutdown(cancel_futures=True)


def _run_on_ray(jobs: list[_Job], workers: int, stop: Event) -> Results:
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine 'ray' needs the package ray: pip install ray") from error
    remote = ray.remote(_score)
    waiting = iter(jobs)
    running = {remote.remote(job): job for job in itertools.islice(waiting, workers)}
    while running:
        done, _ = ray.wait(list(running))
        for reference in done:
            yield running.pop(reference), partial(ray.get, reference)
        if not stop.is_set():
            running |= {remote.remote(job): job for job in itertools.islice(waiting, len(done))}
