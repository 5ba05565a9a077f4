"""What tests of diagnoses share: fits to look at, and a finding by its name."""

import torch

import laplace_amort
from helpers.fit_models import guide_for
from laplace_amort import MarginalQuadrature, diagnose, fit

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
NAMES = ["convergence", "repair, globals", "repair, units", "k-hat, globals", "error, globals", "error, units"]
NAMES += ["skewness, units", "k-hat, units", "second start", "simulated scores"]


def fitted(model, *args, objective=MarginalQuadrature(), **options):  # noqa: B008 (never changes)
    return fit(model, guide_for(model), *args, objective=objective, **options)


def diagnosed(model, *args, simulations=25, **options):
    return diagnose(fitted(model, *args, **options), simulations=simulations, progress=False)


def finding(diagnosis, name):
    (found,) = [found for found in diagnosis.findings if found.name == name]
    return found


def level(diagnosis, name):
    return finding(diagnosis, name).level


def followed(diagnosis, model, args):
    """What the line of advice returns."""
    public = {name: getattr(laplace_amort, name) for name in laplace_amort.__all__}
    return eval(diagnosis.advice, public | {"model": model, "args": args})
