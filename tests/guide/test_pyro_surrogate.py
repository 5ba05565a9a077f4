"""What Pyro runs ``backward()`` on: the expression, and score functions (``docs/what_pyro_differentiates.rst``)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.pyro_guides import (
    ELBOS,
    assert_differ,
    assert_same,
    by_hand,
    first_traces,
    guide,
    leaves,
    minus_elbo,
    model,
    pyro_gradient,
    sample_sites,
    score_guide,
)
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.ops.provenance import get_provenance

# ------------------------------------------------------------------------------- the expression, reparameterized sites


@pytest.mark.parametrize("elbo", ELBOS)
def test_model_runs_on_the_tensors_of_the_guide(elbo):
    model_trace, guide_trace = first_traces(elbo(), model, guide)
    for name in ("mu", "y"):
        assert model_trace.nodes[name]["value"] is guide_trace.nodes[name]["value"]
        assert guide_trace.nodes[name]["value"].grad_fn is not None


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_reparameterized_surrogate_is_the_loss(elbo):
    surrogate = minus_elbo(*first_traces(elbo(), model, guide))
    loss, gradients = pyro_gradient(elbo(), model, guide)
    assert_same(torch.tensor(loss), surrogate.detach())
    assert_same(gradients, by_hand(surrogate))


def test_entropy_term_sends_a_pathwise_and_a_score_gradient():
    model_trace, guide_trace = first_traces(Trace_ELBO(), model, guide)
    path, score = -model_trace.log_prob_sum(), 0.0
    for site in sample_sites(guide_trace).values():
        fixed = dist.Normal(site["fn"].loc.detach(), site["fn"].scale.detach())
        path = path + fixed.log_prob(site["value"]).sum()  # gradient through the sample only
        score = score + site["fn"].log_prob(site["value"].detach()).sum()  # gradient through the parameters only
    path_gradients, score_gradients = by_hand(path), by_hand(score)
    _, gradients = pyro_gradient(Trace_ELBO(), model, guide)
    assert_same(gradients, {name: path_gradients[name] + score_gradients[name] for name in gradients})
    assert_differ(gradients, path_gradients)


# --------------------------------------------------------------------------------------------------- score functions


def test_score_parts_of_the_three_kinds_of_site():
    value = torch.tensor(0.8)
    full = dist.Normal(0.0, 1.0).score_parts(value)
    assert (full.score_function, full.entropy_term) == (0, full.log_prob)
    score = dist.Normal(0.0, 1.0).has_rsample_(False).score_parts(value)
    assert (score.score_function, score.entropy_term) == (score.log_prob, 0)
    # Proposals from Exponential(1), accepted with probability exp(-x), half of them: Exponential(2).
    rejector = dist.Rejector(dist.Exponential(torch.ones(3)), torch.neg, torch.tensor(0.5).log())
    drawn = rejector()
    partial = rejector.score_parts(drawn)
    assert partial.entropy_term is partial.log_prob
    assert_same(partial.log_prob, dist.Exponential(2.0).log_prob(drawn))
    assert_same(partial.score_function, -drawn - torch.tensor(0.5).log())


def costs_by_hand(elbo, model_trace, guide_trace):
    """The cost that each of the two score-function sites is charged, per unit and per particle."""
    log_p = {name: site["log_prob"].detach() for name, site in sample_sites(model_trace).items()}
    log_q = {name: site["log_prob"].detach() for name, site in sample_sites(guide_trace).items()}
    per_unit = log_p["y"] - log_q["y"] + log_p["z"]
    own = (log_p["mu"] - log_q["mu"]).reshape(-1, 1)
    if isinstance(elbo, TraceGraph_ELBO):  # only what was computed from the value of the site
        return {"mu": own + log_p["y"].sum(-1, True), "y": per_unit}
    return {"mu": own + per_unit.sum(-1, True), "y": own + per_unit}  # all, less the other members of the plate


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_costs_of_score_function_sites(elbo, num_particles):
    elbo = elbo(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    model_trace, guide_trace = first_traces(elbo, model, score_guide)
    provenance = {"y"} if isinstance(elbo, TraceGraph_ELBO) else set()
    assert get_provenance(model_trace.nodes["z"]["log_prob"]) == provenance
    surrogate, unreduced = -model_trace.log_prob_sum(), -model_trace.log_prob_sum()
    everything = -minus_elbo(model_trace, guide_trace).detach()
    for name, cost in costs_by_hand(elbo, model_trace, guide_trace).items():
        score = guide_trace.nodes[name]["log_prob"].reshape(num_particles, -1)
        surrogate = surrogate - (cost * score).sum()
        unreduced = unreduced - (everything * score).sum()
    loss, gradients = pyro_gradient(elbo, model, score_guide)
    assert_same(gradients, by_hand(surrogate / num_particles))
    assert_differ(gradients, by_hand(unreduced / num_particles))
    assert_same(torch.tensor(loss), -everything / num_particles)
    assert abs(loss - surrogate.item() / num_particles) > 0.1  # here the surrogate is not the loss


def test_costs_of_trace_and_tracegraph_differ():
    gradients = [pyro_gradient(elbo(), model, score_guide)[1] for elbo in (Trace_ELBO, TraceGraph_ELBO)]
    assert_differ(*gradients)
    gradients = [pyro_gradient(elbo(), model, guide)[1] for elbo in (Trace_ELBO, TraceGraph_ELBO)]
    assert_same(*gradients)  # nothing to reduce where every site is reparameterized


def test_differentiable_loss_has_the_value_of_the_loss():
    assert not hasattr(TraceGraph_ELBO, "differentiable_loss")
    pyro.set_rng_seed(1)
    differentiable = Trace_ELBO().differentiable_loss(model, score_guide)
    loss, gradients = pyro_gradient(Trace_ELBO(), model, score_guide)
    assert_same(differentiable.detach(), torch.tensor(loss))
    assert_same(by_hand(differentiable), gradients)


class TwoPoint(dist.Normal):
    """Draws one standard deviation up or down: the mean over both is exact for polynomials of degree three."""

    has_rsample = False
    sign = 1.0

    def sample(self, sample_shape=()):
        return (self.loc + self.sign * self.scale).detach()


@pytest.mark.parametrize(("elbo", "counted"), [(Trace_ELBO, 0.0), (TraceGraph_ELBO, 1.0)])
def test_trace_elbo_leaves_guide_only_sites_out_of_the_costs(elbo, counted, monkeypatch):
    def guide_with_factor():
        x = pyro.sample("x", TwoPoint(pyro.param("loc", torch.tensor(0.4)), 1.0))
        pyro.factor("tilt", 7.0 * x, has_rsample=True)

    def plain():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    mean_loss, mean_gradient = 0.0, 0.0
    for sign in (1.0, -1.0):
        monkeypatch.setattr(TwoPoint, "sign", sign)
        model_trace, guide_trace = first_traces(elbo(), plain, guide_with_factor)
        log_q = {name: site["log_prob"] for name, site in sample_sites(guide_trace).items()}
        cost = model_trace.log_prob_sum() - log_q["x"] - counted * log_q["tilt"]
        loss, gradients = pyro_gradient(elbo(), plain, guide_with_factor)
        assert_same(gradients, by_hand(-cost.detach() * log_q["x"]))
        mean_loss, mean_gradient = mean_loss + loss / 2, mean_gradient + gradients["loc"] / 2
    # E[loss] = loc**2 / 2 + 7 loc, so the derivative should be loc + 7.
    assert_same(torch.tensor(mean_loss), torch.tensor(0.4**2 / 2 + 7 * 0.4))
    assert_same(mean_gradient, torch.tensor(0.4 + 7.0 * counted))


def test_baseline_is_in_the_surrogate_and_not_in_the_loss():
    def guide_with_baseline():
        baseline = pyro.param("baseline", torch.tensor(0.9))
        loc = pyro.param("loc", torch.tensor(0.4))
        x = dist.Normal(loc, 1.0).has_rsample_(False)
        pyro.sample("x", x, infer={"baseline": {"baseline_value": baseline}})

    def plain():
        pyro.sample("x", dist.Normal(2.0, 1.0))

    model_trace, guide_trace = first_traces(TraceGraph_ELBO(), plain, guide_with_baseline)
    log_q, baseline = guide_trace.nodes["x"]["log_prob"], leaves()["baseline"]
    cost = (model_trace.log_prob_sum() - log_q).detach()
    loss, gradients = pyro_gradient(TraceGraph_ELBO(), plain, guide_with_baseline)
    assert_same(gradients, by_hand((cost - baseline) ** 2 - (cost - baseline).detach() * log_q))
    assert_same(torch.tensor(loss), -cost)
