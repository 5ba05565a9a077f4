"""dual_path_param: a Pyro parameter and its two copies in one call."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import normals
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO

import laplace_amort.guide.params
from laplace_amort import DualPath, LogJoint, dual_path_param, observed_information
from laplace_amort.autodiff.path_checks import check_paths


def weighted(dual, mean_weight, curvature_weight):
    return (mean_weight * dual.mean + curvature_weight * dual.curvature).sum()


def test_gradients_of_both_copies_sum_in_the_leaf_of_the_store():
    init, weights = normals(2, 3), (normals(2, 3, seed=1), normals(2, 3, seed=2))
    dual = dual_path_param("theta", init)
    assert isinstance(dual, DualPath)
    assert torch.equal(dual.mean, init)
    assert torch.equal(dual.curvature, init)
    weighted(dual, *weights).backward()
    torch.testing.assert_close(pyro.get_param_store()._params["theta"].grad, weights[0] + weights[1])
    assert torch.equal(pyro.param("theta").grad, pyro.get_param_store()._params["theta"].grad)


def test_the_copies_have_their_roles():
    dual = dual_path_param("theta", normals(3))
    check_paths(dual, dual.mean.exp(), (dual.curvature * dual.mean.exp()).sum())
    with pytest.raises(laplace_amort.PathLeakError):
        check_paths(dual, dual.curvature.exp())


def test_a_second_call_finds_the_same_parameter():
    first = dual_path_param("theta", normals(3))
    second = dual_path_param("theta")
    assert torch.equal(first.mean, second.mean)
    (first.mean.sum() + 2 * second.curvature.sum()).backward()
    assert torch.equal(pyro.param("theta").grad, torch.full((3,), 3.0))


CONSTRAINED = {
    "positive": (constraints.positive, [0.5, 2.0, 7.0]),
    "unit interval": (constraints.unit_interval, [0.1, 0.5, 0.7]),
    "simplex": (constraints.simplex, [0.2, 0.3, 0.5]),
    "lower Cholesky": (constraints.lower_cholesky, [[1.5, 0.0], [0.3, 0.4]]),
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_copies_are_constrained_and_gradients_go_through_the_constraint(name):
    constraint, init = CONSTRAINED[name][0], torch.tensor(CONSTRAINED[name][1])
    dual = dual_path_param("theta", init, constraint=constraint)
    for copy in dual:
        torch.testing.assert_close(copy, init)
        assert constraint.check(copy).all()
    weights = normals(*init.shape, seed=1), normals(*init.shape, seed=2)
    leaf = pyro.param("theta").unconstrained()
    (gradient,) = torch.autograd.grad(weighted(dual, *weights), leaf)
    transform = torch.distributions.transform_to(constraint)
    _, expected = torch.autograd.functional.vjp(transform, leaf.detach(), weights[0] + weights[1])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gains", [(0.0, 1.0), (1.0, 0.0), (0.5, 0.25), (1.0, 1.0)])
def test_gains_scale_what_each_copy_sends_back(gains):
    weights = normals(3, seed=1), normals(3, seed=2)
    dual = dual_path_param("theta", normals(3).exp(), constraints.positive, mean_gain=gains[0], curvature_gain=gains[1])
    weighted(dual, *weights).backward()
    expected = (gains[0] * weights[0] + gains[1] * weights[1]) * normals(3).exp()
    torch.testing.assert_close(pyro.param("theta").unconstrained().grad, expected)


def test_an_exchange_of_the_gains_is_found(monkeypatch):
    original = laplace_amort.guide.params.dual_path
    monkeypatch.setattr(
        laplace_amort.guide.params,
        "dual_path",
        lambda value, mean_gain, curvature_gain: original(value, mean_gain=curvature_gain, curvature_gain=mean_gain),
    )
    with pytest.raises(AssertionError):
        test_gains_scale_what_each_copy_sends_back((0.5, 0.25))


def test_event_dim_in_a_subsampled_plate():
    """Each unit of the batch has its row of the parameter, and only those rows get a gradient."""
    init, batch = normals(5, 2), torch.tensor([3, 1])
    with pyro.plate("units", 5, subsample=batch):
        dual = dual_path_param("theta", init, event_dim=1)
    assert torch.equal(dual.mean, init[batch])
    assert torch.equal(dual.curvature, init[batch])
    weighted(dual, torch.tensor([[1.0], [2.0]]), 10.0).backward()
    expected = torch.zeros(5, 2)
    expected[3], expected[1] = 11.0, 12.0
    assert torch.equal(pyro.param("theta").unconstrained().grad, expected)


def test_without_event_dim_the_plate_takes_the_whole():
    with pyro.plate("units", 5, subsample=torch.tensor([3, 1])):
        dual = dual_path_param("theta", normals(5, 2))
    assert dual.mean.shape == (5, 2)


def test_init_may_be_a_function_and_is_called_once():
    calls = []

    def init():
        calls.append(1)
        return torch.full((2,), 3.0)

    for _ in range(2):
        dual = dual_path_param("theta", init, constraint=constraints.positive)
        torch.testing.assert_close(dual.mean, torch.full((2,), 3.0))
    assert calls == [1]


def test_no_init_for_a_new_name():
    with pytest.raises(KeyError, match="theta"):
        dual_path_param("theta")


@pytest.mark.parametrize("init", [torch.tensor([1, 2]), lambda: torch.tensor([1, 2])])
def test_integer_init(init):
    with pytest.raises(TypeError, match=r"parameter 'theta' has dtype torch\.int64, which carries no gradient"):
        dual_path_param("theta", init)
    assert torch.equal(dual_path_param("theta", torch.tensor([1.0, 2.0])).mean, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("gain", ["mean_gain", "curvature_gain"])
def test_gain_that_is_no_number(gain):
    with pytest.raises(ValueError, match=f"{gain} must be a finite real number, got nan"):
        dual_path_param("theta", torch.zeros(2), **{gain: float("nan")})


def model(z):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(theta, 0.7))
        pyro.sample("z", dist.Normal(y, 0.5), obs=z)


def guide(z):
    """The amortized guide: the mode of each unit in closed form, the precision from the Hessian."""
    log_joint = LogJoint(model, z)
    theta = dual_path_param("theta_hat", torch.tensor(2.0))
    y = (theta.mean / 0.7**2 + z / 0.5**2) / (1 / 0.7**2 + 1 / 0.5**2)
    precision = observed_information(log_joint, theta.curvature, y)
    mean = torch.cat([theta.mean.reshape(1), y])
    joint = pyro.sample("joint", dist.MultivariateNormal(mean, precision_matrix=precision), infer=AUXILIARY)
    log_joint.sample_sites(joint)


AUXILIARY = {"is_auxiliary": True}


def test_svi_captures_and_moves_it():
    z, elbo = normals(4), Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.02}), elbo)
    guide(z)
    for seed in range(3):
        before = pyro.param("theta_hat").detach().clone()
        pyro.set_rng_seed(seed)
        loss = elbo.differentiable_loss(model, guide, z)
        (gradient,) = torch.autograd.grad(loss, pyro.param("theta_hat"))
        assert gradient.abs() > 0.1
        pyro.set_rng_seed(seed)
        assert svi.step(z) == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(pyro.param("theta_hat").detach(), before - 0.02 * gradient, rtol=1e-12, atol=0)
        assert pyro.param("theta_hat").grad == 0  # it was among the parameters whose gradients SVI zeroes
    assert list(pyro.get_param_store().keys()) == ["theta_hat"]


def test_store_can_be_saved_and_loaded(tmp_path):
    init = torch.tensor([0.5, 2.0])
    dual_path_param("theta", init, constraint=constraints.positive)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    dual = dual_path_param("theta")
    torch.testing.assert_close(dual.mean, init)
    weighted(dual, 1.0, 2.0).backward()
    torch.testing.assert_close(pyro.param("theta").unconstrained().grad, 3 * init)


def test_under_no_grad_the_copies_have_the_value_alone():
    with torch.no_grad():
        dual = dual_path_param("theta", normals(3))
    assert torch.equal(dual.mean, normals(3))
    assert not dual.mean.requires_grad
