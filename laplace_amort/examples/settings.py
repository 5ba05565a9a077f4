"""The state in which an example runs, and which it leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from laplace_amort.types import default_dtype

__all__ = ["own_settings"]


@contextmanager
def own_settings() -> Iterator[None]:
    """Run in float64, from a forked random state, and on one thread: threads only get in each other's way here."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with default_dtype(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
