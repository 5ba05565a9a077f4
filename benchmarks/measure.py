"""Shared by the benchmarks: time and peak memory of a callable, and a table of ratios against the first row."""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import statistics
from collections.abc import Callable
from typing import Any

import pyro
import tabulate
import torch
from torch.utils.benchmark import Timer


def seconds(fns: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Wall seconds of one call of each: the median over rounds that take turns, so a busy minute hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for fn in fns.values():
        fn()
    for _ in range(rounds):
        for name, fn in fns.items():
            timer = Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
            times[name].append(timer.blocked_autorange(min_run_time=0.2).median)
    return {name: statistics.median(values) for name, values in times.items()}


def _grow(fn: Callable[[], Any], pipe: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fn()
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_mebibytes(fn: Callable[[], Any]) -> float:
    """Growth of the resident set over one call, in a forked child (Linux); below a few MiB it is noise."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_grow, args=(fn, sender))
    child.start()
    kibibytes = receiver.recv()
    child.join()
    return kibibytes / 1024


def machine() -> str:
    """What the figures were measured on."""
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, pyro {pyro.__version__}"
    )


def print_ratios(title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Print one table; the caller puts the ratios into the rows."""
    print(f"\n{title}\n{tabulate.tabulate(rows, columns, floatfmt='.3g')}")
