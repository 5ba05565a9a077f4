"""What Pyro runs ``backward()`` on: factors, mean field, scales, particles (``docs/what_pyro_differentiates.rst``)."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.pyro_guides import (
    ELBOS,
    assert_same,
    backward_events,
    by_hand,
    first_traces,
    guide,
    leaves,
    model,
    pyro_gradient,
    sample_sites,
    score_guide,
)
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence

from laplace_amort import LogJoint

events = pytest.fixture(backward_events)

# ------------------------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("has_rsample", [True, False, None])
def test_factor_in_the_guide_needs_has_rsample(elbo, has_rsample):
    def with_factor():
        guide()
        pyro.factor("extra", 3.0 * pyro.param("loc").sum(), has_rsample=has_rsample)

    loss, plain = pyro_gradient(elbo(), model, guide)
    if has_rsample is None or (elbo is TraceMeanField_ELBO and not has_rsample):
        with pytest.raises((ValueError, NotImplementedError), match=r"has_rsample|fully reparameterized"):
            pyro_gradient(elbo(), model, with_factor)
        return
    with_loss, gradients = pyro_gradient(elbo(), model, with_factor)
    assert_same(torch.tensor(with_loss - loss), 3.0 * leaves()["loc"].detach().sum())
    # Without rsample it is a score, weighted with its cost; TraceGraph charges costs to latent sites only.
    weight = 1.0 if has_rsample else loss if elbo is Trace_ELBO else 0.0
    assert_same(gradients["loc"] - plain["loc"], torch.full((4,), 3.0 * weight))


# ---------------------------------------------------------------------------------------------- TraceMeanField_ELBO


@pytest.mark.parametrize("closed_form", [True, False])
def test_mean_field_takes_closed_form_kl_where_there_is_one(closed_form):
    prior = dist.Normal(0.0, 2.0) if closed_form else dist.StudentT(3.0)

    def plain():
        x = pyro.sample("x", prior)
        pyro.sample("z", dist.Normal(x, 1.0), obs=torch.tensor(1.3))

    def normal_guide():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.4)), 0.7))

    model_trace, guide_trace = first_traces(TraceMeanField_ELBO(), plain, normal_guide)
    log_p, q = model_trace.nodes, guide_trace.nodes["x"]
    kl = kl_divergence(q["fn"], prior) if closed_form else q["log_prob_sum"] - log_p["x"]["log_prob_sum"]
    surrogate = kl - log_p["z"]["log_prob_sum"]
    loss, gradients = pyro_gradient(TraceMeanField_ELBO(), plain, normal_guide)
    assert_same(torch.tensor(loss), surrogate.detach())  # surrogate and loss are one
    assert_same(gradients, by_hand(surrogate))


def positive_model():
    tau = pyro.sample("tau", dist.Exponential(1.0))
    pyro.sample("z", dist.Normal(0.0, tau), obs=torch.tensor(1.3))


def delta_guide():
    u = pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.4)), 0.7), infer={"is_auxiliary": True})
    pyro.sample("tau", dist.Delta(u.exp(), log_density=-u))


def factor_guide():
    u = pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.4)), 0.7), infer={"is_auxiliary": True})
    LogJoint(positive_model).sample_sites(u.reshape(1))


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("kind", ["delta", "factor", "AutoNormal"])
def test_mean_field_drops_the_log_density_of_a_delta(elbo, kind):
    guide_fn = {"delta": delta_guide, "factor": factor_guide, "AutoNormal": AutoNormal(positive_model)}[kind]
    poutine.trace(guide_fn).get_trace()  # an automatic guide draws when it sets itself up
    loss, gradients = pyro_gradient(elbo(), positive_model, guide_fn)
    _, guide_trace = first_traces(Trace_ELBO(), positive_model, guide_fn)
    q = next(site for name, site in guide_trace.nodes.items() if name in ("u", "tau_unconstrained"))
    u, tau = q["value"], q["value"].exp()
    log_p = dist.Exponential(1.0).log_prob(tau) + dist.Normal(0.0, tau).log_prob(torch.tensor(1.3))
    log_jacobian = torch.zeros(()) if elbo is TraceMeanField_ELBO and kind != "factor" else u
    surrogate = q["fn"].log_prob(u) - log_p - log_jacobian
    assert abs(u) > 0.01
    assert_same(torch.tensor(loss), surrogate.detach())
    assert_same(gradients, by_hand(surrogate))


def test_mean_field_guide_only_sites_must_be_auxiliary():
    def guide_with_extra(auxiliary):
        guide()
        pyro.sample("w", dist.Normal(pyro.param("loc")[0], 2.0), infer={"is_auxiliary": auxiliary})

    loss, _ = pyro_gradient(TraceMeanField_ELBO(), model, guide)
    with_loss, _ = pyro_gradient(TraceMeanField_ELBO(), model, lambda: guide_with_extra(True))
    _, guide_trace = first_traces(TraceMeanField_ELBO(), model, lambda: guide_with_extra(True))
    assert_same(torch.tensor(with_loss - loss), guide_trace.nodes["w"]["log_prob_sum"].detach())  # drawn, no KL
    with pytest.warns(UserWarning, match="non-auxiliary"), pytest.raises(AssertionError):
        pyro_gradient(TraceMeanField_ELBO(), model, lambda: guide_with_extra(False))


def test_mean_field_checks_only_under_validation():
    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        pyro_gradient(TraceMeanField_ELBO(), model, score_guide)
    with pyro.validation_enabled(False):
        _, gradients = pyro_gradient(TraceMeanField_ELBO(), model, score_guide)
        model_trace, guide_trace = first_traces(TraceMeanField_ELBO(), model, score_guide)
    pairs = [(guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]) for name in ("mu", "y")]
    assert_same(gradients, by_hand(sum(kl_divergence(*pair).sum() for pair in pairs)))  # no term for the data at all

    def reversed_guide():
        with pyro.plate("units", 3):
            pyro.sample("y", dist.Normal(pyro.param("a", torch.zeros(3)), 1.0))
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match="mean field restriction"):
        pyro_gradient(TraceMeanField_ELBO(), model, reversed_guide)


# ------------------------------------------------------------------------------------------------- scales and masks


@pytest.mark.parametrize(
    ("elbo", "guide_fn"), [(elbo, guide) for elbo in ELBOS] + [(elbo, score_guide) for elbo in ELBOS[:2]]
)
def test_common_scale_multiplies_loss_and_gradient_once(elbo, guide_fn):
    loss, gradients = pyro_gradient(elbo(), model, guide_fn)
    scaled = [poutine.scale(fn, 3.0) for fn in (model, guide_fn)]
    scaled_loss, scaled_gradients = pyro_gradient(elbo(), *scaled)
    assert_same(torch.tensor(scaled_loss), torch.tensor(3.0 * loss))
    assert_same(scaled_gradients, {name: 3.0 * gradient for name, gradient in gradients.items()})


def test_score_function_is_neither_scaled_nor_masked():
    mask = torch.tensor([True, False, True])
    handled = poutine.scale(poutine.mask(score_guide, mask), 3.0)
    plain, handled = (poutine.trace(fn).get_trace() for fn in (score_guide, handled))
    handled.nodes["y"]["value"] = plain.nodes["y"]["value"]
    for trace in (plain, handled):
        trace.compute_score_parts()
    parts, unscaled = handled.nodes["y"]["score_parts"], plain.nodes["y"]["log_prob"]
    assert_same(parts.score_function, unscaled)
    assert_same(parts.log_prob, 3.0 * mask * unscaled)
    reparameterized = poutine.trace(poutine.scale(poutine.mask(guide, mask), 3.0)).get_trace()
    reparameterized.compute_score_parts()
    assert_same(reparameterized.nodes["y"]["score_parts"].entropy_term, reparameterized.nodes["y"]["log_prob"])


@pytest.mark.parametrize("elbo", ELBOS)
def test_scales_of_model_and_guide_act_apart(elbo):
    model_trace, guide_trace = first_traces(Trace_ELBO(), model, guide)
    log_p = {name: site["log_prob_sum"] for name, site in sample_sites(model_trace).items()}
    surrogate = 5.0 * guide_trace.log_prob_sum() - 2.0 * model_trace.log_prob_sum()
    if elbo is TraceMeanField_ELBO:  # the latents take the scale of the guide, wherever the KL is in closed form
        pairs = [(guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]) for name in ("mu", "y")]
        surrogate = 5.0 * sum(kl_divergence(*pair).sum() for pair in pairs) - 2.0 * log_p["z"]
    loss, gradients = pyro_gradient(elbo(), poutine.scale(model, 2.0), poutine.scale(guide, 5.0))
    assert_same(torch.tensor(loss), surrogate.detach())
    assert_same(gradients, by_hand(surrogate))


def test_mean_field_drops_the_mask_of_the_model():
    model_trace, guide_trace = first_traces(TraceMeanField_ELBO(), model, guide)
    pairs = [(guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]) for name in ("mu", "y")]
    _, model_masked = pyro_gradient(TraceMeanField_ELBO(), poutine.mask(model, False), guide)
    assert_same(model_masked, by_hand(sum(kl_divergence(*pair).sum() for pair in pairs)))
    _, guide_masked = pyro_gradient(TraceMeanField_ELBO(), model, poutine.mask(guide, False))
    assert_same(guide_masked, by_hand(-model_trace.nodes["z"]["log_prob_sum"]))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("rsample", [True, False])
def test_subsampled_plate_weights_its_sites(elbo, rsample):
    def half(fn, **kwargs):
        return lambda: fn(num_units=6, subsample_size=3, **kwargs)

    pair = half(model), half(guide, rsample=rsample)
    model_trace, guide_trace = first_traces(elbo(), *pair)
    expected = 0.0
    for trace, sign in ((model_trace, -1.0), (guide_trace, 1.0)):
        for name, site in sample_sites(trace).items():
            assert site["scale"] == (1.0 if name == "mu" else 2.0)
            expected = expected + sign * site["scale"] * site["unscaled_log_prob"].sum()
    loss, _ = pyro_gradient(elbo(), *pair)
    assert_same(torch.tensor(loss), expected.detach())


# ------------------------------------------------------------------------------------------------------- particles


@pytest.mark.parametrize(
    ("elbo", "vectorize", "expected"),
    [(elbo, True, "guide, backward") for elbo in ELBOS]
    + [(elbo, False, "guide, backward, guide, backward, guide, backward") for elbo in (ELBOS[0], ELBOS[2])]
    + [(TraceGraph_ELBO, False, "guide, guide, guide, backward")],
)
def test_backward_calls_per_step(events, elbo, vectorize, expected):
    def logged_guide():
        events.append(("guide", None))
        guide()

    elbo = elbo(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo.loss_and_grads(model, logged_guide)
    assert ", ".join(event for event, _ in events) == expected


@pytest.mark.parametrize(("elbo", "guide_fn"), [(e, guide) for e in ELBOS] + [(e, score_guide) for e in ELBOS[:2]])
def test_looped_particles_are_averaged(elbo, guide_fn):
    loss, gradients = pyro_gradient(elbo(num_particles=3), model, guide_fn)
    pyro.set_rng_seed(1)
    single = [pyro_gradient(elbo(), model, guide_fn, seed=None) for _ in range(3)]
    assert_same(torch.tensor(loss), torch.tensor([each for each, _ in single]).mean())
    assert_same(gradients, {name: sum(grads[name] for _, grads in single) / 3 for name in gradients})


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("retain_graph", [None, True])
def test_graph_shared_by_looped_particles(elbo, retain_graph):
    leaf = pyro.param("loc", torch.zeros(4)).unconstrained()
    shared = leaf.exp()  # computed once, as a memoized Hessian would be

    def sharing_guide():
        pyro.param("loc")
        pyro.sample("mu", dist.Normal(shared[0], 1.0))
        with pyro.plate("units", 3):
            pyro.sample("y", dist.Normal(shared[1:], 1.0))

    freed = elbo is not TraceGraph_ELBO and not retain_graph
    with pytest.raises(RuntimeError, match="second time") if freed else nullcontext():
        elbo(num_particles=2, retain_graph=retain_graph).loss_and_grads(model, sharing_guide)


def test_vectorized_particles_run_the_guide_once_more_at_first():
    runs = []

    def counted_guide():
        runs.append(torch.is_grad_enabled())
        guide()

    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
    first, second = (pyro_gradient(elbo, model, counted_guide)[0] for _ in range(2))
    assert runs == [True] * 3
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert pyro_gradient(elbo, model, counted_guide)[0] == second
    assert first != second  # of the same seed, the first draws went into the extra run
    assert len(runs) == 4
