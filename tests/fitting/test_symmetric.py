"""A fit leaves the point that a density is symmetric about, always the same way."""

import pyro
import pytest
import torch
from helpers.symmetric import LOADING, MIXED, SCORES, factor, mixture

from laplace_amort import FitStatus, MarginalQuadrature, fit


def fitted(model, y, **options):
    pyro.clear_param_store()
    return fit(model, y, progress=False, check=False, **options)


def test_two_kinds_that_can_change_places():
    result = fitted(mixture, MIXED)
    assert result.status is FitStatus.CONVERGED
    center = result.optima[0].globals_["center"].sort().values
    torch.testing.assert_close(center, torch.tensor([-2.0, 2.0]), rtol=0, atol=0.2)


@pytest.mark.parametrize("objective", [None, MarginalQuadrature(start_with=None)], ids=["ladder", "at once"])
def test_loadings_whose_sign_is_free(objective):
    """Of the second, no second derivative leads away from the saddle: a start beside it does."""
    result = fitted(factor, SCORES, objective=objective)
    assert result.status is FitStatus.CONVERGED
    loading = result.optima[0].globals_["loading"]
    torch.testing.assert_close(loading * loading[0].sign(), LOADING, rtol=0, atol=0.25)
    again = fitted(factor, SCORES, objective=objective)
    assert torch.equal(again.guide.loc, result.guide.loc)
