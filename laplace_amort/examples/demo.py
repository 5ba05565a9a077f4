"""Fit real data twice, as the family and as the best posterior there is, and hold both against a long run of NUTS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
from torch import Tensor

from laplace_amort import AutoLaplaceFamily, FitResult, FitStatus, FixedDrawELBO, Ladder, fit, plots
from laplace_amort.examples.catalogue import EXAMPLES
from laplace_amort.examples.settings import own_settings
from laplace_amort.examples.yardstick import Moments, Yardstick

__all__ = ["EXAMPLES", "OBJECTIVES", "DemoResult", "run"]

OBJECTIVES: dict[str, Any] = {"family": FixedDrawELBO(), "ladder": Ladder()}


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
        evidence = [self._evidence(label, fit) for label, fit in self.fits.items()]
        words = [self._words(label, fit) for label, fit in self.fits.items()]
        return self.yardstick.report(self.moments, evidence, words)

    def _words(self, label: str, fit: FitResult) -> list[str]:
        name = f"{label}, {type(OBJECTIVES[label]).__name__}():"
        return [name, *fit.headline().splitlines(), *self.yardstick.verdict(self.moments[label])]

    def _evidence(self, label: str, fit: FitResult) -> dict[str, str]:
        is_bound = bool(fit.standard_error)  # the ELBO, on draws; and not an integral
        value = fit.objective if is_bound else fit.posterior.log_evidence
        shown = f"ELBO {value:.3f} ± {fit.standard_error:.3f}" if is_bound else f"{value:.3f}"
        below = f"{self.yardstick.reference.log_evidence - value:.3f}"
        return {"posterior": label, "log evidence": shown, "NUTS - log evidence": below}

    def figures(self) -> dict[str, Any]:
        """Draw the globals of each fit, and the units of the last, which is the best.

        :return: figures, by what is added to the name of a file: nothing for the globals of the best.
        :raises ImportError: if matplotlib is not installed.
        """
        if not self.fits:
            return {}
        reference, (*others, (_, best)) = self.yardstick.reference, self.fits.items()
        found = {"": plots.marginals_figure(best, reference=reference)}
        found |= {f"_{label}": plots.marginals_figure(fit, reference=reference) for label, fit in others}
        for site, estimates in self.yardstick.example.raw_estimates(self.args, reference).items():
            found[f"_{site}"] = plots.units_figure(best, site, reference=reference, raw_estimates=estimates)
        return found


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
        model, args = yardstick.example.module.model, yardstick.example.module.data()
        found = DemoResult(yardstick, args, fits, moments)
        try:
            for label, objective in OBJECTIVES.items():
                with pyro.get_param_store().scope():
                    guide = AutoLaplaceFamily(model, yardstick.example.mode)
                    result = fit(model, *args, guide=guide, objective=objective, seed=seed, progress=progress)
                if result.status is FitStatus.INTERRUPTED:
                    raise KeyboardInterrupt
                mean, std = result.posterior.mean(), result.posterior.std()
                moments[label] = {site: (mean[site], std[site]) for site in mean}
                fits[label] = result
        except KeyboardInterrupt:  # in a fit, between evaluations, or in a posterior
            return dataclasses.replace(found, interrupted=True)
    return found
