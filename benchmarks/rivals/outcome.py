"""What a rival hands back, and the files of estimates.

A rival returns a dictionary with some of :data:`RESULT_COLUMNS`, and with ``estimates`` where it has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tasks import Task

# Seconds are of a clock, on one thread. total_seconds is setup + fit + se; the other two are not in it.
RESULT_COLUMNS = (
    "setup_seconds",  # from data to a fit that can start
    "fit_seconds",  # VI: to the target; TMB: nlminb; NUTS: warmup and draws
    "se_seconds",  # covariances after the fit
    "total_seconds",
    "compile_seconds",  # TMB's template, XLA, torch.jit: once for a model, or for a model and a size
    "cpu_seconds",  # of the processor, for the three together: rivals in R
    "search_seconds",  # VI: all training of the search for the limit and the best setting
    "steps",  # VI: to the target; TMB: iterations; NUTS: leapfrog steps
    "learning_rate",  # of the run that met the target first
    "horizon",  # and its number of steps, over which its learning rate decays
    "elbo",  # VI: the limit
    "elbo_se",
    "objective",  # what is maximized, if not the ELBO: log likelihood or log density
    "peak_mib",
    "remark",
)


class NotInstalledError(Exception):
    """A tool that a rival needs is missing; the message names it."""


@dataclass(frozen=True)
class Estimates:
    """Estimates and standard errors in unconstrained coordinates, ordered as in :class:`tasks.Task`.

    ``global_loc`` and ``global_se`` have shape ``(G,)``, ``local_loc`` and ``local_se`` have ``(L, N)``.
    """

    global_loc: NDArray[np.float64]
    global_se: NDArray[np.float64]
    local_loc: NDArray[np.float64]
    local_se: NDArray[np.float64]

    def save(self, path: Path, task: Task) -> None:
        """Write an npz file of the four arrays, ``global_names (G,)`` and ``local_names (L,)``."""
        self._check(task)
        np.savez(path, **vars(self), global_names=task.global_names, local_names=task.local_names)

    @classmethod
    def load(cls, path: Path) -> Estimates:
        """Read what :meth:`save` wrote."""
        with np.load(path) as file:
            return cls(**{name: file[name] for name in cls.__dataclass_fields__})

    def _check(self, task: Task) -> None:
        expected = {"global": (len(task.global_names),), "local": (len(task.local_names), task.units)}
        for name, array in vars(self).items():
            shape = expected[name.split("_")[0]]
            if array.shape != shape:
                raise ValueError(
                    f"{name} has shape {array.shape}, expected {shape} for {task.global_names}, "
                    f"{task.local_names} and {task.units} units"
                )
