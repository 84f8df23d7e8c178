"""Several ways to do the same thing, timed side by side in one process, and the memory that a call takes."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["OK", "Row", "Stopwatch", "Variants", "allocated_peak", "device_stopwatch"]

OK = "ok"

Row = dict[str, Any]
Variants = Mapping[str, Callable[[], object] | str]
"""Name to what is called, or to the reason why this variant cannot run."""


@dataclass(frozen=True)
class Stopwatch:
    """How calls are timed."""

    repeats: int
    """Rounds at least; a round calls every variant once."""
    seconds: float = 0.0
    """Rounds are added until they took this long together, so that short calls are repeated more often."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds, after everything that was started has ended."""
    sample: float = 0.0
    """Seconds that a variant is called for in a round at least: on a GPU one call after the other, not one alone."""

    def compare(self, variants: Variants, *, baseline: str) -> list[Row]:
        """Time all variants in rounds, A B C A B C …, after a first round that does not count.

        Neighbours in a round share what else the machine does, so a ratio is taken within each round, and its median
        over the rounds is what counts.

        Args:
            variants: in the order of a round.
            baseline: the variant that ratios are to.

        Returns a row a variant with `status` (OK, or why it did not run), `seconds` (median), `ratio` (median) with
        `ratio_low` and `ratio_high` (quartiles), `repeats` and `times` (seconds of each round). Numbers that do not
        exist are None.
        """
        times = self._rounds({name: run for name, run in variants.items() if not isinstance(run, str)})
        base = times.get(baseline)
        return [{"variant": name, **_summary(run, times.get(name), base)} for name, run in variants.items()]

    def _rounds(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in runs}
        calls = dict.fromkeys(runs, 1)
        total, rounds = 0.0, 0
        while runs and (rounds <= self.repeats or total < self.seconds):
            for name, run in runs.items():
                elapsed = self._time(run, calls[name])
                if rounds:
                    times[name].append(elapsed / calls[name])
                    total += elapsed
                elif self.sample:
                    # The first call may have compiled.
                    calls[name] = math.ceil(self.sample / self._time(run, 1))
            rounds += 1
        return times

    def _time(self, run: Callable[[], object], calls: int) -> float:
        """Seconds that `calls` calls of `run` take together."""
        started = self.clock()
        for _ in range(calls):
            run()
        return self.clock() - started


def _summary(run: Callable[[], object] | str, times: list[float] | None, base: list[float] | None) -> Row:
    low = middle = high = None
    if times and base:
        ratios = [time / of for time, of in zip(times, base, strict=True)]
        low, middle, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
        )
    return {
        "status": run if isinstance(run, str) else OK,
        "seconds": statistics.median(times) if times else None,
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "repeats": len(times or ()),
        "times": times or [],
    }


_SAMPLE = 5e-3


def device_stopwatch(device: torch.device, repeats: int, seconds: float) -> Stopwatch:
    """For calls on `device`."""
    return Stopwatch(repeats, seconds, device_clock(device), _SAMPLE if device.type == "cuda" else 0.0)


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that first waits for what `device` still has to do."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def allocated_peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch holds at the peak of `run()` beyond what it held before; its result counts.

    Deterministic. On CPU it is summed from the profiler's record of every allocation, buffers inside kernels included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    # The profiler would write lines of its own to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    del result
    recorded: Any = profiled.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
