"""Guides made by hand around one joint draw: every ELBO of Pyro sees the density that LogJoint computes."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import MODELS, SUBSAMPLED, counts, nested_plates, normals
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

import laplace_amort.model.guide_sites
from laplace_amort import LogJoint, ModelError, observed_information

ELBOS = [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO]


class JointGuide:
    """A Gaussian guide over all packed latents at once, which remembers its draws."""

    def __init__(self, case):
        self.log_joint = LogJoint(case.model, *case.args, **case.kwargs)
        size = self.log_joint.size
        self.start = 0.4 * normals(size, seed=5)
        self.scale_tril = 0.3 * torch.eye(size) + 0.05 * normals(size, size, seed=6).tril(-1)
        self.draws = []
        self.log_joint_of_draws = lambda draws: torch.stack([self.log_joint(draw) for draw in draws])

    def distribution(self):
        return dist.MultivariateNormal(pyro.param("loc", self.start), scale_tril=self.scale_tril)

    def __call__(self, *args, **kwargs):
        joint = pyro.sample("joint", self.distribution(), infer={"is_auxiliary": True})
        self.draws.append(joint)
        return self.log_joint.sample_sites(joint)

    def losses(self, num_particles):
        """The losses of the last particles, by hand: log q - log p, every Jacobian in log p."""
        draws = torch.cat([draw.reshape(-1, self.log_joint.size) for draw in self.draws])[-num_particles:]
        assert len(draws) == num_particles
        return self.distribution().log_prob(draws) - self.log_joint_of_draws(draws)


def make(name):
    case = MODELS[name]()
    return case, JointGuide(case)


def check_loss_and_gradient(case, guide, elbo):
    """Loss and gradient of an ELBO, exactly those of the draws that the guide made."""
    loss = elbo.loss_and_grads(case.model, guide, *case.args, **case.kwargs)
    loc = pyro.param("loc")
    gradient, loc.grad = loc.grad, None
    expected = guide.losses(elbo.num_particles).mean()
    torch.testing.assert_close(torch.as_tensor(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    (expected_gradient,) = torch.autograd.grad(expected, loc)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


PARTICLES = {"one": (1, False), "two, looped": (2, False), "two, vectorized": (2, True)}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SUBSAMPLED])
@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("elbo", ELBOS)
def test_loss_and_gradient_are_those_of_the_draws(name, particles, elbo):
    num_particles, vectorize = PARTICLES[particles]
    case, guide = make(name)
    check_loss_and_gradient(
        case, guide, elbo(num_particles=num_particles, vectorize_particles=vectorize, retain_graph=True)
    )


def eight_schools_log_joint(draws, z, errors):
    """The log joint density of all draws at once, ``(P, 10)`` to ``(P,)``, written down from the model."""
    mu, log_tau, y = draws[:, 0], draws[:, 1], draws[:, 2:]
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(log_tau.exp()) + log_tau
    log_p = log_p + dist.Normal(mu[:, None], log_tau.exp()[:, None]).log_prob(y).sum(-1)
    return log_p + dist.Normal(y, errors).log_prob(z).sum(-1)


@pytest.mark.parametrize(("elbo", "vectorize"), [*((elbo, True) for elbo in ELBOS), (Trace_ELBO, False)])
def test_a_thousand_particles(elbo, vectorize):
    case, guide = make("eight_schools")
    guide.log_joint_of_draws = lambda draws: eight_schools_log_joint(draws, *case.args)
    check_loss_and_gradient(case, guide, elbo(num_particles=1000, vectorize_particles=vectorize, retain_graph=True))


def naive_sample_sites(log_joint, packed):
    """Split the draw without a thought for leading dimensions."""
    for name, site in log_joint.sites.items():
        with laplace_amort.model.guide_sites.site_plates(site.plates, {}):
            pyro.sample(name, dist.Delta(packed[..., site.slice].reshape(packed.shape[:-1] + site.shape)))


def sites_without_jacobians(log_joint, packed):
    with poutine.block(hide_fn=lambda site: site["name"].endswith("_log_jacobian")):
        LogJoint.sample_sites(log_joint, packed)


def plant(guide, bug):
    guide.log_joint.sample_sites = lambda packed: bug(guide.log_joint, packed)


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("elbo", ELBOS)
def test_check_finds_a_missing_jacobian(elbo, particles):
    num_particles, vectorize = PARTICLES[particles]
    case, guide = make("eight_schools")
    plant(guide, sites_without_jacobians)
    with pytest.raises(AssertionError, match="not close"):
        check_loss_and_gradient(
            case, guide, elbo(num_particles=num_particles, vectorize_particles=vectorize, retain_graph=True)
        )


def test_check_finds_a_draw_split_without_its_particles():
    """Pyro itself does not notice: without validation, only the loss is wrong."""
    case, guide = make("conjugate_normal")
    plant(guide, naive_sample_sites)
    with pyro.validation_enabled(False), pytest.raises(AssertionError, match="not close"):
        check_loss_and_gradient(case, guide, Trace_ELBO(num_particles=3, vectorize_particles=True, retain_graph=True))


def losses_of(case, guide, vectorize):
    """600 independent losses; of 20 particles each where those are vectorized."""
    elbo, repeats = (Trace_ELBO(num_particles=20, vectorize_particles=True), 30) if vectorize else (Trace_ELBO(), 600)
    return torch.tensor([elbo.loss(case.model, guide, *case.args) for _ in range(repeats)])


def z_score(looped, vectorized):
    difference = looped.mean() - vectorized.mean()
    return (difference / (looped.var() / len(looped) + vectorized.var() / len(vectorized)).sqrt()).abs()


def test_looped_and_vectorized_particles_have_the_same_mean():
    """False-alarm rate below 2e-5: the chance that a t variable with 29 degrees of freedom exceeds 5.1 in size."""
    case, guide = make("conjugate_normal")
    looped = losses_of(case, guide, vectorize=False)
    assert z_score(looped, losses_of(case, guide, vectorize=True)) < 5.1
    plant(guide, naive_sample_sites)
    with pyro.validation_enabled(False):
        assert z_score(looped, losses_of(case, guide, vectorize=True)) > 5.1


@pytest.mark.parametrize("name", ["eight_schools", "correlated", "nested_plates", "support_simplex", "masked"])
def test_automatic_guide_agrees_under_trace_elbo_and_loses_jacobians_under_mean_field(name):
    case, guide = make(name)
    automatic = AutoMultivariateNormal(case.model)
    automatic(*case.args)
    automatic.loc.data = guide.start
    diagonal = guide.scale_tril.diagonal()
    automatic.scale, automatic.scale_tril = diagonal, guide.scale_tril / diagonal.unsqueeze(-1)

    def loss(elbo, of):
        pyro.set_rng_seed(9)
        return torch.as_tensor(elbo().loss(case.model, of, *case.args))

    expected = loss(Trace_ELBO, guide)
    torch.testing.assert_close(loss(Trace_ELBO, automatic), expected, rtol=1e-12, atol=0)
    for elbo in ELBOS:
        torch.testing.assert_close(loss(elbo, guide), expected, rtol=1e-12, atol=0)
    if name == "masked":  # there Pyro's mean-field ELBO loses the mask as well
        return
    log_jacobian = guide.log_joint.log_jacobian(guide.draws[-1]).detach()
    assert log_jacobian.abs() > 0.01
    torch.testing.assert_close(loss(TraceMeanField_ELBO, automatic) - expected, log_jacobian, rtol=1e-10, atol=0)


def is_real(support):
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SUBSAMPLED])
def test_sites_lie_in_the_plates_of_the_model(name):
    case, guide = make(name)
    guide_trace = poutine.trace(guide).get_trace(*case.args, **case.kwargs)
    model_trace = poutine.trace(poutine.replay(case.model, trace=guide_trace)).get_trace(*case.args, **case.kwargs)
    constrained = guide.log_joint.constrain(guide.draws[-1])
    for site, value in constrained.items():
        ours, theirs = guide_trace.nodes[site], model_trace.nodes[site]
        vectorized = [frame for frame in theirs["cond_indep_stack"] if frame.vectorized]
        assert list(ours["cond_indep_stack"]) == vectorized
        assert torch.equal(theirs["value"], value)
        assert ours["fn"].batch_shape == theirs["fn"].batch_shape
        assert (f"{site}_log_jacobian" in guide_trace.nodes) is not is_real(theirs["fn"].support)


@pytest.mark.parametrize("name", ["eight_schools", "correlated", "nested_plates", "sequential"])
def test_outside_of_any_handler_the_values_come_back(name):
    _, guide = make(name)
    for site, value in guide.log_joint.sample_sites(guide.start).items():
        assert torch.equal(value, guide.log_joint.constrain(guide.start)[site])


def test_plates_made_by_the_guide_are_used():
    z = normals(2, 3)
    log_joint, packed = LogJoint(nested_plates, z), normals(9)

    def guide(made):
        plates = [pyro.plate("units", 3, dim=-1), pyro.plate("groups", 2, dim=-2)] if made else []
        return log_joint.sample_sites(packed, plates=plates)

    # A plate made twice would be two sites of one name, which a trace refuses.
    given, made_here = (poutine.trace(guide).get_trace(made) for made in (True, False))
    assert set(given.nodes) == set(made_here.nodes)
    for site in log_joint.sites:
        assert given.nodes[site]["cond_indep_stack"] == made_here.nodes[site]["cond_indep_stack"]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ["eight_schools", "dependent_support", "nested_plates", "correlated"])
def test_predictive(name, parallel):
    case, guide = make(name)
    samples = Predictive(case.model, guide=guide, num_samples=3, parallel=parallel)(*case.args)
    draws = torch.cat([draw.reshape(-1, guide.log_joint.size) for draw in guide.draws])[-3:]
    for i, draw in enumerate(draws):
        for site, value in guide.log_joint.constrain(draw).items():
            torch.testing.assert_close(samples[site][i].reshape(value.shape), value, rtol=1e-12, atol=0)


def information_guide(log_joint):
    """A guide that needs second derivatives, with its mean as the only parameter."""

    def guide(*args):
        loc = pyro.param("loc", lambda: log_joint.initial())
        precision = observed_information(log_joint, loc)
        joint = pyro.sample("joint", dist.MultivariateNormal(loc, precision_matrix=precision), infer=AUXILIARY)
        log_joint.sample_sites(joint)

    return guide


AUXILIARY = {"is_auxiliary": True}


def test_no_grad_changes_nothing_but_the_graph():
    case = MODELS["conjugate_normal"]()
    guide = information_guide(LogJoint(case.model, *case.args))
    svi = SVI(case.model, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    guide(*case.args)  # makes the parameter
    pyro.set_rng_seed(1)
    expected = Trace_ELBO().differentiable_loss(case.model, guide, *case.args)
    assert expected.requires_grad
    for evaluate in (svi.evaluate_loss, torch.no_grad()(lambda *args: Trace_ELBO().loss(case.model, guide, *args))):
        pyro.set_rng_seed(1)
        assert evaluate(*case.args) == expected.item()


def test_loss_of_a_gaussian_model_is_minus_the_log_evidence():
    """At the mode of a Gaussian log joint the guide is the posterior, and every draw has the evidence as its ELBO."""
    case = MODELS["conjugate_normal"]()
    (z,) = case.args
    log_joint = LogJoint(case.model, z)
    zero = torch.zeros(log_joint.size, requires_grad=True)
    (slope,) = torch.autograd.grad(log_joint(zero), zero)
    pyro.param("loc", torch.linalg.solve(observed_information(log_joint, zero.detach()), slope))
    evidence = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) * (0.7**2 + 0.5**2) + 1.0).log_prob(z)
    for elbo in ELBOS:
        loss = torch.as_tensor(elbo().loss(case.model, information_guide(log_joint), z))
        torch.testing.assert_close(loss, -evidence, rtol=1e-12, atol=0)


def test_a_subsampled_plate_is_refused():
    case = MODELS["subsample_size"]()
    log_joint = LogJoint(case.model, *case.args).with_indices(**case.indices)
    plate = pyro.plate("units", 6, subsample_size=2)
    for plates in ([], [plate]):
        with pytest.raises(ModelError, match=r"site 'y' lies in plate 'units', which subsamples 2 of 6; the density"):
            log_joint.sample_sites(torch.zeros(3), plates=plates)


def subsampled_units(z, size, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z), subsample_size=size) as indices:
        seen.append(indices.tolist())
        y = pyro.sample("y", dist.LogNormal(mu, 0.7))
        pyro.sample("z", dist.Poisson(y), obs=z[indices])


def batch_guide(log_joint, batch, noise, divide=True):
    """Globals first, then the batch in a site of its own; the noise of each unit is given, so nothing is random."""

    def guide(z, size, seen):
        mu = pyro.param("mu_loc", torch.tensor(0.3))
        pyro.sample("mu", dist.Delta(mu))
        plate = pyro.plate("units", len(z), subsample_size=size, subsample=batch)
        inner = log_joint.with_indices(units=plate.indices)
        packed = torch.cat([mu.reshape(1), torch.zeros(size)])
        precision = observed_information(inner, packed).diagonal()[1:]
        if divide:  # the log joint is scaled by N / B; the conditional of a unit is not
            precision = precision / inner.subsample_scale()[1:]
        with plate as indices:
            log_y = noise[indices] * precision.rsqrt()
            pyro.factor("entropy", dist.Normal(0.0, precision.rsqrt()).log_prob(log_y) - log_y, has_rsample=True)
            pyro.sample("y", dist.Delta(log_y.exp()))

    return guide


def loss_of_batches(z, size, batches, **options):
    log_joint = LogJoint(subsampled_units, z, size, [])
    noise = normals(len(z), seed=7)
    guides = [batch_guide(log_joint, torch.tensor(batch), noise, **options) for batch in batches]
    return sum(Trace_ELBO().loss(subsampled_units, guide, z, size, []) for guide in guides) / len(guides)


def test_batches_average_to_the_whole():
    z = counts(5)
    whole = loss_of_batches(z, 5, [range(5)])
    for size in (1, 2, 3):
        batches = list(itertools.combinations(range(5), size))
        assert loss_of_batches(z, size, batches) == pytest.approx(whole, rel=1e-12)
        assert loss_of_batches(z, size, batches, divide=False) != pytest.approx(whole, rel=1e-3)


def test_guide_inner_run_and_model_share_their_indices():
    """Over one epoch of 5 units in batches of 2; the last one is short."""
    z, noise = counts(5), normals(5, seed=7)
    order = torch.randperm(5)
    for batch in order.split(2):
        seen = []
        log_joint = LogJoint(subsampled_units, z, len(batch), seen)
        seen.clear()
        guide = batch_guide(log_joint, batch, noise)
        guide_trace = poutine.trace(guide).get_trace(z, len(batch), [])
        assert seen == [batch.tolist()]  # the inner run
        poutine.trace(poutine.replay(subsampled_units, trace=guide_trace)).get_trace(z, len(batch), seen)
        assert seen == [batch.tolist()] * 2  # and SVI's own
        assert guide_trace.nodes["units"]["value"].tolist() == batch.tolist()
