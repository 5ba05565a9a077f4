"""Options A, B and C, and an oracle in plain torch.func, agree on the gradient of the ELBO."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import Figures
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints

from laplace_amort import LogJoint, PathError, dual_path_param, observed_information
from laplace_amort.guide.routes import ExplicitGradient, ExtraLoss

figures = Figures()

COUNTS = torch.tensor([1.0, 4.0, 0.0, 2.0, 7.0], dtype=torch.float64)
START = [0.4, -0.3]


def model(z, batch_size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    log_tau = pyro.sample("log_tau", dist.Normal(0.0, 0.7))
    with pyro.plate("units", len(z), subsample_size=batch_size) as index:
        y = pyro.sample("y", dist.Normal(mu, log_tau.exp()))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z[index])


def mode(theta, z):
    """A smooth function in the place of the conditional mode; the gradients do not care that it is not one."""
    return 0.6 * theta[0] + 0.3 * torch.log1p(z) * theta[1].exp()


def curvature_and_mean(theta, z, index, path):
    """What a guide needs: theta for the Hessian and the mean, and the mode, from one of the routes."""
    if path is None:
        dual = dual_path_param("theta", theta)
        return dual.curvature, dual.mean, mode(dual.mean, z[index])
    value = pyro.param("theta", theta)
    return value, value, mode(path.hide(value), z[index])


def make_guide(path=None, start=START, draws=None):
    """A guide by option C (no path), or by option A or B; appends its draws to a list."""

    def guide(z, batch_size=None):
        plate = pyro.plate("units", len(z), subsample_size=batch_size, dim=-1)
        log_joint = LogJoint(model, z, batch_size).with_indices(units=plate.indices)
        curvature, mean, y_hat = curvature_and_mean(torch.tensor(start), z, plate.indices, path)
        information = observed_information(log_joint, curvature, y_hat)
        # Scaled blocks G, wC, wU give S and W as they are; only U must be divided by w (design of subsampled plates).
        weight = len(z) / len(plate.indices)
        head, border, tail = information[:2, :2], information[2:, :2], information[2:, 2:]
        regression = torch.linalg.solve(tail, border)
        schur_complement = head - border.T @ regression
        theta = pyro.sample(
            "globals", dist.MultivariateNormal(mean, precision_matrix=schur_complement), infer={"is_auxiliary": True}
        )
        pyro.sample("mu", dist.Delta(theta[..., 0]))
        pyro.sample("log_tau", dist.Delta(theta[..., 1]))
        with plate:
            # Particle plates put a dimension of size 1 where the units are: (P, 1) against (N,), element by element.
            loc = y_hat - sum((theta - mean)[..., k] * regression[:, k] for k in range(2))
            y = pyro.sample("y", dist.Normal(loc, (tail.diagonal() / weight).rsqrt()))
        if draws is not None:
            draws.append((plate.indices, theta.detach(), y.detach()))

    return guide


def globals_prior(theta):
    mu, log_tau = theta
    return -0.5 * mu**2 - 0.5 * (log_tau / 0.7) ** 2


def units_prior(theta, y):
    mu, log_tau = theta
    return (-0.5 * ((y - mu) / log_tau.exp()) ** 2 - log_tau).sum()


def likelihood(y, z):
    return (z * y - y.exp()).sum()


def oracle_gaussian(theta, z, weight):
    """Mode, regression, Schur complement and unit precisions, from torch.func.hessian of two arguments."""

    def log_joint(theta, y):
        return globals_prior(theta) + weight * (units_prior(theta, y) + likelihood(y, z))

    y_hat = mode(theta, z)
    (head, _), (border, tail) = torch.func.hessian(log_joint, argnums=(0, 1))(theta, y_hat)
    regression = torch.linalg.solve(tail, border)
    return y_hat, regression, -head + border.T @ regression, -tail.diagonal() / weight


def oracle_gradient(theta, draws, z, analytic_kl=False):
    """The ELBO gradient from torch.func alone, constants left out; ``draws`` are those that the guide made.

    With ``analytic_kl`` the units enter by their Kullback-Leibler divergence, as in TraceMeanField_ELBO.
    """

    def cholesky_of_covariance(schur_complement):
        return torch.linalg.cholesky(torch.linalg.inv(schur_complement))

    def elbo(value):
        total = 0.0
        for index, theta_draw, y_draw in draws:
            batch, weight = z[index], len(z) / len(index)
            # The noise behind the draw, at the fixed parameters ...
            y_hat, regression, schur, precision = oracle_gaussian(theta, batch, weight)
            noise = torch.linalg.inv(cholesky_of_covariance(schur)) @ (theta_draw - theta)
            y_noise = (y_draw - y_hat + regression @ (theta_draw - theta)) * precision.sqrt()
            noise, y_noise = noise.detach(), y_noise.detach()
            # ... and the draw as a function of the parameters.
            y_hat, regression, schur, precision = oracle_gaussian(value, batch, weight)
            shift = cholesky_of_covariance(schur) @ noise
            loc = y_hat - regression @ shift
            y, globals_ = loc + y_noise / precision.sqrt(), value + shift
            if analytic_kl:
                units = units_prior(globals_, loc) - (0.5 / precision / (2 * globals_[1]).exp()).sum()
            else:
                units = units_prior(globals_, y)
            units = units + likelihood(y, batch) - 0.5 * precision.log().sum()
            total = total + globals_prior(globals_) + weight * units - 0.5 * torch.linalg.slogdet(schur)[1]
        return total / len(draws)

    return -torch.func.grad(elbo)(theta)


def split_particles(draws):
    """One entry per particle, from a looped or a vectorized run."""
    for index, theta, y in draws:
        flat = theta.reshape(-1, 2)
        for theta_row, y_row in zip(flat, y.reshape(len(flat), -1), strict=True):
            yield index, theta_row, y_row


ELBOS = {
    "Trace_ELBO": lambda: Trace_ELBO(),
    "Trace_ELBO, 5 looped": lambda: Trace_ELBO(num_particles=5),
    "Trace_ELBO, 5 vectorized": lambda: Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(),
    "TraceGraph_ELBO, 5 looped": lambda: TraceGraph_ELBO(num_particles=5),
    "TraceGraph_ELBO, 5 vectorized": lambda: TraceGraph_ELBO(
        num_particles=5, vectorize_particles=True, max_plate_nesting=1
    ),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "TraceMeanField_ELBO, 5 looped": lambda: TraceMeanField_ELBO(num_particles=5),
    "TraceMeanField_ELBO, 5 vectorized": lambda: TraceMeanField_ELBO(
        num_particles=5, vectorize_particles=True, max_plate_nesting=1
    ),
}
ROUTES = {"A": ExplicitGradient, "B": ExtraLoss, "C": None}
SCALE = 0.25


def run_route(route, make_elbo, scaled, batch_size, guide_factory=make_guide):
    """Gradient in .grad after loss_and_grads, and the draws it was made from."""
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    elbo, draws = make_elbo(), []
    path = None if ROUTES[route] is None else ROUTES[route](elbo)
    guide = guide_factory(path, draws=draws)
    wrap = (lambda fn: poutine.scale(fn, scale=SCALE)) if scaled else (lambda fn: fn)
    (path or elbo).loss_and_grads(wrap(model), wrap(guide), COUNTS, batch_size)
    return pyro.param("theta").unconstrained().grad.clone(), list(split_particles(draws))


@pytest.mark.parametrize("batch_size", [None, 2], ids=["full", "subsampled"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "poutine.scale"])
@pytest.mark.parametrize("elbo", ELBOS)
def test_routes_and_oracle_agree(elbo, scaled, batch_size):
    """A, B, C and the oracle, within 1e-10 of each other."""
    gradients = {}
    for route in ROUTES:
        gradients[route], draws = run_route(route, ELBOS[elbo], scaled, batch_size)
    assert len(draws) == (5 if "5" in elbo else 1)
    expected = oracle_gradient(torch.tensor(START), draws, COUNTS, analytic_kl="MeanField" in elbo)
    expected = expected * (SCALE if scaled else 1.0)
    for route, gradient in gradients.items():
        error = float((gradient - expected).abs().max() / expected.abs().max())
        assert figures.add(f"route {route}: oracle", error) < 1e-10, (route, gradient, expected)


def test_the_comparison_notices_a_hidden_dependence():
    """Planted mistake: hide the dependence and bring nothing back."""

    class Forgetful(ExplicitGradient):
        def _restore(self, value, missing):
            pass

    draws = []
    guide = make_guide(Forgetful(Trace_ELBO()), draws=draws)
    Trace_ELBO().loss_and_grads(model, guide, COUNTS)
    expected = oracle_gradient(torch.tensor(START), list(split_particles(draws)), COUNTS)
    assert (pyro.param("theta").grad - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("route", ["A", "B"])
def test_svi_unpatched_follows_the_same_path_as_dual_path(route):
    """Ten steps of plain SVI with the route in the place of the ELBO end where option C ends."""

    def fit(route):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        path = None if ROUTES[route] is None else ROUTES[route](Trace_ELBO())
        svi = SVI(model, make_guide(path), pyro.optim.Adam({"lr": 0.05}), loss=path or Trace_ELBO())
        losses = [svi.step(COUNTS) for _ in range(10)]
        return pyro.param("theta").detach().clone(), losses, svi.evaluate_loss(COUNTS) if path is None else None

    reference, reference_losses, _ = fit("C")
    found, losses, _ = fit(route)
    assert torch.allclose(found, reference, rtol=1e-9)
    assert losses == pytest.approx(reference_losses, rel=1e-9)
    assert not torch.allclose(found, torch.tensor(START), rtol=1e-3)


@pytest.mark.parametrize("route", [ExplicitGradient, ExtraLoss])
def test_routes_pull_back_through_a_constraint(route):
    """A positive parameter: the missing gradient arrives at the unconstrained leaf."""
    path = route(Trace_ELBO())

    def guide():
        sigma = pyro.param("sigma", torch.tensor([2.0, 3.0]), constraint=constraints.positive)
        pyro.factor("minus_loss", (sigma**2 * path.hide(sigma) ** 3).sum(), has_rsample=True)

    path.loss_and_grads(lambda: None, guide)
    sigma = torch.tensor([2.0, 3.0])
    expected = 5 * sigma**4 * sigma  # d/ds s**5, times ds/du = s
    assert torch.allclose(pyro.param("sigma").unconstrained().grad, expected, rtol=1e-12)


@pytest.mark.parametrize("route", [ExplicitGradient, ExtraLoss])
def test_routes_pull_back_through_a_subsampled_parameter(route):
    """Pyro hands on the rows of the minibatch; their gradient arrives in the rows of the whole parameter."""
    path = route(Trace_ELBO())
    index = torch.tensor([2, 0])

    def guide():
        with pyro.plate("units", 3, subsample=index):
            rows = pyro.param("rows", torch.tensor([1.0, 2.0, 3.0]), event_dim=0)
            pyro.factor("minus_loss", path.hide(rows) ** 2, has_rsample=True)

    path.loss_and_grads(lambda: pyro.plate("units", 3, subsample=index), guide)
    assert torch.allclose(pyro.param("rows").grad, 1.5 * torch.tensor([2.0, 0.0, 6.0]))


@pytest.mark.parametrize("route", [ExplicitGradient, ExtraLoss])
def test_a_hidden_value_that_nothing_uses_adds_nothing(route):
    """Its leaf has no gradient; the parameter gets the one it has from elsewhere, or none."""
    path = route(Trace_ELBO())

    def guide(use):
        theta = pyro.param("theta", torch.tensor(2.0))
        path.hide(theta)
        pyro.factor("minus_loss", theta**2 if use else torch.tensor(0.0), has_rsample=True)

    path.loss_and_grads(lambda use: None, guide, True)
    assert pyro.param("theta").grad == 4.0


def test_a_route_adds_to_a_gradient_that_is_there_or_makes_one():
    """The parameter may be reached through the hidden value alone."""
    for route in (ExplicitGradient, ExtraLoss):
        pyro.clear_param_store()
        path = route(Trace_ELBO())

        def guide(path=path):
            hidden = path.hide(pyro.param("theta", torch.tensor(2.0)))
            pyro.factor("minus_loss", hidden**3, has_rsample=True)

        for expected in (12.0, 24.0):  # without zeroing, gradients accumulate as they do in torch
            path.loss_and_grads(lambda: None, guide)
            assert pyro.param("theta").grad == expected


def test_the_loss_of_a_route_is_that_of_its_elbo():
    """evaluate_loss runs under no_grad; hide() then only passes the value on."""
    path = ExplicitGradient(Trace_ELBO())
    guide = make_guide(path)
    pyro.set_rng_seed(1)
    with torch.no_grad():
        found = path.loss(model, guide, COUNTS)
    pyro.set_rng_seed(1)
    assert found == pytest.approx(Trace_ELBO().loss(model, make_guide(), COUNTS), rel=1e-12)
    assert torch.isfinite(torch.tensor(found))


def test_the_wrapped_elbo_is_not_changed():
    """The route sets retain_graph on a copy."""
    elbo = Trace_ELBO()
    path = ExtraLoss(elbo)
    assert elbo.retain_graph is None
    assert path.num_particles == 1
    model_trace, guide_trace = path._get_trace(model, make_guide(), (COUNTS,), {})
    assert "y" in model_trace.nodes
    assert "y" in guide_trace.nodes


def test_errors():
    """What cannot be wrapped or hidden is refused by name."""
    with pytest.raises(TypeError, match=r"one of Pyro's ELBO objects, such as Trace_ELBO\(\)"):
        ExplicitGradient(Trace_ELBO)
    path = ExtraLoss(Trace_ELBO())
    theta = pyro.param("theta", torch.tensor(2.0))
    with pytest.raises(PathError, match="Hide first, compute then"):
        path.hide(theta * 2)
    with pytest.raises(PathError, match="value of a parameter"):
        path.hide(torch.tensor(1.0))
