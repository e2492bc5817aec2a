"""Timing: models run in turn, so that what slows the machine slows all of them alike."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tosa_convert.base.errors import UsageError


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one contestant."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)

    def by_pass(self, length: int) -> "Timing":
        """The mean of each pass over so many inputs, in place of each round; for inputs that take different times."""
        passes = [self.seconds[start : start + length] for start in range(0, len(self.seconds), length)]
        return Timing([statistics.fmean(each) for each in passes])

    def speedups(self, reference: "Timing") -> list[float]:
        """Per round, how many times faster than the reference in the same round."""
        return [theirs / ours for theirs, ours in zip(reference.seconds, self.seconds, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def interleave(
    contestants: dict[str, Callable[[], None]], rounds: int, warmup: int = 2, advance: Callable[[], None] | None = None
) -> dict[str, Timing]:
    """Time callables A B A B …, ``rounds`` times each, after ``warmup`` untimed rounds."""
    seconds = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, contestant in contestants.items():
            started = time.perf_counter()
            contestant()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
        if advance:
            advance()
    return {name: Timing(each) for name, each in seconds.items()}


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int) -> None:
    """
    Raises:
        UsageError: this process may use fewer processors.
    """
    if threads > processors():
        raise UsageError(f"{threads} threads are more than the {processors()} processors here; give that many or fewer")


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Within this block torch computes on so many threads, and the process stays on as many processors."""
    before = torch.get_num_threads()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(threads)
    if allowed:
        os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if allowed:
            os.sched_setaffinity(0, allowed)
