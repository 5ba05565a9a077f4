"""Fits that the tests of figures draw, each made once."""

from __future__ import annotations

import functools

import torch

from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts
from helpers.unit_models import UNIT_MODELS
from laplace_amort import FixedDrawELBO, MarginalLaplace, fit

OBJECTIVES = {"elbo": FixedDrawELBO(), "marginal": MarginalLaplace()}
Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)


@functools.cache
def gaussian_fit(objective="marginal"):
    """Normal throughout; one global."""
    return fit(gaussian, guide_for(gaussian), Z, objective=OBJECTIVES[objective])


@functools.cache
def counts_fit(num_units=40):
    """Two globals, one of them positive."""
    return fit(poisson, guide_for(poisson), poisson_counts(num_units), objective=MarginalLaplace())


@functools.cache
def table_fit(name):
    """One of the table of models."""
    case = UNIT_MODELS[name]()
    guide = guide_for(case.model, unit_plate=case.unit_plate)
    return fit(case.model, guide, *case.args, objective=MarginalLaplace(), **case.kwargs)
