"""Grid search of alpha, beta and gamma at equal work, as in the paper, with the user's scorer.

Trials in the CSV file are not run again: an interrupted search continues where it stopped, and
searches that share a file at the same time share its trials.
"""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from threading import Event
from typing import Any

import torch

from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.scaling.accuracy import LABEL, estimate_top1
from effnet_fast.scaling.checks import whole
from effnet_fast.scaling.compound import CompoundScaling, Point
from effnet_fast.scaling.counts import count
from effnet_fast.scaling.trials import Key, Trial, TrialFile

WORK = 2.0  # growth of the multiply-adds for each unit of phi
STEP, TOLERANCE = 0.05, 0.1
LARGEST_GRID = 1_000_000  # points
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
    def key(self) -> Key:
        return self.scaling, self.phi

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
    if not (0 < step < math.inf and 0 < tolerance < math.inf):
        raise ValueError(
            f"step and tolerance must be positive and finite, got {step!r} and {tolerance!r}"
        )
    largest = WORK + tolerance, math.sqrt(WORK + tolerance)
    points = [(end - 1.0) / step + 1.0 for end in largest]  # before lists of that length are made
    if points[0] * points[1] ** 2 > LARGEST_GRID:
        raise ValueError(f"a step of {step:g} makes more than a million points")
    alphas, others = (_axis(step, end) for end in largest)
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
            Several searches, in any processes, may share it: each trial is run by one of them,
            and all return all trials. See `TrialFile` for systems without locks.
        workers: how many trials run side by side. With engine "process", 1 or None runs them in
            this process, and more share its threads among them; with "ray", None hands Ray all.
        engine: "process", or "ray" to let Ray place them (the package must be installed).
        seed: of the random weights, the same in every trial.
        on_trial: called after each trial, also for those in the file.

    Returns:
        all trials, each once, the best first.

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
    todo = _Todo(jobs, TrialFile(csv, scorer_name), on_trial)
    with closing(todo):
        while todo.left:
            with closing(_run(todo, workers, engine)) as results:
                for job, score in results:
                    todo.end(job, _trial(job, score, scorer_name))
    rule = attrgetter("alpha", "beta", "gamma")
    return sorted(todo.ended, key=lambda trial: (-trial.score, rule(trial.scaling)))


class _Todo:
    """The trials that are left, claimed one by one, and those that have ended.

    Args:
        jobs: all trials.
        file: where they are kept.
        on_trial: called with each that ends, or has ended.
    """

    def __init__(
        self, jobs: Iterable[_Job], file: TrialFile, on_trial: Callable[[Trial], None] | None
    ) -> None:
        self.file = file
        self.on_trial = on_trial
        self.ended: list[Trial] = []
        self.left: list[_Job] = []
        self.rounds = 0
        for job in {job.key: job for job in jobs}.values():
            if not self._end_if_known(job):
                self.left.append(job)

    def claim(self) -> Iterator[_Job]:
        """The trials that nobody runs. Those that another search runs stay left.

        Where a round has begun before, it waits for the first of these: no claim is held then.
        """
        waits, self.rounds = self.rounds > 0, self.rounds + 1
        jobs, self.left = self.left, []
        for index, job in enumerate(jobs):
            if not self.file.claim(job.key, wait=waits and index == 0):
                self.left.append(job)
                continue
            self.file.refresh()  # another search may have ended it before the claim
            if self._end_if_known(job):
                self.file.release(job.key)
            else:
                yield job

    def end(self, job: _Job, trial: Trial) -> None:
        """Keeps a trial that has been run."""
        self.file.append(trial)
        self.file.release(job.key)
        self._tell(trial)

    def _end_if_known(self, job: _Job) -> bool:
        trial = self.file.find(job.key)
        if trial is not None:
            self._tell(trial)
        return trial is not None

    def _tell(self, trial: Trial) -> None:
        self.ended.append(trial)
        if self.on_trial is not None:
            self.on_trial(trial)

    def close(self) -> None:
        """Gives back what is claimed."""
        self.file.close()


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
    todo: _Todo, workers: int | None, engine: str
) -> Generator[tuple[_Job, float], None, None]:
    """Jobs and their scores in the order in which they end; a failure is raised at the end.

    After one, no trial begins that has not begun, but those that run are waited for.
    """
    stop = Event()
    most = len(todo.left)
    jobs = todo.claim()
    if engine == "ray":
        results = _run_on_ray(jobs, workers or most, stop)
    elif workers in (None, 1) or most == 1:
        results = _run_here(jobs, stop)
    else:
        results = _run_in_processes(jobs, min(workers or 1, most), stop)
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


def _run_here(jobs: Iterator[_Job], stop: Event) -> Results:
    while not stop.is_set() and (job := next(jobs, None)) is not None:
        yield job, partial(_score, job)


def _run_in_processes(jobs: Iterator[_Job], workers: int, stop: Event) -> Results:
    # A forked child of a process that has used OpenMP hangs in its first parallel region.
    context = torch.multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (threads,))
    running: dict[Future[float], _Job] = {}

    def start(count: int) -> None:
        for job in itertools.islice(jobs, 0 if stop.is_set() else count):
            with _interrupts_held_back():  # a process that starts here inherits that
                running[pool.submit(_score, job)] = job

    try:
        start(workers)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result
            start(len(done))
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int) -> None:
    """Ctrl-C, which a terminal sends to every process, ends a worker without a word."""
    if hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delivers Ctrl-C at the end of the block, where the system can."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run_on_ray(jobs: Iterator[_Job], workers: int, stop: Event) -> Results:
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine 'ray' needs the package ray: pip install ray") from error
    remote = ray.remote(_score)
    running = {remote.remote(job): job for job in itertools.islice(jobs, workers)}
    while running:
        done, _ = ray.wait(list(running))
        for reference in done:
            score: Any = partial(ray.get, reference)
            yield running.pop(reference), score
        if not stop.is_set():
            running |= {remote.remote(job): job for job in itertools.islice(jobs, len(done))}
