"""Fit real data twice, as the family and as the best posterior there is, and hold both against a long run of NUTS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
from tabulate import tabulate
from torch import Tensor

from laplace_amort import AutoLaplaceFamily, FitResult, FitStatus, FixedDrawELBO, Ladder, fit
from laplace_amort.examples.catalogue import EXAMPLES, Example
from laplace_amort.examples.settings import own_settings
from laplace_amort.examples.yardstick import Moments, Yardstick

__all__ = ["EXAMPLES", "OBJECTIVES", "DemoResult", "run"]

OBJECTIVES: dict[str, Any] = {"family": FixedDrawELBO(), "ladder": Ladder()}
_AVERAGED = 1024  # draws of the globals that moments of the units are averages over


@dataclass(frozen=True)
class DemoResult:
    """What :func:`run` found; ``print(result)`` shows it beside the reference posterior.

    :param Yardstick yardstick: the example and its reference posterior.
    :param tuple args: arguments of the model.
    :param dict fits: those that were done, by their names in ``OBJECTIVES``.
    :param dict moments: of their posteriors.
    :param bool interrupted: whether the user stopped it.
    """

    yardstick: Yardstick
    args: tuple[Tensor, ...]
    fits: Mapping[str, FitResult]
    moments: Mapping[str, Moments]
    interrupted: bool = False

    def __str__(self) -> str:
        if not self.fits:
            return f"{self.yardstick.title}\n\nnothing was fitted"
        sections = [self.yardstick.title, self.yardstick.table(self.moments), self._evidence_table()]
        for label, result in self.fits.items():
            lines = [f"{label}, {type(OBJECTIVES[label]).__name__}():", *result.headline().splitlines()]
            sections.append("\n  ".join([*lines, *self.yardstick.verdict(self.moments[label])]))
        return "\n\n".join(sections)

    def _evidence_table(self) -> str:
        evidence = self.yardstick.reference.log_evidence
        rows = []
        for label, result in self.fits.items():
            is_bound = bool(result.standard_error)  # the ELBO, on draws; and not an integral
            value = result.objective if is_bound else result.posterior.log_evidence
            shown = f"ELBO {value:.3f} ± {result.standard_error:.3f}" if is_bound else f"{value:.3f}"
            rows.append([label, shown, f"{evidence - value:.3f}"])
        headers = ["posterior", "log evidence", "NUTS - log evidence"]
        table = tabulate(rows, headers, colalign=("left", "right", "right"), disable_numparse=True)
        return f"{table}\n{self.yardstick.evidence}"


def run(name: str = "multisite", *, seed: int = 0, progress: bool = True) -> DemoResult:
    """Fit one example by the family as it is defined, and climb from it to the best posterior.

    The fits run in float64 with a parameter store and a random state of their own, and leave the caller's alone. An
    interrupt from the keyboard ends the fit in progress, which is dropped, and returns what was found before.

    :param str name: one of ``EXAMPLES``.
    :param int seed: of the draws.
    :param bool progress: whether to show progress bars, on stderr; they are silent where that is no terminal.
    :return: :class:`DemoResult`.
    :raises ValueError: if there is no such example.
    """
    fits: dict[str, FitResult] = {}
    moments: dict[str, Moments] = {}
    with own_settings():
        yardstick = Yardstick.of(name)
        args = yardstick.example.module.data()
        found = DemoResult(yardstick, args, fits, moments)
        try:
            for label, objective in OBJECTIVES.items():
                result = _fit(yardstick.example, args, objective, seed, progress)
                if result.status is FitStatus.INTERRUPTED:
                    return dataclasses.replace(found, interrupted=True)
                moments[label] = _moments(result)
                fits[label] = result
        except KeyboardInterrupt:  # between evaluations, or in a posterior
            return dataclasses.replace(found, interrupted=True)
    return found


def _fit(example: Example, args: tuple[Tensor, ...], objective: Any, seed: int, progress: bool) -> FitResult:
    model = example.module.model
    with pyro.get_param_store().scope():
        guide = AutoLaplaceFamily(model, example.mode)
        return fit(model, guide, *args, objective=objective, seed=seed, progress=progress)


def _moments(result: FitResult) -> Moments:
    posterior = result.posterior.thinned(_AVERAGED)
    mean, std = posterior.mean(), posterior.std()
    return {name: (mean[name], std[name]) for name in mean}
