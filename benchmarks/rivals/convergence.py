"""The convergence rule that every stochastic rival is held to.

*The limit* of a rival is the best ELBO that a search finds: learning rates that decay exponentially over the run, from
several initial values, over short, medium and long runs. *The time to the target* is the least training time, over all
runs of that search, until the first snapshot from which on the ELBO stays within 0.05 nat of the limit: what a user
would have spent who knew the best initial rate and the best length. Snapshots are taken at geometrically spaced steps.
Neither evaluations nor snapshots are in the time.

ELBOs of two snapshots are compared on the same random numbers, because their difference has far less noise than they.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from memory import Peak
from numpy.typing import NDArray

RATES = (0.3, 0.1, 0.03, 0.01)
DECAY = 1e-3  # last learning rate over first
RATIO = 1.15  # of the steps of one snapshot and the next
TOLERANCE = 0.05  # nats
LIMIT_SE = 0.02  # nats
DIFFERENCE_SE = 0.01  # nats
COMPARISON_SECONDS = 20.0  # for one comparison, that of a million units; others need far less
RUN_AWAY = 1e3  # how many times the typical term of an ELBO a term may be
BUDGET_VARIABLE = "RIVALS_BUDGET_SECONDS"  # how run.py tells its workers

NO_JOINT_MODE = (
    "no Laplace approximation: the Hessian where the joint density is largest (log density {:.6g}) is not positive "
    "definite; with a scale that goes to zero the joint density has no proper mode"
)

Params = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Setting:
    """An initial learning rate, and the number of steps over which it decays."""

    rate: float
    steps: int

    @property
    def factor(self) -> float:
        """What the learning rate is multiplied by in each step."""
        return DECAY ** (1 / self.steps)


class Trainer(Protocol):
    """What a rival must be able to do."""

    def start(self, setting: Setting) -> None:
        """Go back to the initial parameters, and take up a setting."""

    def advance(self, steps: int) -> None:
        """Train for some steps, and be done with them on return."""

    def params(self) -> Params:
        """Return a copy of the parameters."""

    def terms(self, params: Params, seed: int) -> NDArray[np.float64]:
        """Return draws of the ELBO's integrand; the same random numbers for the same seed."""


@dataclass(frozen=True)
class Budget:
    """What a search may spend.

    :param int steps: of the longest runs.
    :param float seconds: of training; the runs become shorter if one step takes too long for it.
    :param float evaluation_seconds: of drawing for the limit; its standard error stays larger if they are over.
    """

    steps: int
    seconds: float
    evaluation_seconds: float

    def horizons(self, step_seconds: float) -> tuple[int, int, int]:
        """Steps of the short, the medium and the long runs."""
        # Four short runs, four medium, two long, and the refinement: 4 / 16 + 4 / 4 + 2 + 2 (0.5 + 0.7) at the most.
        affordable = int(self.seconds / (5.65 * step_seconds))
        longest = max(min(self.steps, affordable), 64)
        return longest // 16, longest // 4, longest


def budget_for(units: int) -> Budget:
    """The budget at a size; the seconds are those of ``run.py --budget``."""
    seconds = float(os.environ.get(BUDGET_VARIABLE, "1800"))
    steps = 20_000 if units <= 1000 else 10_000 if units <= 10_000 else 4000
    return Budget(steps, seconds, evaluation_seconds=max(60.0, seconds / 10))


def particles_for(units: int) -> int:
    """Draws of the ELBO's gradient in a step: more cost next to nothing in small problems, and time in large ones."""
    return 8 if units <= 1000 else 4


@dataclass(frozen=True)
class Snapshot:
    """Parameters on disk, so that the memory of a run is that of its training."""

    path: Path
    steps: int
    seconds: float

    def load(self) -> Params:
        """Read the parameters."""
        with np.load(self.path) as file:
            return dict(file)


@dataclass
class Run:
    """One training run: its setting and its snapshots, in the order of time. Runs that diverge have no end."""

    setting: Setting
    snapshots: list[Snapshot] = field(default_factory=list)
    diverged: bool = False

    def end(self) -> Params:
        """The last parameters."""
        return self.snapshots[-1].load()

    @property
    def seconds(self) -> float:
        """Training time of the run."""
        return self.snapshots[-1].seconds if self.snapshots else 0.0


@dataclass(frozen=True)
class Convergence:
    """The outcome of a search."""

    limit: Params
    elbo: float
    elbo_se: float
    target: Snapshot
    setting: Setting
    search_seconds: float
    peak_mib: float | None
    remarks: list[str]

    def columns(self) -> dict[str, Any]:
        """The columns of the results that come from the search."""
        return {
            "fit_seconds": self.target.seconds,
            "steps": self.target.steps,
            "learning_rate": self.setting.rate,
            "horizon": self.setting.steps,
            "elbo": self.elbo,
            "elbo_se": self.elbo_se,
            "search_seconds": self.search_seconds,
            "peak_mib": self.peak_mib,
            "remark": "; ".join(self.remarks),
        }


def checkpoints(steps: int) -> list[int]:
    """Geometrically spaced steps, the last one included."""
    grid, step = [], 8.0
    while step < steps:
        grid.append(int(step))
        step *= RATIO
    return [*dict.fromkeys(grid), steps]


def train(trainer: Trainer, setting: Setting, folder: Path) -> Run:
    """Train with one setting, and leave the snapshots in the folder."""
    run = Run(setting)
    trainer.start(setting)
    done, seconds = 0, 0.0
    for step in checkpoints(setting.steps):
        start = time.perf_counter()
        trainer.advance(step - done)
        seconds += time.perf_counter() - start
        done = step
        params = trainer.params()
        if not all(np.isfinite(value).all() for value in params.values()):
            run.diverged = True
            return run
        path = folder / f"{setting.rate}-{setting.steps}-{step}.npz"
        np.savez(path, **params)  # type: ignore[arg-type]
        run.snapshots.append(Snapshot(path, step, seconds))
    # A guide that has run away has terms of any size, also positive ones: rounding errors of its own density.
    terms = trainer.terms(params, 0)
    run.diverged = not np.isfinite(terms).all() or bool(np.abs(terms).max() > RUN_AWAY * (1 + np.abs(np.median(terms))))
    return run


class Comparison:
    """ELBOs of parameters, less that of a reference, on the random numbers of the reference."""

    def __init__(self, trainer: Trainer, reference: Params) -> None:
        self.trainer, self.reference = trainer, reference
        self._terms: list[NDArray[np.float64]] = []

    def _reference_terms(self, seed: int) -> NDArray[np.float64]:
        if seed == len(self._terms):
            self._terms.append(self.trainer.terms(self.reference, seed))
        return self._terms[seed]

    def above(self, params: Params, threshold: float) -> bool:
        """Whether the ELBO is at least that of the reference plus a threshold."""
        return self.difference(params, threshold) >= threshold

    def difference(self, params: Params, threshold: float) -> float:
        """How far the ELBO is above that of the reference.

        It draws until four standard errors tell on which side of the threshold that is, the standard error is small, or
        the time is over.
        """
        terms: list[NDArray[np.float64]] = []
        start = time.perf_counter()
        while True:
            seed = len(terms)
            terms.append(self.trainer.terms(params, seed) - self._reference_terms(seed))
            mean, error = mean_and_error(terms)
            if not math.isfinite(mean):
                return -math.inf
            clear = abs(mean - threshold) > 4 * error or error < DIFFERENCE_SE
            if seed and (clear or time.perf_counter() - start > COMPARISON_SECONDS):
                return mean


def mean_and_error(terms: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Mean and standard error of draws in chunks."""
    draws = np.concatenate(terms)
    return float(draws.mean()), float(draws.std() / math.sqrt(max(len(draws) - 1, 1)))


def best(trainer: Trainer, runs: list[Run]) -> Run:
    """The run with the highest ELBO at its end, of those that did not diverge."""
    champion, *others = (run for run in runs if not run.diverged)
    comparison = Comparison(trainer, champion.end())
    for run in others:
        if comparison.above(run.end(), 0.0):
            champion, comparison = run, Comparison(trainer, run.end())
    return champion


def elbo(trainer: Trainer, params: Params, seconds: float) -> tuple[float, float]:
    """ELBO and standard error, from draws that no comparison has used."""
    start, seed = time.perf_counter(), 1_000_000
    terms: list[NDArray[np.float64]] = []
    while True:
        terms.append(trainer.terms(params, seed))
        seed += 1
        mean, error = mean_and_error(terms)
        if len(terms) > 1 and (error <= LIMIT_SE or time.perf_counter() - start > seconds):
            return mean, error


def first_within(run: Run, comparison: Comparison) -> Snapshot | None:
    """The first snapshot of a run from which on the ELBO stays within the tolerance of the reference."""
    first = None
    for snapshot in reversed(run.snapshots):
        if not comparison.above(snapshot.load(), -TOLERANCE):
            break
        first = snapshot
    return first


def step_seconds(trainer: Trainer) -> float:
    """Seconds of a step, after the first ones."""
    trainer.start(Setting(RATES[-1], 1000))
    trainer.advance(4)
    steps, start = 0, time.perf_counter()
    while steps < 64 and time.perf_counter() - start < 2:
        trainer.advance(4)
        steps += 4
    return (time.perf_counter() - start) / steps


class Search:
    """Runs with one trainer, and what comes out of them."""

    def __init__(self, trainer: Trainer, folder: Path, peak: Peak) -> None:
        self.trainer, self.folder, self.peak = trainer, folder, peak
        self.runs: list[Run] = []

    def train(self, rates: Iterable[float], steps: int) -> list[Run]:
        """Train with each rate, and return the runs that did not diverge."""
        self.peak.restart()  # evaluations came between, and have more draws at once than a step
        runs = [train(self.trainer, Setting(rate, steps), self.folder) for rate in rates]
        self.peak.growth()
        self.runs += runs
        return [run for run in runs if not run.diverged]

    def explore(self, horizons: tuple[int, int, int]) -> None:
        """All rates in short and medium runs, the two best in long ones.

        :raises RuntimeError: if every run diverges.
        """
        short, medium, long = horizons
        finished = self.train(RATES, short)
        finished = self.train(RATES, medium) or finished
        if not finished:
            raise RuntimeError(f"all {len(self.runs)} runs diverged: parameters became infinite or NaN")
        first = best(self.trainer, finished)
        others = [run for run in finished if run is not first]
        second = [best(self.trainer, others)] if others else []
        self.train([run.setting.rate for run in (first, *second)], long)

    def refine(self, setting: Setting) -> list[Run]:
        """Try shorter runs than the fastest so far, with its rate and the next larger one, which suits them better."""
        rates = RATES[max(RATES.index(setting.rate) - 1, 0) : RATES.index(setting.rate) + 1]
        return [run for share in (0.5, 0.7) for run in self.train(rates, int(share * setting.steps))]


def reached(runs: list[Run], comparison: Comparison) -> list[tuple[Snapshot, Setting]]:
    """The first snapshot that counts of each run that came within the tolerance."""
    found = ((first_within(run, comparison), run.setting) for run in runs if not run.diverged)
    return [(first, setting) for first, setting in found if first]


def _seconds(pair: tuple[Snapshot, Setting]) -> float:
    return pair[0].seconds


def search(trainer: Trainer, budget: Budget, peak: Peak) -> Convergence:
    """Find the limit and the time to the target; the peak of memory is that of the training.

    :raises RuntimeError: if every run diverges.
    """
    with tempfile.TemporaryDirectory() as name:
        peak.growth()
        tried = Search(trainer, Path(name), peak)
        horizons = budget.horizons(step_seconds(trainer))
        tried.explore(horizons)
        limit = best(trainer, tried.runs).end()
        comparison = Comparison(trainer, limit)
        found = reached(tried.runs, comparison)
        shorter = best(trainer, [run for run in tried.runs if run.setting.steps < horizons[-1]])
        gain = -comparison.difference(shorter.end(), -TOLERANCE)
        _, fastest = min(found, key=_seconds)
        found += reached(tried.refine(fastest), comparison)
        target, setting = min(found, key=_seconds)
    training_mib = peak.highest
    mean, error = elbo(trainer, limit, budget.evaluation_seconds)
    remarks = _remarks(tried.runs, horizons[-1], gain, error)
    search_seconds = sum(run.seconds for run in tried.runs)
    return Convergence(limit, mean, error, target, setting, search_seconds, training_mib, remarks)


def _remarks(runs: list[Run], longest: int, gain: float, error: float) -> list[str]:
    """What a reader of the limit has to know."""
    remarks = [f"longest runs {longest} steps"]
    if gain > TOLERANCE:
        remarks.append(f"cap hit: {gain:.2g} nats above runs a quarter as long, and it may rise with more steps")
    if error > LIMIT_SE:
        remarks.append(f"standard error above {LIMIT_SE}: the time for evaluation was over")
    diverged = [f"{run.setting.rate}/{run.setting.steps}" for run in runs if run.diverged]
    if diverged:
        remarks.append("diverged (rate/steps): " + ", ".join(diverged))
    return remarks
