"""Objectives at a point: against formulas written out densely, finite differences, Pyro's ELBO, and exact evidence."""

import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.dense_twin import DenseTwin, marginal_curvature
from helpers.models import conjugate_normal, normals
from helpers.oracles import Figures, relative_error, slope
from helpers.unit_models import UNIT_MODELS, UnitCase
from pyro.infer import Trace_ELBO

from laplace_amort import SoftAbs, observed_information
from laplace_amort.autodiff.batching import values_and_gradients
from laplace_amort.fitting.objectives import elbo as objectives_elbo
from laplace_amort.fitting.objectives.draws import Draws, antithetic_draws
from laplace_amort.fitting.objectives.elbo import ELBOFunction
from laplace_amort.fitting.objectives.laplace import LaplaceFunction
from laplace_amort.guide import problem as guide_problem
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.heads import MarginalCurvature
from laplace_amort.guide.problem import Problem
from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.linalg.boost import Boost
from laplace_amort.units.closed_form import ClosedFormMode
from laplace_amort.units.modes import FreeMode, NewtonMode

figures = Figures()
NEAR, FAR = 0.2, 1.5  # out there, the Schur complement is often indefinite
NUM_DRAWS = 4


def make_target(case, spread=NEAR, **options):
    """A problem whose guide stands at some distance from its start."""
    problem = Problem(AutoLaplaceFamily(case.model, **options), case.args, case.kwargs)
    problem.place(problem.loc + spread * normals(case.global_dim, seed=8))
    return problem


def make_elbo(case, num_draws=NUM_DRAWS, seed=1, **options):
    """Other parameters are not where they start either: at zero, the binomial density of torch has a kink.

    Derivatives of a mode err by what is tolerated of the mode, and where these are compared that is little.
    """
    problem = make_target(case, **{"mode": NewtonMode(tolerance=1e-12), **options})
    function = ELBOFunction(problem, num_draws, seed)
    rest = len(function.point()) - case.global_dim
    function.move(function.point() + 0.2 * torch.cat([torch.zeros(case.global_dim), normals(rest, seed=7)]).numpy())
    return function


def make_twin(case, problem):
    guide = problem.guide
    twin = DenseTwin(case, guide.loc, guide.tail_repair, guide.head_repair)
    if guide.head == MarginalCurvature():
        twin.head = marginal_curvature
    if isinstance(guide.mode, FreeMode):
        twin.mode = lambda theta: guide.mode.loc.reshape(-1)
    return twin


def dense_elbo(twin, problem, draws):
    """The value, written out: log joint at draws + e'e / 2 + D / 2 log 2 pi - 1/2 log|P|, its graph that of all."""
    mean, precision = twin.gaussian(problem.guide.loc)
    noise = torch.cat([draws.global_, draws.local.flatten(1)], dim=1)
    root = dist.MultivariateNormal(mean, precision_matrix=precision).scale_tril
    points = mean + noise @ root.mT
    log_joints = torch.stack([twin.density(point[: twin.global_dim], point[twin.global_dim :]) for point in points])
    log_det = torch.linalg.slogdet(precision).logabsdet
    entropy = (noise**2).sum(1) / 2 + len(mean) / 2 * math.log(2 * math.pi) - log_det / 2
    return (log_joints + entropy).mean()


def gradient_of(value, parameters):
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def split(vector, parameters):
    parts = torch.as_tensor(vector).split([p.numel() for p in parameters])
    return [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]


def elbo_errors(case, function):
    """Relative errors of the value, of the gradient of each parameter, and of its sum along a random direction."""
    found = function(function.point())
    value = dense_elbo(make_twin(case, function.problem), function.problem, function.draws)
    errors = {"value": relative_error(torch.tensor(found.value), value.detach())}
    pairs = zip(split(found.gradient, function.parameters), gradient_of(value, function.parameters), strict=True)
    for number, (actual, expected) in enumerate(pairs):
        errors[f"gradient {number}"] = relative_error(actual, expected)
    return {**errors, "finite difference": difference_error(function)}


def difference_error(function):
    """Of the slope along a random direction in all parameters, by finite differences of the value."""
    start = torch.tensor(function.point())
    if not len(start):
        return 0.0
    direction, gradient = normals(len(start), seed=9), torch.tensor(function(start.numpy()).gradient)
    expected = slope(lambda point: torch.tensor(function(point.numpy()).value), start, direction, step=0.02)
    return relative_error(direction @ gradient, expected)


def compare(case, function, label):
    for what, error in elbo_errors(case, function).items():
        limit = 1e-6 if what == "finite difference" else 1e-9
        assert figures.add(f"{what.split(' ')[0]}, {label}", error) < limit, what


# ---------------------------------------------------------------------------------- the ELBO on fixed draws, densely


HEADS = {"joint": {}, "marginal": {"head": MarginalCurvature()}}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", UNIT_MODELS)
def test_elbo_equals_its_formula(name, head):
    case = UNIT_MODELS[name]()
    compare(case, make_elbo(case, **HEADS[head]), f"{head} curvature")


def closed_form(globals_, z, errors=0.5):
    precision = 1 / globals_["tau"] ** 2
    return {"y": (globals_["mu"] * precision + z / errors**2) / (precision + 1 / errors**2)}


# Name of the model, and options; where a repair is at work, far out or with centers that are no modes.
OPTIONS = {
    "closed form": ("normal", {"mode": ClosedFormMode(closed_form)}),
    "closed form, marginal": ("normal", {"mode": ClosedFormMode(closed_form), "head": MarginalCurvature()}),
    "free": ("poisson_by_visit", {"mode": FreeMode()}),
    "free, two in a unit": ("binomial_slopes", {"mode": FreeMode()}),
    "free, repaired, parameters of the model": ("with_params", {"mode": FreeMode()}),
    "free, no globals": ("without_globals", {"mode": FreeMode()}),
    "free, repaired": ("student_t", {"mode": FreeMode(), "spread": FAR}),
    "repaired head": ("poisson_by_visit", {"spread": FAR}),
    "strongly repaired head": ("correlated", {"spread": FAR, "repair": SoftAbs(0.1)}),
    "boost": ("poisson_by_visit", {"repair": Boost(0.3)}),
    "boost, two in a unit": ("binomial_slopes", {"repair": Boost(0.3)}),
    "boost, repaired head": ("non_centered", {"repair": Boost(0.3), "spread": FAR}),
    "boost, free, repaired": ("student_t", {"repair": Boost(0.3), "mode": FreeMode(), "spread": FAR}),
    "boost, parameters of the model": ("with_params", {"repair": Boost(0.3)}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_elbo_of_every_parameter(option):
    name, options = OPTIONS[option]
    case, function = UNIT_MODELS[name](), make_elbo(UNIT_MODELS[name](), **options)
    compare(case, function, option.split(",")[0])
    assert (function.problem.gaussian().head_report.num_repaired > 0) == ("repaired" in option)
    params, boosts = 2 * ("parameters" in option), 2 * ("boost" in option)
    assert len(function.parameters) == 1 + ("free" in option) + params + boosts


@pytest.mark.parametrize("name", ["poisson_by_visit", "level_and_spread"])
def test_marginal_curvature_of_boosted_tails(name):
    """The twin knows no marginal curvature but that of tails as they are, so by finite differences alone."""
    function = make_elbo(UNIT_MODELS[name](), repair=Boost(0.3), head=MarginalCurvature())
    assert figures.add("finite, boost, marginal curvature", difference_error(function)) < 1e-6


# --------------------------------------------------------------------------------------- the marginal Laplace density


def dense_marginal(twin, theta):
    """The value, exact in theta to first order."""
    y = twin.mode(theta)
    tail = observed_information(lambda y: twin.density(theta, y), y)
    return twin.density(theta, y) - torch.linalg.slogdet(tail).logabsdet / 2 + len(y) / 2 * math.log(2 * math.pi)


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_marginal_equals_its_formula(name):
    case = UNIT_MODELS[name]()
    problem = make_target(case)
    function, twin = LaplaceFunction(problem), make_twin(case, problem)
    theta = problem.loc.clone().requires_grad_()
    found, value = function(function.point()), dense_marginal(twin, theta)
    errors = {"value": relative_error(torch.tensor(found.value), value.detach())}
    if case.global_dim:
        (gradient,), information = gradient_of(value, [theta]), marginal_curvature(twin, problem.loc, None)
        errors["gradient"] = relative_error(torch.tensor(found.gradient), gradient)
        errors["information"] = relative_error(torch.tensor(found.information), information.detach())
        assert figures.add("marginal: finite difference", difference_error(function)) < 1e-6
    assert found.information.shape == (case.global_dim, case.global_dim)
    for what, error in errors.items():
        assert figures.add(f"marginal: {what}", error) < 1e-8, what  # as its modes have half the usual digits


# ------------------------------------------------------------------------------------- exact evidence, and Pyro's ELBO

Z = [2.0, -0.5, 1.3]
PRECISION = 1 + 3 / 0.74  # of mu given z, and its mean
CENTER = sum(Z) / 0.74 / PRECISION


def conjugate():
    return UnitCase(conjugate_normal, (torch.tensor(Z),), 1, 3, 1, ("mu",))


def log_evidence():
    covariance = torch.ones(3, 3) + (0.49 + 0.25) * torch.eye(3)
    return float(dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(torch.tensor(Z)))


@pytest.mark.parametrize("offset", [0.0, 0.7, -20.0])
@pytest.mark.parametrize("head", HEADS)
def test_elbo_of_a_gaussian_model_is_exact(head, offset):
    """Its pairs of draws are all the same: the log evidence at the optimum, and the divergence less elsewhere."""
    function = make_elbo(conjugate(), num_draws=8, **HEADS[head])
    found = function(numpy.array([CENTER + offset]))
    assert found.value == pytest.approx(log_evidence() - PRECISION * offset**2 / 2, rel=1e-13)
    assert found.gradient == pytest.approx(-PRECISION * offset, abs=1e-12)
    assert found.standard_error < 1e-13 * (1 + abs(found.value))
    whitening = function.whitening()
    assert whitening.norm(found.gradient) == pytest.approx(PRECISION**0.5 * abs(offset), abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 0.7, -20.0])
@pytest.mark.parametrize("size", [3, 2, 1])
def test_marginal_of_a_gaussian_model_is_exact(offset, size):
    """Of a minibatch as well, whose units count as often as Pyro says."""

    def model(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z), subsample_size=size) as indices:
            y = pyro.sample("y", dist.Normal(mu, 0.7))
            pyro.sample("z", dist.Normal(y, 0.5), obs=z[indices])

    function = LaplaceFunction(make_target(UnitCase(model, (torch.tensor(Z),), 1, 3, 1)))
    theta, z = torch.tensor(CENTER + offset), torch.tensor(Z)[function.problem.unit_model.units]
    found = function(theta.reshape(1).numpy())
    assert len(z) == size
    units = dist.Normal(theta, 0.74**0.5).log_prob(z).sum() * 3 / size
    assert found.value == pytest.approx(float(dist.Normal(0.0, 1.0).log_prob(theta) + units), rel=1e-13)
    assert found.gradient == pytest.approx(float(-theta + 3 / size * (z - theta).sum() / 0.74), abs=1e-11)
    assert found.information == pytest.approx(PRECISION)


@pytest.mark.parametrize("mode", [None, FreeMode()])
def test_a_gaussian_model_without_globals(mode):
    def model(z):
        with pyro.plate("units", len(z)):
            pyro.sample("z", dist.Normal(pyro.sample("y", dist.Normal(0.3, 1.0)), 0.5), obs=z)

    z = torch.tensor(Z)
    problem = make_target(UnitCase(model, (z,), 0, 3, 1), **({} if mode is None else {"mode": mode}))
    expected = float(dist.Normal(0.3, 1.25**0.5).log_prob(z).sum())
    marginal, elbo = LaplaceFunction(problem), ELBOFunction(problem, 6, 0)
    found = marginal(marginal.point())
    assert (found.value, found.gradient.shape, found.information.shape) == (pytest.approx(expected), (0,), (0, 0))
    found = elbo(0.3 + 0.8 * (z - 0.3).numpy() if mode else numpy.zeros(0))
    assert (found.value, found.gradient.shape) == (pytest.approx(expected), (3 if mode else 0,))
    assert numpy.abs(found.gradient).max(initial=0.0) < 1e-12
    assert found.standard_error < 1e-13


@pytest.mark.parametrize(("name", "head"), [("level_and_spread", "joint"), ("with_params", "marginal")])
def test_mean_over_seeds_is_pyros_elbo(name, head):
    """Beyond 4.5 standard errors, of averages of 100 numbers each, in 1.8e-5 of all seeds (t); this one is fixed."""
    case, sample = UNIT_MODELS[name](), 100
    problem = make_target(case, **HEADS[head])
    ours = torch.stack([ELBOFunction(problem, 8, seed).values().mean() for seed in range(sample)])
    elbo = Trace_ELBO(num_particles=sample, vectorize_particles=True, max_plate_nesting=2)
    with torch.no_grad():
        losses = torch.tensor([elbo.loss(case.model, problem.guide, *case.args) for _ in range(sample)])
    error = math.hypot(float(ours.std()), float(losses.std())) / sample**0.5
    assert error < 0.05  # or the comparison says nothing
    assert figures.add("standard errors to Pyro's ELBO", abs(float(ours.mean() + losses.mean())) / error) < 4.5


@pytest.mark.parametrize("num_draws", [2, 64])
def test_value_is_the_mean_of_its_terms(num_draws):
    function = make_elbo(UNIT_MODELS["level_and_spread"](), num_draws=num_draws)
    found, values = function(function.point()), function.values()
    pairs = (values[: num_draws // 2] + values[num_draws // 2 :]) / 2
    assert found.value == pytest.approx(float(values.mean()), rel=1e-13)
    expected = float(pairs.std()) / len(pairs) ** 0.5 if num_draws > 2 else math.inf
    assert found.standard_error == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------ planted bugs


def forgotten(field):
    """Of what the log joint says of its gradients, this is zero."""

    def pulls(*args):
        found = values_and_gradients(*args)
        part = getattr(found, field)
        zero = [torch.zeros_like(p) for p in part] if isinstance(part, list) else torch.zeros_like(part)
        return found._replace(**{field: zero})

    return guide_problem, "values_and_gradients", pulls


def flipped_log_det(self, original=Arrowhead.log_det):
    value = original(self)
    return 2 * value.detach() - value


def entropy_without_noise(self, gaussian, original=ELBOFunction._entropy):
    return original(self, gaussian) - self.draws.half_squares()


def fresh_draws(self):
    return antithetic_draws(self.num_draws, self.problem.loc, self.problem.start, int(torch.randint(2**31, ())))


def independent_draws(num_draws, global_, local, seed):
    draws = antithetic_draws(2 * num_draws, global_, local, seed)
    return Draws(draws.global_[:num_draws], draws.local[:num_draws])


# What is replaced, by what, and which of value, gradient and finite difference are off then.
BUGS = {
    "no pull of the model's parameters": (forgotten("in_parameters"), {"gradient", "finite"}),
    "no pull of the globals": (forgotten("in_global"), {"gradient", "finite"}),
    "no pull of the units": (forgotten("in_local"), {"gradient", "finite"}),
    "wrong sign of the log-determinant": ((Arrowhead, "log_det", flipped_log_det), {"gradient", "finite"}),
    "no noise in the entropy": ((ELBOFunction, "_entropy", entropy_without_noise), {"value"}),
    "draws of every call are others": ((ELBOFunction, "draws", property(fresh_draws)), {"value", "gradient", "finite"}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, monkeypatch):
    replacement, off = BUGS[bug]
    case = UNIT_MODELS["with_params"]()
    function = make_elbo(case)
    assert max(elbo_errors(case, function).values()) < 1e-6
    monkeypatch.setattr(*replacement)
    assert {what.split(" ")[0] for what, error in elbo_errors(case, function).items() if error > 1e-4} == off


def test_draws_that_are_not_antithetic_are_found(monkeypatch):
    """The mean of such pairs is noisy even for a Gaussian model."""
    monkeypatch.setattr(objectives_elbo, "antithetic_draws", independent_draws)
    found = make_elbo(conjugate(), num_draws=8)(numpy.array([CENTER + 0.7]))
    assert found.standard_error > 0.1
