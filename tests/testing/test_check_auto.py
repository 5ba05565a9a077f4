"""check_guide on AutoLaplaceFamily: right heads and repairs pass, each planted mistake fails in the row made for it."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guides import closed_form
from helpers.models import conjugate_normal, counts, normals
from helpers.unit_models import FAMILY_MODELS
from helpers.unit_models import batches as poisson
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide.initialization import init_to_value

from laplace_amort.autodiff.information import ArrowheadBlocks, arrowhead_information
from laplace_amort.errors import GuideCheckError
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.heads import JointCurvature, MarginalCurvature
from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.linalg.boost import Boost
from laplace_amort.linalg.modified_cholesky import ModifiedCholesky
from laplace_amort.linalg.softabs import SoftAbs
from laplace_amort.testing import (
    CheckSettings,
    DensePrecision,
    JointPrecision,
    MarginalPrecision,
    check_guide,
    expected,
)
from laplace_amort.testing.finite_differences import second_derivative
from laplace_amort.units.closed_form import ClosedFormMode
from laplace_amort.units.modes import FreeMode

HEADS = {"joint": JointCurvature(), "marginal": MarginalCurvature()}


def small(z, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z), subsample_size=size) as indices:
        y = pyro.sample("y", dist.Normal(mu, 0.7))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z[indices])


def pair(z):
    """Two latents in each unit."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        a = pyro.sample("a", dist.Normal(mu, 0.7))
        b = pyro.sample("b", dist.Normal(0.0, 0.5))
        pyro.sample("z", dist.Poisson((a + 0.5 * b).exp()), obs=z)


def binomial(z):
    """Units that say little of a scale with a vague prior: its joint curvature is negative."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 3.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0, tau))
        pyro.sample("z", dist.Binomial(3, logits=y), obs=z)


def heavy_tails(z):
    """Free modes stand where the log density of a unit curves upwards."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.StudentT(3.0, mu, 2.0))
        pyro.sample("z", dist.StudentT(2.0, y, 0.2), obs=z)


def check(model, guide, *args, **settings):
    return check_guide(model, guide, *args, settings=CheckSettings(**settings))


def failing_rows(model, guide, *args, **settings):
    with pytest.raises(GuideCheckError) as caught:
        check(model, guide, *args, **settings)
    return {row.check for row in caught.value.report.rows if not row.ok}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("model", "args"),
    [
        (poisson, (counts(2),)),
        (small, (counts(5), 2)),
        (pair, (counts(2),)),
    ],
    ids=["two globals", "subsampled", "pair"],
)
def test_both_heads_pass(model, args, head):
    report = check(model, AutoLaplaceFamily(model, head=HEADS[head]), *args)
    assert report.ok
    assert max(row.error for row in report.rows) < 1e-7
    assert report.notes[-1].startswith("repair of the expected precision: head repaired")


@pytest.mark.parametrize("name", ["without globals", "with parameter", "dependent_support", "weighted"])
def test_other_models_pass(name):
    case = FAMILY_MODELS[name]()
    assert check(case.model, AutoLaplaceFamily(case.model), *(arg[:2] for arg in case.args)).ok


def test_an_indefinite_schur_complement_is_repaired_on_both_sides():
    z, start = torch.tensor([0.0, 1.0, 2.0]), init_to_value(values={"tau": torch.tensor(0.6)})
    guide = AutoLaplaceFamily(binomial, init_loc_fn=start)
    assert guide.gaussian(z).head_report.smallest_before < 0
    assert "head repaired 1 of 1" in check(binomial, guide, z).notes[-1]
    assert failing_rows(binomial, guide, z, precision=DensePrecision()) == {"partial Hessian"}  # as one matrix
    for repair in (ModifiedCholesky(), Boost(strength=0.3)):
        pyro.clear_param_store()
        assert check(binomial, AutoLaplaceFamily(binomial, init_loc_fn=start, repair=repair), z).ok


def test_indefinite_tails_are_repaired_unit_by_unit():
    z = torch.tensor([0.05, 1.5])
    guide = AutoLaplaceFamily(heavy_tails, FreeMode())
    assert guide.gaussian(z).tail_report.num_repaired == 1
    report = check(heavy_tails, guide, z)
    assert "tails repaired" in report.notes[-1]
    # The centers are parameters, and each of their derivatives is checked.
    assert any(row.where.startswith("AutoLaplaceFamily.mode.loc") for row in report.rows)
    other = {"precision": JointPrecision(tail_repair=SoftAbs(floor=50.0))}
    assert failing_rows(heavy_tails, guide, z, **other) == {"partial Hessian"}


def test_closed_form_modes_and_other_elbos_pass():
    guide = AutoLaplaceFamily(conjugate_normal, ClosedFormMode(closed_form))
    for elbo in (Trace_ELBO(2, vectorize_particles=True), TraceMeanField_ELBO(num_particles=2)):
        assert check(conjugate_normal, guide, normals(3), elbo=elbo).ok


def test_the_unit_plate_of_the_guide_is_the_one_expected():
    def crossed(z):
        persons = pyro.plate("persons", 2, dim=-2)
        items = pyro.plate("items", 2, dim=-1)
        with persons:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with items:
            ease = pyro.sample("ease", dist.Normal(0.0, 1.0))
        with persons, items:
            pyro.sample("z", dist.Poisson((ability + ease).exp()), obs=z)

    assert check(crossed, AutoLaplaceFamily(crossed, unit_plate="items"), counts(2, 2)).ok


# ------------------------------------------------------------------------------------------ planted mistakes


@dataclass(frozen=True)
class Half(MarginalCurvature):
    """Half of the curvature of the log-determinants."""

    def __call__(self, log_joint, global_, local, arrowhead, weight=1.0):
        right = super().__call__(log_joint, global_, local, arrowhead, weight)
        return (right + arrowhead.schur_complement) / 2


@dataclass(frozen=True)
class Opposite(MarginalCurvature):
    """The log-determinants with the wrong sign."""

    def __call__(self, log_joint, global_, local, arrowhead, weight=1.0):
        right = super().__call__(log_joint, global_, local, arrowhead, weight)
        return 2 * arrowhead.schur_complement - right


@dataclass(frozen=True)
class Unweighted(MarginalCurvature):
    """A minibatch whose log-determinants count once."""

    def __call__(self, log_joint, global_, local, arrowhead, weight=1.0):
        right = super().__call__(log_joint, global_, local, arrowhead, weight)
        return arrowhead.schur_complement + (right - arrowhead.schur_complement) / weight


@dataclass(frozen=True)
class StraightModes(MarginalCurvature):
    """The Hessian of the log-determinants along a straight path of the modes, which bends in truth; and detached."""

    def __call__(self, log_joint, global_, local, arrowhead, weight=1.0):
        def half_log_det(t):
            moved = local.detach() - (arrowhead.regression.detach() @ t)
            tails = ArrowheadBlocks(*arrowhead_information(log_joint, global_.detach() + t, moved)).tail
            return weight / 2 * tails.log().sum()

        zero = torch.zeros_like(global_)
        return arrowhead.schur_complement + torch.autograd.functional.hessian(half_log_det, zero)


@dataclass(frozen=True)
class Detached(MarginalCurvature):
    """The right value without its derivative."""

    def __call__(self, log_joint, global_, local, arrowhead, weight=1.0):
        right = super().__call__(log_joint, global_, local, arrowhead, weight)
        return arrowhead.schur_complement + (right - arrowhead.schur_complement).detach()


@dataclass(frozen=True)
class DetachedJoint(JointCurvature):
    def __call__(self, log_joint, global_, local, arrowhead, weight=1.0):
        return arrowhead.schur_complement.detach()


GRADIENTS = {"ELBO gradient", "precision of 'mu'"}
# Each planted head, the arguments that show it, and the rows that must fail.
PLANTED = {
    "half": (Half(), (counts(2),), {"partial Hessian"}),
    "opposite sign": (Opposite(), (counts(2),), {"partial Hessian"}),
    "straight modes": (StraightModes(), (counts(2),), {"partial Hessian"} | GRADIENTS),
    "unweighted": (Unweighted(), (counts(5), 2), {"partial Hessian"}),
    "detached": (Detached(), (counts(2),), GRADIENTS),
    "detached joint": (DetachedJoint(), (counts(2),), GRADIENTS),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_head_fails_its_rows_and_no_other(name):
    head, args, rows = PLANTED[name]
    assert failing_rows(small, AutoLaplaceFamily(small, head=head), *args) == rows


def test_an_unweighted_head_is_right_where_nothing_is_subsampled():
    assert check(small, AutoLaplaceFamily(small, head=Unweighted()), counts(2)).ok


@pytest.mark.parametrize(
    ("head", "precision"), [("joint", MarginalPrecision()), ("marginal", JointPrecision())], ids=["joint", "marginal"]
)
def test_one_head_is_not_the_other(head, precision):
    guide = AutoLaplaceFamily(small, head=HEADS[head])
    assert failing_rows(small, guide, counts(2), precision=precision) == {"partial Hessian"}


def test_the_weight_of_a_minibatch_left_on_its_units_fails(monkeypatch):
    monkeypatch.setattr(Arrowhead, "unscale", lambda self, weight: self)
    assert failing_rows(small, AutoLaplaceFamily(small), counts(5), 2) == {"partial Hessian"}


def test_a_mode_without_derivative_fails():
    class Frozen(ClosedFormMode):
        def prepare(self, start):
            return self

        def find(self, problem, global_, start):
            return super().find(problem, global_.detach(), start)

    guide = AutoLaplaceFamily(conjugate_normal, Frozen(closed_form))
    assert failing_rows(conjugate_normal, guide, normals(2)) == {"ELBO gradient", "mean of 'y'"}


def test_a_head_of_an_unknown_kind_needs_its_expectation():
    def doubled(log_joint, global_, local, arrowhead, weight=1.0):
        return 2 * arrowhead.schur_complement

    @dataclass(frozen=True)
    class Doubled(JointPrecision):
        def _addition(self, units, point, schur, head):
            return schur, torch.zeros_like(schur)

    guide = AutoLaplaceFamily(conjugate_normal, head=doubled)
    with pytest.raises(GuideCheckError, match=r"no expectation is known for the head .*\n    CheckSettings\(prec"):
        check(conjugate_normal, guide, normals(3))
    assert check(conjugate_normal, guide, normals(3), precision=Doubled()).ok
    assert failing_rows(conjugate_normal, guide, normals(3), precision=JointPrecision()) == {"partial Hessian"}


# ------------------------------------------------------------------------------------------ the oracle


def runaway(y):
    """More than the prior holds: no maximum."""
    return 0.6 * y**2 + 0.1 * y


def saddle(y):
    """A minimum at zero, between two maxima; the search has no slope to follow there."""
    return -3.0 * (y**2 - 1.0) ** 2


@pytest.mark.parametrize(
    ("factor", "message"), [(runaway, "the modes of the units were not found"), (saddle, "where they have no maximum")]
)
def test_modes_that_do_not_exist_leave_the_marginal_curvature_unchecked(factor, message):
    def model(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.factor("factor", factor(y))

    guide = AutoLaplaceFamily(model, FreeMode())
    with pytest.raises(GuideCheckError, match=message):
        check(model, guide, normals(2), precision=MarginalPrecision())


def test_the_modes_of_the_oracle_are_those_of_the_guide_from_a_start_that_overshoots():
    z = torch.tensor([40.0, 0.0])
    gaussian = AutoLaplaceFamily(small).gaussian(z)
    units = expected._Units(gaussian.unit_model.density, gaussian.unit_model.layout)
    for start in (-6.0, 0.0, 9.0):
        found = units._mode(gaussian.global_loc.detach(), torch.full((2,), start))
        torch.testing.assert_close(found, gaussian.local_loc[:, 0].detach(), rtol=1e-9, atol=1e-9)
    half = units.half_log_det(gaussian.global_loc.detach(), torch.zeros(2))
    torch.testing.assert_close(half, gaussian.precision.tail.detach().log().sum() / 2, rtol=1e-9, atol=1e-9)


def test_second_derivatives_report_their_own_error():
    """Exact for a polynomial; a kink is given up on."""
    value, error = second_derivative(lambda h: torch.tensor([(1 + h) ** 5, 3.0]), torch.float64, 1e-9)
    assert torch.allclose(value, torch.tensor([20.0, 0.0]), atol=1e-8)
    assert (error < 1e-7).all()
    _, error = second_derivative(lambda h: torch.tensor([abs(h)]), torch.float64, 1e-9)
    assert error > 0.1
    value, error = second_derivative(lambda h: torch.tensor([h], dtype=torch.float32).exp(), torch.float32, 1e-3)
    assert abs(float(value) - 1) < 1e-3


def test_a_loss_may_differ_by_rounding_between_runs_and_no_more():
    """A search for modes that starts where the last one ended."""
    drift = [0.0]

    def guide():
        drift[0] += drift_per_call
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.1)) + drift[0], 1.0))

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    drift_per_call = 1e-13
    assert check(model, guide).ok
    drift_per_call = 1e-6
    with pytest.raises(GuideCheckError, match="keeps state from one run to the next"):
        check(model, guide)
