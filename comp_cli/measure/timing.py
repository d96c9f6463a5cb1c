"""Timing variants against each other: interleaved rounds, and what can be said from them."""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from ..progress import Progress
from ..report.bench import Factor, Latency

RESAMPLES = 2000
WARM_UP = 2
WIDE = 1.5  # an interval whose ends are so many times apart says little

Variant = TypeVar("Variant", bound=Hashable)  # what a caller calls one
Inputs = dict[str, Tensor]
Runner = Callable[[Inputs], Any]  # one forward pass, synchronised; what it returns is not looked at


def rounds(
    runners: Mapping[Variant, Runner], inputs: Inputs, clock: Callable[[], Any] = time.perf_counter, warm_up: int = WARM_UP
) -> Iterator[dict[Variant, float]]:
    """Endless rounds of milliseconds in which every variant runs once, so that a busy moment of the machine hits all alike.

    After the runs to warm up, every second round goes backwards, so that no variant always follows the same one.
    `clock` tells seconds (or an array of them, from several clocks).
    """
    for run in runners.values():
        for _ in range(warm_up):
            run(inputs)
    names = list(runners)
    while True:
        taken = {}
        for name in names:
            begin = clock()
            runners[name](inputs)
            taken[name] = 1000 * (clock() - begin)
        yield taken
        names.reverse()


def time_interleaved(
    runners: Mapping[Variant, Runner], inputs: Inputs, batch: int, iterations: int, duration: float, progress: Progress
) -> dict[Variant, list[float]]:
    """Milliseconds of every variant, one per round: at least so many rounds and seconds as were asked for."""
    taken: dict[Variant, list[float]] = {key: [] for key in runners}
    with progress.track(f"timing batch {batch}", iterations) as bar:
        start = None
        for done, found in enumerate(rounds(runners, inputs), start=1):
            start = start or time.perf_counter()
            for key, ms in found.items():
                taken[key].append(ms)
            bar.advance(by=int(done <= iterations))
            if done >= iterations and time.perf_counter() - start >= duration:
                break
    return taken


def time_until(
    runners: Mapping[Variant, Runner],
    inputs: Inputs,
    read: Callable[[dict[Variant, list[float]]], tuple[float, float, float]],
    iterations: int,
    width: float,
    seconds: tuple[float, float],
) -> tuple[float, float, float]:
    """A value and its interval, read of the milliseconds of every variant: of at least so many rounds and seconds, and of more
    until the interval is narrower than a share `width` of the value, or the most seconds are over."""
    taken: dict[Variant, list[float]] = {key: [] for key in runners}
    start = None
    for done, found in enumerate(rounds(runners, inputs), start=1):
        start = start or time.perf_counter()
        for key, ms in found.items():
            taken[key].append(ms)
        spent = time.perf_counter() - start
        if done < iterations or done % iterations or spent < seconds[0]:
            continue
        value, low, high = read(taken)
        if high - low <= width * value or spent >= seconds[1]:
            return value, low, high
    raise AssertionError("rounds are endless")


def summary(backend: str, side: str, batch: int, times: Sequence[float]) -> Latency:
    """The row of one variant from its times in milliseconds."""
    median = statistics.median(times)
    p90, p99 = np.percentile(times, [90, 99]).tolist()
    return Latency(backend, side, batch, len(times), median, p90, p99, 1000 * batch / median, *interval(times))


def interval(times: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of their median, by a bootstrap over rounds."""
    measured = np.asarray(times)
    drawn = np.random.default_rng(0).integers(len(times), size=(RESAMPLES, len(times)))
    low, high = np.percentile(np.median(measured[drawn], axis=-1), [2.5, 97.5]).tolist()
    return low, high


def median_interval(times: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median, and the ends of its 95 % interval: a bootstrap over rounds."""
    found = np.asarray(times)
    drawn = np.random.default_rng(seed).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.percentile(np.median(found[drawn], axis=-1), [2.5, 97.5]).tolist()
    return float(np.median(found)), low, high


def speedup(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Factor:
    """Median before over median after; both hold one time per round, in the same order.

    The interval is a bootstrap over rounds: both medians come from the same resampled rounds, because what slowed one
    variant in a round slowed the other.
    """
    times = np.asarray([before, after])  # (2, rounds)
    drawn = np.random.default_rng(seed).integers(times.shape[1], size=(RESAMPLES, times.shape[1]))
    resampled = np.median(times[:, drawn], axis=-1)  # (2, RESAMPLES)
    low, high = np.percentile(resampled[0] / resampled[1], [2.5, 97.5]).tolist()
    value = np.median(times[0]) / np.median(times[1])
    return Factor(float(value), low, high)


def unsteady(factors: Iterable[Factor], rounds: int) -> str | None:
    """What to say of factors whose intervals are wide; None where they are not."""
    widest = max(factors, key=lambda factor: factor.high / factor.low)
    if widest.high / widest.low < WIDE:
        return None
    return (
        f"the spread is large: a speed-up of {widest.value:.2f}x may as well be {widest.low:.2f}x or {widest.high:.2f}x "
        f"({rounds} rounds). More of them (--iterations, --duration) on an idle machine say more."
    )
