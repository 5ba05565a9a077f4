"""Shared by the benchmarks: time and peak memory of a callable, and a table of ratios against the first row."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
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


def _status(key: str) -> float:
    """A line of ``/proc/self/status``, in kibibytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def _grow(fn: Callable[[], Any], pipe: Any) -> None:
    # Give back what the parent freed but kept, and forget the peak that it had.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    fn()
    pipe.send(_status("VmHWM") - before)


def peak_mebibytes(fn: Callable[[], Any]) -> float:
    """Growth of the resident set over one call, in a forked child (Linux); below a few MiB it is noise."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_grow, args=(fn, sender))
    child.start()
    kibibytes = receiver.recv()
    child.join()
    return float(kibibytes / 1024)


def machine() -> str:
    """What the figures were measured on."""
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, pyro {pyro.__version__}"
    )


def print_ratios(title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Print one table; the caller puts the ratios into the rows."""
    print(f"\n{title}\n{tabulate.tabulate(rows, columns, floatfmt='.3g')}")
