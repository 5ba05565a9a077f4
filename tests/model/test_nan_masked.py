"""The densities that leave out what is NaN, against Pyro's and against what is left by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from laplace_amort.autodiff import record
from laplace_amort.model.densities import smooth

NAN = torch.nan
SCALARS = torch.tensor([0.5, NAN, -1.0, NAN], dtype=torch.float64)
VECTORS = torch.tensor(
    [[0.1, 0.2, 3.4], [0.5, 0.1, NAN], [NAN, 0.5, NAN], [NAN, NAN, NAN], [NAN, 1.0, 2.0]], dtype=torch.float64
)


def normal(parameters):
    return dist.NanMaskedNormal(parameters[:4], parameters[4:5].exp())


def multivariate(parameters):
    factor = torch.eye(3) + torch.diag(parameters[:2], -1)
    return dist.NanMaskedMultivariateNormal(parameters[:3] * torch.ones(5, 1), factor @ factor.mT)


CASES = {
    "normal": (normal, SCALARS, torch.linspace(-1.0, 1.0, 5)),
    "in an event": (lambda p: normal(p).to_event(1), SCALARS, torch.linspace(-1.0, 1.0, 5)),
    "multivariate normal": (multivariate, VECTORS, torch.tensor([0.3, -0.5, 0.8])),
    "nothing missing": (multivariate, VECTORS.nan_to_num(0.7), torch.tensor([0.3, -0.5, 0.8])),
    "nothing there": (normal, torch.full((4,), NAN), torch.linspace(-1.0, 1.0, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_pyro(name):
    make, value, at = CASES[name]

    def pyros(parameters):
        return make(parameters).log_prob(value).sum()

    def ours(parameters):
        return smooth(make(parameters)).log_prob(value).sum()

    torch.testing.assert_close(smooth(make(at)).log_prob(value), make(at).log_prob(value))
    if name != "nothing there":  # Pyro's has no graph then
        for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
            torch.testing.assert_close(derivative(ours, at), derivative(pyros, at))


@pytest.mark.parametrize("name", CASES)
def test_they_are_recorded_and_mapped(name):
    make, value, at = CASES[name]

    def density(parameters, shift):
        return smooth(make(parameters + shift)).log_prob(value).sum()

    shift = torch.tensor([0.3])
    with pyro.validation_enabled(False):
        torch.testing.assert_close(record(density, at, torch.zeros(1))(at, shift), density(at, shift))
        mapped = torch.func.vmap(density, in_dims=(None, 0))(at, torch.stack([0 * shift, shift]))
    torch.testing.assert_close(mapped, torch.stack([density(at, 0 * shift), density(at, shift)]))


def test_what_is_left_by_hand():
    covariance = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.5]])
    fn = dist.NanMaskedMultivariateNormal(torch.zeros(3), covariance)
    value = torch.tensor([0.4, NAN, -1.0])
    left = dist.MultivariateNormal(torch.zeros(2), covariance[[0, 2]][:, [0, 2]])
    torch.testing.assert_close(smooth(fn).log_prob(value), left.log_prob(value[[0, 2]]))
