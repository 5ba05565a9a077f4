"""The tables that are printed of a fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from laplace_amort.family import LaplaceGaussian
from laplace_amort.fit_status import FitStatus

__all__ = ["globals_table", "summary_lines"]

_PROBABILITIES = (0.05, 0.5, 0.95)
_DRAWS = 2000  # for moments in constrained space


def globals_table(gaussian: LaplaceGaussian) -> str:
    """Return a table of every element of the global sites in constrained space.

    :param LaplaceGaussian gaussian: the posterior.
    :return: mean, standard deviation and quantiles, from quasi-random draws of the globals: right to two digits or
        three, and for supports of any kind.
    """
    draws = _constrained_draws(gaussian)
    if not draws:
        return "there are no globals"
    rows = []
    for name, values in draws.items():
        quantiles = torch.quantile(values, values.new_tensor(_PROBABILITIES), dim=0)
        for index in range(values.shape[1]):
            label = name if values.shape[1] == 1 else f"{name}[{index}]"
            column = values[:, index]
            rows.append([label, float(column.mean()), float(column.std()), *(float(q) for q in quantiles[:, index])])
    headers = ["global", "mean", "sd", *(f"{100 * p:g} %" for p in _PROBABILITIES)]
    return tabulate(rows, headers, floatfmt=".4g")


def _constrained_draws(gaussian: LaplaceGaussian) -> dict[str, Tensor]:
    """Flattened values ``(S, n)`` of each global site."""
    d = len(gaussian.global_loc)
    if d == 0:
        return {}
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=0)
    uniform = engine.draw(_DRAWS, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    deviation = torch.special.ndtri(uniform).to(gaussian.global_loc) @ gaussian.precision.global_scale_tril.mT
    values = gaussian.constrained_globals(gaussian.global_loc + deviation)
    return {name: value.reshape(len(value), -1) for name, value in values.items()}


def summary_lines(result: Any) -> list[str]:
    """Return what is to be said of a fit before any table.

    :param FitResult result: the fit.
    """
    value = f"objective {result.objective:.6g}"
    if result.standard_error:
        value += f" ± {result.standard_error:.2g}"
    draws = f", {result.num_draws} draws" if result.num_draws else ""
    gradient = f"gradient {result.gradient_norm:.2g} posterior sd" if math.isfinite(result.gradient_norm) else ""
    evaluations = f"{len(result.history)} evaluations{draws}, {result.seconds:.3g} s"
    lines = [
        f"{result.status.name}: {result.status}",
        "; ".join(part for part in (value, gradient, evaluations) if part),
    ]
    for what, report in (("globals", result.head_report), ("units", result.tail_report)):
        if report is not None and report.num_repaired:
            lines.append(f"the precision of the {what} is not that of a maximum: {report}")
            if what == "globals" and result.num_draws and result.status is FitStatus.CONVERGED:
                lines[-1] += "; do not rely on the scales, integrate over the units:\n"
                lines[-1] += "    fit(model, guide, *args, objective=Ladder())"
    if len(result.optima) > 1:
        found = ", ".join(f"{optimum.objective:.6g} ({optimum.num_starts} starts)" for optimum in result.optima)
        lines.append(f"{len(result.optima)} optima were found: {found}")
    return lines + list(result.notes)
