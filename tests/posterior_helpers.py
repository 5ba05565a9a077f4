"""What tests of posteriors share: fits of models of the table, and moments against those of draws."""

from __future__ import annotations

import torch
from fit_models import guide_for
from unit_models import UNIT_MODELS

from laplace_amort import FixedDrawELBO, MarginalLaplace, fit

# Standard errors within which averages of draws are compared.
LIMIT = 5.9


def posterior_of(model, *args, objective=MarginalLaplace(), **kwargs):  # noqa: B008 (never changes)
    return fit(model, guide_for(model), *args, objective=objective, **kwargs).posterior


def fitted(name, seed=0):
    """By the marginal density, and models that it refuses by the ELBO."""
    case = UNIT_MODELS[name]()
    guide = guide_for(case.model, unit_plate=case.unit_plate)
    parameters = guide.unit_model(*case.args, **case.kwargs).density.parameters()
    objective = FixedDrawELBO(accuracy=1.0) if parameters else MarginalLaplace()
    return fit(case.model, guide, *case.args, objective=objective, seed=seed, **case.kwargs)


def assert_moments_of_draws(posterior, draws):
    """Means and variances agree with those of draws, but for a hundredth where points stand for an integral."""
    mean, std = posterior.mean(), posterior.std()
    for name, values in draws.items():
        off = values - mean[name]
        for terms, unit in ((off, std[name]), (off**2 - std[name] ** 2, std[name] ** 2)):
            error = LIMIT * terms.std(0) / len(terms) ** 0.5 + 0.01 * unit + 1e-12
            assert (terms.mean(0).abs() <= error).all(), name


def joined(values):
    """All values of the hierarchies of counts in one vector."""
    return torch.cat([values["mu"].reshape(1), values["tau"].reshape(1), values["y"]])
