"""LogJoint against Pyro's own densities, transforms and potentials, over the table of models."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import (
    MODELS,
    SUBSAMPLED,
    SUPPORTS,
    Case,
    masked,
    normals,
    scaled,
    subsampled,
    with_factor,
    with_param,
)
from helpers.oracles import Figures
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoMultivariateNormal,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import biject_to

import laplace_amort.model.handlers
from laplace_amort import LogJoint, ModelError

figures = Figures()

# What the oracles of Pyro itself cannot do: improper priors and mixtures (no sampling, no bijection), supports that
# depend on other latents (they freeze the first one they see), sequential plates, subsampling without indices.
NO_ORACLE = (
    SUBSAMPLED
    | {"partly_observed"}  # of what obs_mask hides Pyro makes a latent; see test_missing.py
    | {"dependent_support", "dependent_part"}
    | {name for name in MODELS if "improper" in name or "mixture" in name}
)


def log_joint_of(case: Case) -> LogJoint:
    return LogJoint(case.model, *case.args, **case.kwargs).with_indices(**case.indices)


def make(name):
    case = MODELS[name]()
    log_joint = log_joint_of(case)
    return case, log_joint, 0.6 * normals(log_joint.size, seed=3)


def coordinates(support, value):
    """As many coordinates of a constrained value as it has degrees of freedom: the density is one over these."""
    if support is constraints.simplex:
        return value[..., :-1]
    if support is constraints.corr_cholesky:
        row, column = torch.tril_indices(*value.shape[-2:], offset=-1)
        return value[..., row, column]
    return value


def reference_log_jacobian(fn, unconstrained):
    """log |dx/du| of one site, from the determinant of the whole Jacobian matrix."""
    support = getattr(fn.support, "base_constraint", fn.support) if "Mixture" in repr(fn.support) else fn.support

    def constrained(flat):
        return coordinates(support, biject_to(support)(flat.reshape(unconstrained.shape))).reshape(-1)

    jacobian = torch.autograd.functional.jacobian(constrained, unconstrained.reshape(-1))
    return torch.linalg.slogdet(jacobian).logabsdet


def reference(case, log_joint, packed):
    """Pyro's log density at the constrained values, and the log-Jacobians: as they are, and scaled by plates."""
    unconstrained, constrained = log_joint.unpack(packed), log_joint.constrain(packed)
    model = poutine.condition(case.model, {**constrained, **case.indices})
    trace = poutine.trace(model).get_trace(*case.args, **case.kwargs)
    plain = scaled_sum = 0.0
    for name, value in unconstrained.items():
        node = trace.nodes[name]
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
        log_jacobian = reference_log_jacobian(node["fn"], value)
        plain += log_jacobian
        scaled_sum += math.prod(frame.full_size / frame.size for frame in frames) * log_jacobian
    return trace.log_prob_sum(), plain, scaled_sum


@pytest.mark.parametrize("name", [name for name in MODELS if name != "partly_observed"])
def test_value_is_pyros_log_prob_and_the_jacobians(name):
    case, log_joint, packed = make(name)
    log_prob, log_jacobian, scaled_log_jacobian = reference(case, log_joint, packed)
    value, expected = log_joint(packed), log_prob + scaled_log_jacobian
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    figures.add("log joint: Pyro and Jacobians", float((value - expected).detach().abs() / expected.detach().abs()))
    torch.testing.assert_close(log_joint.log_jacobian(packed), log_jacobian + 0 * packed.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_passing_the_values_agrees(name):
    _, log_joint, packed = make(name)
    value = log_joint(packed)
    assert value.shape == ()
    assert torch.equal(log_joint(log_joint.unpack(packed)), value)
    assert torch.equal(log_joint(*log_joint.unpack(packed).values()), value)
    assert torch.equal(log_joint(packed[:1], packed[1:].reshape(1, -1)), value)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_agrees_with_finite_differences(name):
    _, log_joint, packed = make(name)
    tolerance = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-6}
    # The hooks with which Pyro looks for NaN do not take undefined gradients.
    assert torch.autograd.gradcheck(log_joint, packed.requires_grad_(), **tolerance, check_undefined_grad=False)


class UnfedIndices(laplace_amort.model.handlers.Indices):
    def _pyro_sample(self, msg):
        pass


PLANTED = {
    "missing Jacobian": ("handlers.log_abs_det", lambda *args: torch.zeros(()), "eight_schools"),
    "Jacobian of the inverse": (
        "handlers.log_abs_det",
        lambda t, u, x, dim: -t.log_abs_det_jacobian(u, x),
        "eight_schools",
    ),
    "Jacobian without the scale of the plate": ("log_joint.subsample_scale_of", lambda plates: 1.0, "subsample_size"),
    "model run without its indices": ("runs.Indices", UnfedIndices, "subsampled_twice"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_oracle_finds_planted_bugs(monkeypatch, bug):
    attribute, wrong, name = PLANTED[bug]
    monkeypatch.setattr(f"laplace_amort.model.{attribute}", wrong)
    with pytest.raises(AssertionError, match="not close"):
        test_value_is_pyros_log_prob_and_the_jacobians(name)


def test_gradient_check_finds_a_detached_jacobian(monkeypatch):
    original = laplace_amort.model.handlers.log_abs_det
    monkeypatch.setattr(laplace_amort.model.handlers, "log_abs_det", lambda *args: original(*args).detach())
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_gradient_agrees_with_finite_differences("eight_schools")


@pytest.mark.parametrize("name", MODELS)
def test_round_trips(name):
    case, log_joint, packed = make(name)
    unconstrained = log_joint.unpack(packed)
    assert torch.equal(log_joint.pack(unconstrained), packed)
    assert [value.shape for value in unconstrained.values()] == [site.shape for site in log_joint.sites.values()]
    assert torch.equal(
        torch.cat([torch.arange(packed.numel())[s.slice] for s in log_joint.sites.values()]),
        torch.arange(log_joint.size),
    )
    constrained = log_joint.constrain(packed)
    torch.testing.assert_close(log_joint.unconstrain(constrained), packed, rtol=1e-10, atol=1e-10)
    trace = poutine.trace(poutine.condition(case.model, constrained)).get_trace(*case.args, **case.kwargs)
    for site, value in constrained.items():
        assert value.shape == trace.nodes[site]["fn"].shape()
        trace.nodes[site]["fn"]._validate_sample(value)


def plate_nesting(log_joint):
    return max((-plate.dim for site in log_joint.sites.values() for plate in site.plates), default=0)


@pytest.mark.parametrize("name", MODELS)
def test_batched_values_are_those_of_each_particle(name):
    _, log_joint, _ = make(name)
    particles = 0.6 * normals(3, log_joint.size, seed=4)
    batched = particles.reshape(3, *[1] * plate_nesting(log_joint), log_joint.size)
    for split in (log_joint.unpack, log_joint.constrain):
        together = split(batched)
        for i, particle in enumerate(particles):
            for site, value in split(particle).items():
                torch.testing.assert_close(together[site][i].reshape(value.shape), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(set(MODELS) - NO_ORACLE - {"sequential"}))
def test_order_and_constraints_are_those_of_an_automatic_guide(name):
    case, log_joint, packed = make(name)
    guide = AutoMultivariateNormal(case.model)
    guide(*case.args, **case.kwargs)
    guide.loc.data = packed
    median = guide.median(*case.args, **case.kwargs)
    constrained = log_joint.constrain(packed)
    assert list(median) == list(constrained)
    for site, value in constrained.items():
        # Pyro has the elements in other places in memory, where torch may take another path through the same function.
        torch.testing.assert_close(median[site], value, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(MODELS) - NO_ORACLE))
def test_value_is_minus_the_potential_of_pyros_samplers(name):
    case, log_joint, packed = make(name)
    _, potential, _, _ = initialize_model(case.model, case.args, case.kwargs)
    expected = -potential(log_joint.unpack(packed))
    torch.testing.assert_close(log_joint(packed), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["support_positive", "support_simplex", "dependent_support", "nested_plates"])
@pytest.mark.parametrize("init", [init_to_median, init_to_mean, init_to_sample, init_to_uniform, init_to_feasible])
def test_initial_follows_the_strategy(name, init):
    case, log_joint, _ = make(name)
    pyro.set_rng_seed(5)
    packed = log_joint.initial(init)
    assert packed.shape == (log_joint.size,)
    assert not packed.requires_grad
    pyro.set_rng_seed(5)
    guide = AutoMultivariateNormal(case.model, init_loc_fn=init)
    guide(*case.args, **case.kwargs)
    torch.testing.assert_close(packed, guide.loc.detach(), rtol=1e-12, atol=1e-12)


def test_initial_takes_given_values():
    _, log_joint, packed = make("eight_schools")
    start = log_joint.initial(init_to_value(values=log_joint.constrain(packed)))
    torch.testing.assert_close(start, packed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SUPPORTS))
def test_initial_is_finite_by_default(name):
    _, log_joint, _ = make(f"support_{name}")
    assert log_joint(log_joint.initial()).isfinite()


def test_given_takes_other_arguments():
    case, log_joint, packed = make("student_t")
    z, errors = normals(4, seed=8), normals(4, seed=9).exp()
    other = log_joint.given(z, errors=errors)
    assert torch.equal(other(packed), LogJoint(case.model, z, errors)(packed))
    assert torch.equal(log_joint(packed), log_joint_of(case)(packed))  # the first one is as it was
    assert not torch.equal(other(packed), log_joint(packed))


def test_with_indices_chooses_the_units():
    z, packed = normals(6), normals(3, seed=3)
    log_joint = LogJoint(subsampled, z, 2)
    for indices in (torch.tensor([0, 1]), torch.tensor([5, 2])):
        expected = LogJoint(subsampled, z, subsample=indices)(packed)
        assert torch.equal(log_joint.with_indices(units=indices)(packed), expected)
    assert log_joint.indices == {}


def test_indices_given_by_the_model_itself_come_first():
    z, packed = normals(6), normals(3, seed=3)
    log_joint = LogJoint(subsampled, z, subsample=torch.tensor([5, 2]))
    assert torch.equal(log_joint.with_indices(units=torch.tensor([0, 1]))(packed), log_joint(packed))


def test_indices_of_several_plates_add_up():
    case, log_joint, packed = make("subsampled_twice")
    one_by_one = LogJoint(case.model, *case.args)
    for name, indices in case.indices.items():
        one_by_one = one_by_one.with_indices(**{name: indices})
    assert torch.equal(one_by_one(packed), log_joint(packed))


def test_subsample_scale_is_per_element():
    _, log_joint, _ = make("subsampled_twice")  # 2 of 5 groups, 3 of 4 units
    expected = torch.tensor([1.0] + [2.5] * 2 + [2.5 * 4 / 3] * 6)
    torch.testing.assert_close(log_joint.subsample_scale(), expected)
    assert torch.equal(make("eight_schools")[1].subsample_scale(), torch.ones(10))


def test_scale_multiplies_the_density_and_not_the_jacobian():
    z, u = normals(4), torch.tensor([0.3])
    one, three = LogJoint(scaled, z, 1.0)(u), LogJoint(scaled, z, factor=3.0)(u)
    torch.testing.assert_close(three - u[0], 3 * (one - u[0]), rtol=1e-12, atol=0)


def test_mask_drops_the_density_and_not_the_jacobian():
    z, u = normals(4), normals(6, seed=3).requires_grad_()
    some, everything = LogJoint(masked, z, torch.arange(4) < 3), LogJoint(masked, z, torch.ones(4) > 0)
    mu, flat, y = u[0].exp(), u[1].exp(), u[5].exp()
    last_unit = dist.LogNormal(mu, 1.0).log_prob(y) + dist.Normal(y, flat).log_prob(z[3])
    torch.testing.assert_close(everything(u) - some(u), last_unit, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(some(u), u)
    assert gradient[5] == 1  # of log |dy/du| = u alone


def test_factor_acts():
    z, u = normals(4), normals(5, seed=3)
    expected = -(((2 * u[1:]).exp() - z) ** 2).sum()
    difference = LogJoint(with_factor, z, 3.0)(u) - LogJoint(with_factor, z, 2.0)(u)
    torch.testing.assert_close(difference, expected, rtol=1e-12, atol=0)


def test_param_of_the_model_acts_and_gets_a_gradient():
    z, u = normals(4), torch.tensor([0.2])
    log_joint = LogJoint(with_param, z)
    pyro.get_param_store()["noise"] = torch.tensor(2.0)
    mean = u + pyro.param("shift")
    expected = dist.Normal(0.0, 1.0).log_prob(u).sum() + dist.Normal(mean, 2.0).log_prob(z).sum()
    torch.testing.assert_close(log_joint(u), expected, rtol=1e-12, atol=0)
    log_joint(u).backward()
    residual = (z - mean).detach()
    torch.testing.assert_close(pyro.param("noise").unconstrained().grad, (residual**2 / 4 - 1).sum())
    torch.testing.assert_close(pyro.param("shift").grad, residual / 4)


def check_integral(log_joint):
    """The joint density of a rate and a count integrates to the negative binomial probability of the count."""
    z, shape, rate = log_joint.args[0], 3.0, 2.0
    grid = torch.linspace(-14.0, 6.0, 1001)
    integral = torch.stack([log_joint(u) for u in grid]).exp().sum() * (grid[1] - grid[0])
    evidence = dist.GammaPoisson(shape, rate).log_prob(z).exp()
    torch.testing.assert_close(integral, evidence, rtol=1e-10, atol=0)


def rate_and_count(z):
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    pyro.sample("z", dist.Poisson(rate), obs=z)


def test_density_integrates_to_the_evidence():
    check_integral(LogJoint(rate_and_count, torch.tensor(4.0)))


def test_integral_finds_a_missing_jacobian(monkeypatch):
    monkeypatch.setattr(laplace_amort.model.handlers, "log_abs_det", lambda transform, value, *rest: torch.zeros(()))
    with pytest.raises(AssertionError, match="not close"):
        check_integral(LogJoint(rate_and_count, torch.tensor(4.0)))


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    case = MODELS["eight_schools"]()
    log_joint = log_joint_of(case)
    packed = log_joint.initial()
    assert {packed.dtype, log_joint(packed).dtype, log_joint.subsample_scale().dtype} == {torch.float32}


def test_print_shows_the_order():
    assert str(make("correlated")[1]) == (
        "LogJoint of 11 unconstrained elements: mu (2,), tau (2,), factor (1,), y (3, 2)"
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_and_pickles(duplicate):
    _, log_joint, packed = make("eight_schools")
    assert torch.equal(duplicate(log_joint)(packed), log_joint(packed))


# ---------------------------------------------------------------------------------------------------- supports by value


def bounded(z):
    """Bounds that are numbers, tensors, and those of a latent."""
    pyro.sample("scale", dist.Uniform(0.0, 10.0))
    pyro.sample("shares", dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 4.0])).to_event(1))
    top = pyro.sample("top", dist.Pareto(1.5, 3.0))
    pyro.sample("below", dist.Uniform(0.0, top))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Uniform(z - 1, z + 1))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def test_bounds_that_depend_on_no_latent_are_those_of_every_run():
    log_joint = LogJoint(bounded, torch.tensor([0.5, -1.0, 2.0]))
    fixed = {name for name, site in log_joint.sites.items() if site.transform is not None}
    assert fixed == {"scale", "shares", "top", "y"}
    packed = 0.3 * torch.arange(log_joint.size, dtype=torch.float64)
    values = log_joint.constrain(packed)
    trace = poutine.trace(poutine.condition(bounded, data=values)).get_trace(torch.tensor([0.5, -1.0, 2.0]))
    for name, site in log_joint.sites.items():
        transform = torch.distributions.biject_to(trace.nodes[name]["fn"].support)
        torch.testing.assert_close(values[name], transform(packed[site.slice].reshape(site.shape)), rtol=1e-14, atol=0)
    torch.testing.assert_close(log_joint.unconstrain(values), packed, rtol=1e-9, atol=1e-9)


def test_parameters_as_bounds_move():
    def model():
        pyro.sample("x", dist.Uniform(0.0, pyro.param("top", torch.tensor(2.0), constraint=constraints.positive)))

    assert LogJoint(model).sites["x"].transform is None


def test_bounds_of_a_minibatch_are_those_of_its_run():
    tops = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def model():
        with pyro.plate("units", 4, subsample_size=2) as index:
            pyro.sample("y", dist.Uniform(0.0, tops[index]))

    assert LogJoint.at_indices({"units": torch.tensor([0, 1])}, model).sites["y"].transform is None


def test_bounds_of_a_latent_that_was_detached_are_refused():
    def model():
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, top.detach()))

    log_joint = LogJoint(model)
    with pytest.raises(ModelError, match=r"the support of site 'x' has bounds .* a latent that was detached"):
        log_joint(torch.tensor([0.7, 0.1]))
