"""What reaches ``.grad``, when it is zeroed, and options A, B and C (``docs/what_pyro_differentiates.rst``)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.pyro_guides import (
    ELBOS,
    Recorder,
    assert_same,
    backward_events,
    by_hand,
    guide,
    leaves,
    model,
    pyro_gradient,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints, kl_divergence

from laplace_amort import LogJoint, dual_path, observed_information
from laplace_amort.guide.routes import ExplicitGradient, ExtraLoss

events = pytest.fixture(backward_events)

# ---------------------------------------------------------------------------------- which tensors receive a gradient


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("recorded", ["no", "blocked", "yes"])
def test_backward_waits_for_a_recorded_param(elbo, recorded):
    raw = torch.zeros(4, requires_grad=True)

    def raw_guide():
        if recorded == "yes":
            pyro.param("other", torch.zeros(()))
        if recorded == "blocked":
            with poutine.block():
                pyro.param("other", torch.zeros(()))
        pyro.sample("mu", dist.Normal(raw[0], 1.0))
        with pyro.plate("units", 3):
            pyro.sample("y", dist.Normal(raw[1:], 1.0))

    elbo().loss_and_grads(model, raw_guide)
    assert (raw.grad is not None) == (recorded == "yes" or elbo is TraceGraph_ELBO)


def test_step_leaves_what_it_did_not_record():
    raw = torch.tensor(0.5, requires_grad=True)

    def raw_guide():
        guide()
        with poutine.block():
            hidden = pyro.param("hidden", torch.tensor(0.5))
        pyro.factor("extra", 2.0 * raw + 3.0 * hidden, has_rsample=True)

    svi = SVI(model, raw_guide, recorder := Recorder(lr=0.1), Trace_ELBO())
    for _ in range(2):
        svi.step()
    assert [sorted(seen) for seen in recorder.seen] == [["loc", "log_scale"]] * 2
    assert (raw.item(), raw.grad.item()) == (0.5, 4.0)  # neither stepped nor zeroed
    assert (leaves()["hidden"].item(), leaves()["hidden"].grad.item()) == (0.5, 6.0)


def test_gradient_is_that_of_the_unconstrained_leaf():
    def constrained_guide():
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        pyro.factor("minus_loss", 3.0 * scale, has_rsample=True)

    _, gradients = pyro_gradient(Trace_ELBO(), lambda: None, constrained_guide)
    assert_same(gradients["scale"], torch.tensor(3.0 * 0.7))  # d scale / d log scale = scale
    assert_same(leaves()["scale"].detach(), torch.tensor(0.7).log())


@pytest.mark.parametrize("elbo", ELBOS)
def test_model_side_params_also_reach_the_precision(elbo):
    def noise_model():
        noise = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive)
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(y, noise), obs=torch.tensor(1.3))

    log_joint = LogJoint(noise_model)

    def laplace_guide():
        y_hat = pyro.param("y_hat", torch.tensor(0.4))
        precision = observed_information(log_joint, y_hat).squeeze()
        pyro.sample("y", dist.Normal(y_hat, precision**-0.5))

    svi = SVI(noise_model, laplace_guide, recorder := Recorder(), elbo())
    pyro.set_rng_seed(1)
    svi.step()
    pyro.set_rng_seed(1)
    draw = torch.randn(())
    noise = leaves()["noise"].exp()
    q = dist.Normal(leaves()["y_hat"], (1 + noise**-2) ** -0.5)
    y = q.mean + q.stddev * draw
    p = dist.Normal(0.0, 1.0)
    kl = kl_divergence(q, p) if elbo is TraceMeanField_ELBO else q.log_prob(y) - p.log_prob(y)
    assert_same(recorder.seen[0], by_hand(kl - dist.Normal(y, noise).log_prob(torch.tensor(1.3))))


# ------------------------------------------------------------------------------------------- SVI.step, and .grad


def test_step_zeroes_after_the_optimizer(events):
    svi = SVI(model, guide, recorder := Recorder(lr=0.1), Trace_ELBO())
    before = None
    for _ in range(2):
        svi.step()
        assert all(gradient.any() for gradient in recorder.kept[-1].values())  # the optimizer saw it, and keeps it
        for name, leaf in leaves().items():
            assert leaf.grad is not recorder.kept[-1][name]  # a new tensor of zeros, not None
            assert not leaf.grad.any()
        assert before is None or not torch.equal(before, leaves()["loc"])
        before = leaves()["loc"].detach().clone()
    assert len(events) == 2


@pytest.mark.parametrize(
    ("moment", "arrives_in"), [("before the first", 0), ("in the guide", 0), ("after backward", 0), ("after", 1)]
)
@pytest.mark.parametrize("elbo", ELBOS)
def test_hand_made_gradient_survives_until_the_next_optimizer_step(elbo, moment, arrives_in):
    pending = [moment]

    def put(when):
        if pending == [when]:
            pending.clear()
            leaf = pyro.param("loc").unconstrained()
            leaf.grad = torch.full((4,), 100.0) + (0.0 if leaf.grad is None else leaf.grad)

    def guide_with_hand():
        guide()
        put("in the guide")

    def loss_and_grads(*args):
        loss = elbo().loss_and_grads(*args)
        put("after backward")
        return loss

    def run():
        pyro.set_rng_seed(1)
        svi = SVI(model, guide_with_hand, recorder := Recorder(), elbo().loss, loss_and_grads=loss_and_grads)
        put("before the first")
        for _ in range(3):
            svi.step()
            put("after")
        return [seen["loc"] for seen in recorder.seen]

    guide()  # a parameter must exist before anything is put into its .grad
    with_hand, without = run(), run()
    difference = [(hand - plain).round(decimals=9) for hand, plain in zip(with_hand, without, strict=True)]
    assert_same(difference, [torch.full((4,), 100.0 * (step == arrives_in)) for step in range(3)])


def test_hand_made_gradient_of_an_unrecorded_param_stays():
    def guide_with_switch(used):
        guide()
        if used:
            pyro.factor("extra", 3.0 * pyro.param("sometimes", torch.zeros(())), has_rsample=True)

    svi = SVI(lambda used: model(), guide_with_switch, recorder := Recorder(), Trace_ELBO())
    svi.step(True)
    leaves()["sometimes"].grad += 100.0
    svi.step(False)
    assert leaves()["sometimes"].grad.item() == 100.0
    svi.step(True)
    assert [seen.get("sometimes") for seen in recorder.seen] == [3.0, None, 103.0]


@pytest.mark.parametrize(("vectorize", "arrived"), [(False, 3.0), (True, 2.0)])
def test_hand_made_gradient_is_neither_scaled_nor_averaged(vectorize, arrived):
    def guide_with_hand():
        guide()
        leaf = pyro.param("loc").unconstrained()
        leaf.grad = torch.ones(4) + (0.0 if leaf.grad is None else leaf.grad)

    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize)
    pair = [poutine.scale(fn, 5.0) for fn in (model, guide_with_hand)]
    _, with_hand = pyro_gradient(elbo, *pair)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize)
    _, plain = pyro_gradient(elbo, poutine.scale(model, 5.0), poutine.scale(guide, 5.0))
    # Once per run of the guide; the first vectorized step runs it twice.
    assert_same(with_hand["loc"] - plain["loc"], torch.full((4,), arrived))


def test_callable_loss_retains_its_graph(events):
    losses = []

    def loss_fn(*args):
        losses.append(Trace_ELBO().differentiable_loss(*args))
        return losses[-1]

    svi = SVI(model, guide, recorder := Recorder(), loss=loss_fn)
    svi.step()
    assert events == [("backward", True)]
    losses[0].backward()  # the graph is still there
    assert_same(recorder.seen[0], {name: leaf.grad for name, leaf in leaves().items()})


def test_callable_loss_without_a_graph_trains_nothing(events):
    svi = SVI(model, guide, recorder := Recorder(lr=0.1), loss=Trace_ELBO().loss)  # returns a float
    guide()
    before = {name: leaf.detach().clone() for name, leaf in leaves().items()}
    svi.step()
    assert events == []
    assert recorder.seen == [{"loc": None, "log_scale": None}]
    assert_same({name: leaf.detach() for name, leaf in leaves().items()}, before)


@pytest.mark.parametrize("elbo", ELBOS)
def test_evaluate_loss_is_without_gradients(events, elbo):
    enabled = []

    def logged_guide():
        enabled.append(torch.is_grad_enabled())
        guide()

    svi = SVI(model, logged_guide, Recorder(), elbo())
    pyro.set_rng_seed(1)
    evaluated = svi.evaluate_loss()
    assert enabled == [False]
    assert all(leaf.grad is None for leaf in leaves().values())
    pyro.set_rng_seed(1)
    assert svi.step() == pytest.approx(evaluated, rel=1e-12)
    assert enabled == [False, True]
    assert len(events) == 1
    svi = SVI(count_model, family_guide(split_c), Recorder(), elbo())  # has a Hessian inside
    pyro.set_rng_seed(1)
    evaluated = svi.evaluate_loss()
    pyro.set_rng_seed(1)
    assert svi.step() == pytest.approx(evaluated, rel=1e-12)


# --------------------------------------------------------------------------------------------- options A, B and C


def count_model():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    y = pyro.sample("y", dist.Normal(theta, theta.exp()))  # so that the Hessian moves with theta, too
    pyro.sample("z", dist.Poisson(y.exp()), obs=torch.tensor(3.0))


def family_guide(split):
    """The guide whose only parameter is ``theta_hat``; any smooth function will do for the mode."""
    log_joint = LogJoint(count_model)

    def guide_fn():
        mean, for_mode, curvature = split(pyro.param("theta_hat", torch.tensor(0.4)))
        y_hat = for_mode.sin()
        precision = observed_information(log_joint, curvature, y_hat)
        normal = dist.MultivariateNormal(torch.stack([mean, y_hat]), precision_matrix=precision)
        log_joint.sample_sites(pyro.sample("u", normal, infer={"is_auxiliary": True}))

    return guide_fn


def split_c(theta):
    mean, curvature = dual_path(theta)
    return mean, mean, curvature


def split_ab(route):
    return lambda theta: (theta, route.hide(theta), theta)


def loss_oracle(theta, y_hat, noise):
    """Equation (1) in plain torch: the Hessian takes its two arguments apart, everything else moves."""

    def log_joint(v):
        log_p = dist.Normal(0.0, 1.0).log_prob(v[0]) + dist.Normal(v[0], v[0].exp()).log_prob(v[1])
        return log_p + dist.Poisson(v[1].exp()).log_prob(torch.tensor(3.0))

    loc = torch.stack([theta, y_hat])
    precision = -torch.func.jacrev(torch.func.jacrev(log_joint))(loc)
    u = loc + torch.linalg.cholesky(torch.linalg.inv(precision)) @ noise
    return torch.logdet(precision) / 2 - (noise @ noise) / 2 - math.log(2 * math.pi) - log_joint(u)


def oracle_terms():
    """The loss, its total derivative, and the two terms of equation (5)."""
    pyro.set_rng_seed(1)
    noise, theta = torch.randn(2), torch.tensor(0.4)
    total, loss = torch.func.grad_and_value(lambda t: loss_oracle(t, t.sin(), noise))(theta)
    partial = torch.func.grad(loss_oracle, argnums=(0, 1))(theta, theta.sin(), noise)
    return loss, total, partial[0], theta.cos() * partial[1]


@pytest.mark.parametrize("elbo", ELBOS)
def test_dual_path_gradient_is_the_total_derivative(elbo, events):
    expected_loss, total, _, _ = oracle_terms()
    loss, gradients = pyro_gradient(elbo(), count_model, family_guide(split_c))
    torch.testing.assert_close(torch.tensor(loss), expected_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients["theta_hat"], total, rtol=1e-10, atol=0)
    assert len(events) == 1


@pytest.mark.parametrize("elbo", ELBOS)
def test_hidden_dependence_loses_the_term_through_the_mode(elbo):
    _, total, partial, through_mode = oracle_terms()
    assert_same(total, partial + through_mode)
    assert abs(through_mode) > 0.1
    hidden = []

    def split(theta):
        hidden.append(theta.detach().clone().requires_grad_())
        return theta, hidden[-1], theta

    _, gradients = pyro_gradient(elbo(), count_model, family_guide(split))
    torch.testing.assert_close(gradients["theta_hat"], partial, rtol=1e-10, atol=0)
    torch.testing.assert_close(hidden[-1].grad, through_mode, rtol=1e-10, atol=0)  # what A and B bring back


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize(("route", "calls"), [(ExplicitGradient, 1), (ExtraLoss, 2)])
def test_routes_restore_before_the_optimizer(elbo, route, calls, events):
    seen = []
    for wrapped in (elbo(), route(elbo())):
        split = split_ab(wrapped) if isinstance(wrapped, route) else split_c
        pyro.clear_param_store()
        svi = SVI(count_model, family_guide(split), recorder := Recorder(lr=0.1), wrapped)
        pyro.set_rng_seed(1)
        events.clear()
        svi.step()
        seen.append((recorder.seen[0]["theta_hat"], leaves()["theta_hat"].detach()))
    torch.testing.assert_close(*seen, rtol=1e-12, atol=0)  # the gradient, and the parameter after the step
    assert len(events) == calls
    assert events[0] == ("backward", True)


def test_backward_inside_the_guide_frees_the_graph_that_pyro_needs():
    def impatient_guide(retain_graph):
        loc = pyro.param("loc", torch.tensor(0.4))
        x = pyro.sample("x", dist.Normal(loc.exp(), 1.0))
        (x**2).backward(retain_graph=retain_graph)

    def plain():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(RuntimeError, match="second time"):
        Trace_ELBO().loss_and_grads(plain, lambda: impatient_guide(False))
    Trace_ELBO().loss_and_grads(plain, lambda: impatient_guide(True))
