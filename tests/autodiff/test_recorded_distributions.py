"""Second and third derivatives through every common Pyro distribution, and refusal of what torch cannot do."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.distributions import ROWS
from helpers.oracles import relative_error, slope

from laplace_amort import InformationError, observed_information

EXACT = 1e-9  # against torch.func
DIFFERENCE = 1e-6  # against finite differences


def errors_of(log_joint, point, functorch=True):
    """Compare the information, and the gradient of a random functional of it, with two other routes."""
    direction, weight = torch.randn(point.shape), torch.randn(point.shape * 2)

    def gradient(v):
        v = v.detach().requires_grad_()
        return torch.autograd.grad(log_joint(v), v)[0]

    def functional(v):
        return (weight * observed_information(log_joint, v)).sum() + 0 * v.sum()  # a constant has no graph

    def oracle(v):
        return -(weight * torch.func.hessian(log_joint)(v)).sum()

    information, leaf = observed_information(log_joint, point), point.clone().requires_grad_()
    (third,) = torch.autograd.grad(functional(leaf), leaf)
    errors = {
        "second": relative_error(information @ direction, -slope(gradient, point, direction)) / DIFFERENCE,
        "third": relative_error(third @ direction, slope(functional, point, direction)) / DIFFERENCE,
    }
    if functorch:
        with pyro.validation_enabled(False):  # looking at values is what torch.func cannot do
            errors["second, torch.func"] = relative_error(information, -torch.func.hessian(log_joint)(point)) / EXACT
            errors["third, torch.func"] = relative_error(third, torch.func.grad(oracle)(point)) / EXACT
    return {name: error for name, error in errors.items() if not error < 1}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_information_and_its_derivative(case):
    points = case.unconstrained()

    def log_joint(v):
        pieces = v.split([point.numel() for point in points])
        return case.log_joint(*[piece.reshape(point.shape) for piece, point in zip(pieces, points, strict=True)])

    assert errors_of(log_joint, torch.cat([point.reshape(-1) for point in points]), case.functorch) == {}


def wrong_second(v):
    at = v.detach()
    return (at**4 + 4 * at**3 * (v - at)).sum()


def wrong_third(v):
    at = v.detach()
    return (at**4 + 4 * at**3 * (v - at) + 6 * at**2 * (v - at) ** 2).sum()


@pytest.mark.parametrize(("log_joint", "caught"), [(wrong_second, "second"), (wrong_third, "third")])
def test_comparison_catches_a_derivative_that_is_cut_off(log_joint, caught):
    # torch.func is cut off as well; finite differences of the lower derivative are not.
    errors = errors_of(log_joint, torch.tensor([0.7, -1.2]))
    assert caught in errors


def seeded_draw(make):
    """A log joint with a reparametrized draw inside, the same at every call."""

    def log_joint(alpha):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return make(alpha).rsample().log().sum()

    return log_joint


def censored(alpha):
    return torch.log1p(-dist.Gamma(alpha, 1.0).cdf(torch.tensor(0.7))).sum()


def censored_chi2(alpha):
    return torch.log1p(-dist.Chi2(alpha).cdf(torch.tensor(0.7))).sum()


def kernel(alpha):
    return -torch.cdist(alpha.unsqueeze(-1), torch.ones(2, 1)).square().exp().sum()


def scale_mixture(alpha):
    return dist.GaussianScaleMixture(torch.ones(2), torch.zeros(2), alpha).log_prob(torch.tensor([0.3, -0.6]))


REFUSED = {
    "draw from Gamma": ("second", seeded_draw(lambda alpha: dist.Gamma(alpha, 1.0))),
    "draw from Chi2": ("second", seeded_draw(dist.Chi2)),
    "draw from Beta": ("second", seeded_draw(lambda alpha: dist.Beta(alpha, 2.0))),
    "draw from Dirichlet": ("second", seeded_draw(dist.Dirichlet)),
    "draw in which log_joint is linear": ("second", lambda alpha: dist.Dirichlet(alpha).rsample()[0]),
    "Gamma.cdf (igamma)": ("first", censored),
    "Chi2.cdf (igamma)": ("first", censored_chi2),
    "zeta": ("first", lambda alpha: torch.special.zeta(alpha + 1, torch.tensor(2.0)).sum()),
    "cdist": ("second", kernel),
    "pdist": ("second", lambda alpha: -torch.pdist(alpha.unsqueeze(-1)).square().exp().sum()),
    "GaussianScaleMixture (writes in place)": ("first", scale_mixture),
}


@pytest.mark.parametrize(("order", "log_joint"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_torch_cannot_differentiate_and_names_the_argument(order, log_joint):
    def with_others(location, alpha):
        return log_joint(alpha) - (location**2).sum() * (alpha**2).sum()

    with pytest.raises(InformationError, match=f"{order} derivative of log_joint with respect to argument 'alpha'"):
        observed_information(with_others, torch.tensor([0.3]), torch.tensor([1.5, 2.5]))
