"""The gradient-check suite passes right guides and fails each planted mistake, in the row that is made for it."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.planted_guides import make_guide, mode, model
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch.distributions import constraints

from laplace_amort import (
    GuideCheckError,
    LogJoint,
    ModelError,
    NotPositiveDefiniteError,
    SoftAbs,
    dual_path_param,
    observed_information,
    subsample_information,
)
from laplace_amort.guide.routes import ExplicitGradient
from laplace_amort.testing import CheckRow, CheckSettings, check_guide
from laplace_amort.testing.finite_differences import derivative

COUNTS = torch.tensor([1.0, 4.0, 0.0, 2.0], dtype=torch.float64)


# Each planted mistake with the rows that must fail; every other row must pass.
PLANTED = {
    "leak": {"path leak"},
    "single path": {"partial Hessian"},
    "detached mode": {"ELBO gradient", "mean of 'y'", "precision of 'mu'", "precision of 'rho'", "precision of 'y'"},
    "detached precision": {"ELBO gradient", "precision of 'mu'", "precision of 'rho'", "precision of 'y'"},
    "wrong sign": {"partial Hessian"},
    "missing Jacobian in the Hessian": {"partial Hessian"},
    "missing Jacobian in the density": {"log density"},
    "scale once too often": {"partial Hessian"},
}


def test_a_right_guide_passes():
    report = check_guide(model, make_guide(), COUNTS)
    assert report.ok
    checks = [row.check for row in report.rows]
    assert set(checks) == {"path leak", "partial Hessian", "log density", "ELBO gradient"} | {
        f"{what} of '{site}'" for what in ("mean", "precision") for site in ("mu", "rho", "y")
    }
    assert max(row.error for row in report.rows) < 1e-8
    assert "10 of 10 checks passed" in str(report)
    assert "repair of the expected precision: repaired 0 of 1" in str(report)


@pytest.mark.parametrize("bug", PLANTED)
def test_each_planted_mistake_fails_its_rows_and_no_other(bug):
    with pytest.raises(GuideCheckError) as caught:
        check_guide(model, make_guide(bug), COUNTS)
    report = caught.value.report
    assert {row.check for row in report.rows if not row.ok} == PLANTED[bug]
    for row in report.rows:
        if not row.ok:  # the message has the place, both values and what to do
            assert f"{row.check} at {row.where}: found {row.found:.9g}, expected {row.expected:.9g}" in str(
                caught.value
            )
            assert row.hint in str(caught.value)
    assert "FAILED" in str(report)


def test_a_negated_information_is_refused_by_the_repair():
    def guide(z):
        log_joint = LogJoint(model, z)
        theta = dual_path_param("theta_hat", torch.tensor([0.3, -0.2]))
        y_hat = mode(theta.mean, z)
        repair = SoftAbs(max_relative_change=1.9)
        precision, _ = repair(-observed_information(log_joint, theta.curvature, y_hat))
        normal = dist.MultivariateNormal(torch.cat([theta.mean, y_hat]), precision_matrix=precision)
        log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))

    with pytest.raises(NotPositiveDefiniteError, match="wrong sign"):
        check_guide(model, guide, COUNTS)


def test_the_unamortized_guide_passes_with_a_sample_of_its_elements():
    def guide(z):
        log_joint = LogJoint(model, z)
        loc = pyro.param("loc", torch.linspace(-0.5, 0.5, 6))
        precision, _ = SoftAbs()(observed_information(log_joint, loc))
        normal = dist.MultivariateNormal(loc, precision_matrix=precision)
        log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))

    report = check_guide(model, guide, COUNTS, settings=CheckSettings(max_elements=2))
    assert "loc: 2 of 6 elements, drawn at random" in report.notes
    assert not any(row.check == "path leak" for row in report.rows)  # there is no dual path to leak


def subsampling_model(z, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z), subsample_size=size) as index:
        y = pyro.sample("y", dist.Normal(mu, 0.7))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z[index])


def make_subsampling_guide(weights="right"):
    def guide(z, size=None):
        plate = pyro.plate("units", len(z), subsample_size=size, dim=-1)
        log_joint = LogJoint(subsampling_model, z, size).with_indices(units=plate.indices)
        mu = dual_path_param("mu_hat", torch.tensor([0.2]))
        y_hat = 0.5 * mu.mean + 0.3 * torch.log1p(z[plate.indices])
        information = observed_information(log_joint, mu.curvature, y_hat)
        scale = log_joint.subsample_scale()
        if weights == "right":
            precision = subsample_information(information, scale)
        elif weights == "none":  # the scaled information as it stands: the conditional of a unit is too narrow
            precision = information
        else:  # "twice": the weight once more on every block of the units
            root = scale.sqrt()
            precision = subsample_information(information * root * root[:, None], scale)
        border, tail = precision[1:, :1], precision[1:, 1:]
        regression = torch.linalg.solve(tail, border)
        schur_complement = precision[:1, :1] - border.T @ regression
        normal = dist.Normal(mu.mean[0], schur_complement[0, 0].rsqrt())
        drawn = pyro.sample("mu", normal)
        with plate:
            pyro.sample("y", dist.Normal(y_hat - regression[:, 0] * (drawn - mu.mean[0]), tail.diagonal().rsqrt()))

    return guide


@pytest.mark.parametrize("size", [None, 2, 3])
def test_conditional_sites_in_a_subsampled_plate_pass(size):
    report = check_guide(subsampling_model, make_subsampling_guide(), COUNTS, size)
    assert [row.where for row in report.rows if row.check == "path leak"] == ["mean of 'mu'"]


@pytest.mark.parametrize("weights", ["none", "twice"])
def test_a_wrong_subsampling_weight_fails(weights):
    with pytest.raises(GuideCheckError) as caught:
        check_guide(subsampling_model, make_subsampling_guide(weights), COUNTS, 2)
    assert {row.check for row in caught.value.report.rows if not row.ok} == {"partial Hessian"}
    check_guide(subsampling_model, make_subsampling_guide(weights), COUNTS)  # right where nothing is subsampled


def test_a_guide_that_leaves_the_plate_to_the_model_is_told_to_open_it():
    def guide(z, size):
        loc = pyro.param("loc", torch.zeros(1 + size))
        joint = pyro.sample("joint", dist.Normal(loc, 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Delta(joint[0]))
        pyro.sample("y", dist.Delta(joint[1:], event_dim=1))

    with pytest.raises(ModelError, match="Open the plate in the guide"):
        check_guide(subsampling_model, guide, COUNTS, 2)


def test_options_a_and_graph_elbo_through_the_settings():
    route = ExplicitGradient(Trace_ELBO())

    def guide(z):
        log_joint = LogJoint(model, z)
        theta = pyro.param("theta_hat", torch.tensor([0.3, -0.2]))
        y_hat = mode(route.hide(theta), z)
        precision, _ = SoftAbs()(observed_information(log_joint, theta, y_hat))
        normal = dist.MultivariateNormal(torch.cat([theta, y_hat]), precision_matrix=precision)
        log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))

    with pytest.raises(GuideCheckError) as caught:
        check_guide(model, guide, COUNTS, settings=CheckSettings(elbo=route))
    failed = {row.check for row in caught.value.report.rows if not row.ok}
    # The route brings the missing gradient of the loss back, and hides the dependence everywhere else.
    assert "ELBO gradient" not in failed
    assert "mean of 'y'" in failed
    for elbo in (TraceGraph_ELBO(num_particles=2), Trace_ELBO(num_particles=3, vectorize_particles=True)):
        pyro.clear_param_store()
        assert check_guide(model, make_guide(), COUNTS, settings=CheckSettings(elbo=elbo)).ok


def test_float32_has_its_own_tolerance():
    torch.set_default_dtype(torch.float32)
    report = check_guide(model, make_guide(), COUNTS.float())
    assert {row.tolerance for row in report.rows} == {0, 2e-2}
    with pytest.raises(GuideCheckError, match="partial Hessian"):
        check_guide(model, make_guide("single path"), COUNTS.float())


def test_an_indefinite_information_is_compared_after_the_same_repair():
    """A vague guess far from the mode: both sides repaired by SoftAbs, and the report says so."""

    def student(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.StudentT(2.0, mu, 0.1))
            pyro.sample("z", dist.StudentT(2.0, y, 0.1), obs=z)

    def guide(z):
        log_joint = LogJoint(student, z)
        mu = dual_path_param("mu_hat", torch.tensor([0.3]))
        y_hat = mu.mean + 0.5 * z
        precision, report = SoftAbs()(observed_information(log_joint, mu.curvature, y_hat))
        assert report.num_repaired == 1
        normal = dist.MultivariateNormal(torch.cat([mu.mean, y_hat]), precision_matrix=precision)
        log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))

    assert "repaired 1 of 1 matrix" in check_guide(student, guide, torch.tensor([0.05, 1.5])).notes[-1]


def test_parameters_gradients_and_random_state_are_left_alone():
    guide = make_guide()
    guide(COUNTS)
    leaf = pyro.param("theta_hat").unconstrained()
    before, leaf.grad = leaf.detach().clone(), torch.tensor([5.0, 6.0])
    state = torch.get_rng_state()
    check_guide(model, guide, COUNTS)
    assert torch.equal(leaf.detach(), before)
    assert torch.equal(leaf.grad, torch.tensor([5.0, 6.0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_bars_go_to_stderr_if_asked(capsys):
    check_guide(model, make_guide(), COUNTS, settings=CheckSettings(progress=True))
    captured = capsys.readouterr()
    assert "partial Hessian" in captured.err
    assert "theta_hat" in captured.err
    assert captured.out == ""


def simple_model():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def no_parameter():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def nothing_drawn():
    pyro.sample("x", dist.Delta(pyro.param("loc", torch.tensor(0.0))))


def not_reparameterized():
    pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0).has_rsample_(False))


def not_gaussian():
    pyro.sample("x", dist.StudentT(3.0, pyro.param("loc", torch.tensor(0.0)), 1.0))


def not_affine():
    raw = pyro.sample("raw", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), infer={"is_auxiliary": True})
    pyro.sample("x", dist.Delta(raw**3 + raw))


def latent_missing():
    pyro.sample("other", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), infer={"is_auxiliary": True})


def too_many_draws():
    loc = pyro.param("loc", torch.zeros(2))
    raw = pyro.sample("raw", dist.Normal(loc, 1.0).to_event(1), infer={"is_auxiliary": True})
    pyro.sample("x", dist.Delta(raw.sum(-1)))


def make_stateful():
    calls = itertools.count()

    def stateful():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)) + 0.1 * next(calls), 1.0))

    return stateful


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (no_parameter, "the guide has no parameter"),
        (nothing_drawn, "draws no continuous site"),
        (not_reparameterized, r"site 'x' of the guide \(Normal\) is not reparameterized"),
        (not_gaussian, "not Gaussian in unconstrained coordinates"),
        (not_affine, "not Gaussian in unconstrained coordinates"),
        (latent_missing, r"no site for the latents \['x'\]"),
        (too_many_draws, "draws 2 numbers for 1 unconstrained latents"),
        (make_stateful(), "differs between two runs with the same seed"),
    ],
)
def test_what_cannot_be_checked_is_refused(guide, message):
    with pytest.raises(GuideCheckError, match=message):
        check_guide(simple_model, guide)


def test_a_kink_is_undecided_and_not_passed():
    """|x| at the mean: neither finite differences nor autograd knows the second derivative."""

    def kinked():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("kink", -x.abs())

    def guide():
        log_joint = LogJoint(kinked)
        loc = pyro.param("loc", torch.zeros(1))
        precision = observed_information(log_joint, loc)
        normal = dist.MultivariateNormal(loc, precision_matrix=precision)
        log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))

    with pytest.raises(GuideCheckError, match="Finite differences cannot decide") as caught:
        check_guide(kinked, guide)
    assert "UNDECIDED" in str(caught.value.report)


def test_a_guide_in_constrained_space_with_plain_sites():
    """A LogNormal site is Gaussian in unconstrained coordinates; a positive parameter is perturbed in its own."""

    def positive():
        pyro.sample("x", dist.LogNormal(0.2, 0.5))

    def guide():
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample("x", dist.LogNormal(pyro.param("loc", torch.tensor(0.2)), scale))

    report = check_guide(positive, guide)
    assert {row.where for row in report.rows if row.check == "ELBO gradient"} == {"loc", "scale"}


def test_finite_differences_report_their_own_error():
    """Exact for a quintic; a step function is given up on; the step is chosen by scale."""
    value, error = derivative(lambda h: torch.tensor([(1 + h) ** 5, 3.0]), torch.float64, 1e-9)
    assert torch.allclose(value, torch.tensor([5.0, 0.0]), atol=1e-10)
    assert (error < 1e-9).all()
    _, error = derivative(lambda h: torch.tensor([float(h > 0)]), torch.float64, 1e-9)
    assert error > 0.1
    value, error = derivative(lambda h: torch.tensor([1e4 * h]).sin() / 1e4, torch.float64, 1e-6)
    assert abs(value - 1) < 1e-6
    _, error = derivative(lambda h: torch.tensor([float("nan")]), torch.float64, 1e-6)
    assert torch.isinf(error).all()


def test_a_row_is_ok_only_within_tolerance_and_decided():
    row = CheckRow("a", "b", 1.0, 1.0, 0.5, 0.6)
    assert row.ok
    assert row.verdict == "ok"
    assert not CheckRow("a", "b", 1.0, 1.0, float("nan"), 0.6).ok
    assert CheckRow("a", "b", 1.0, 1.0, 0.7, 0.6).verdict == "FAILED"
    assert CheckRow("a", "b", 1.0, 1.0, 0.5, 0.6, undecided="why").verdict == "UNDECIDED"
