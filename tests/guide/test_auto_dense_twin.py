"""AutoLaplaceFamily equals the dense guide written by hand: same loss for the same noise, and same gradients."""

from functools import partial

import pytest
import torch
from helpers.dense_twin import DenseTwin, joint_curvature, loss_and_gradients, marginal_curvature, standard_noise
from helpers.models import normals
from helpers.oracles import Figures, finite_difference, relative_error
from helpers.unit_models import UNIT_MODELS
from pyro import poutine
from pyro.infer import Trace_ELBO

from laplace_amort import SoftAbs
from laplace_amort.autodiff.information import arrowhead_information
from laplace_amort.autodiff.paths import DualPath, dual_path
from laplace_amort.guide import family
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.gaussian import LaplaceGaussian
from laplace_amort.guide.heads import MarginalCurvature
from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.linalg.boost import Boost
from laplace_amort.linalg.modified_cholesky import ModifiedCholesky
from laplace_amort.model.unit_model import UnitModel
from laplace_amort.units.closed_form import ClosedFormMode
from laplace_amort.units.modes import FreeMode, NewtonMode

figures = Figures()
TOLERANCE = 1e-9
NEAR, FAR = 0.2, 1.5  # out there, the Schur complement is often indefinite


def make(name, spread=NEAR, **options):
    """A guide at some distance from its start, and the twin at the same place."""
    case = UNIT_MODELS[name]()
    if spread == FAR:  # derivatives of a mode err by what is tolerated of the mode, and out there much comes of it
        options.setdefault("mode", NewtonMode(tolerance=1e-12))
    guide = AutoLaplaceFamily(case.model, **options)
    guide(*case.args, **case.kwargs)
    with torch.no_grad():
        guide.loc += spread * normals(case.global_dim, seed=8)
    return case, guide, DenseTwin(case, guide.loc, guide.tail_repair, guide.head_repair)


def differences(case, guide, twin, particles=1):
    """Relative errors of the loss, and of the gradient of every parameter, for the same noise."""
    elbo, noise = Trace_ELBO(num_particles=particles), standard_noise(particles, case)
    loss, gradients = loss_and_gradients(elbo, case, guide, noise)
    expected_loss, expected = loss_and_gradients(elbo, case, twin, noise)
    for found, name in ((gradients, "AutoLaplaceFamily.loc"), (expected, "twin_loc")):
        loc = found.pop(name, None)
        if case.global_dim:
            found["loc"] = loc
    assert set(gradients) == set(expected)
    errors = {f"gradient of {name}": relative_error(gradients[name], expected[name]) for name in expected}
    return {"loss": relative_error(loss, expected_loss), **errors}


def compare(case, guide, twin, label):
    for what, error in differences(case, guide, twin).items():
        assert figures.add(f"{what}, {label}", error) < TOLERANCE, what


@pytest.mark.parametrize("spread", [NEAR, FAR])
@pytest.mark.parametrize("name", UNIT_MODELS)
def test_loss_and_gradients_equal_those_of_the_twin(name, spread):
    case, guide, twin = make(name, spread)
    compare(case, guide, twin, "joint curvature")
    layout = guide.layout
    assert (layout.global_dim, layout.num_units, layout.local_dim) == (case.global_dim, case.num_units, case.local_dim)
    assert (tuple(layout.global_sites), tuple(layout.local_sites)) == (case.global_sites, case.local_sites)


@torch.no_grad()
@pytest.mark.parametrize("name", ["poisson_by_visit", "binomial_slopes", "nested_latents", "crossed_items"])
def test_mean_and_precision_equal_those_of_the_twin(name):
    case, guide, twin = make(name)
    gaussian = guide.gaussian(*case.args, **case.kwargs)
    mean, precision = twin.gaussian(guide.loc)
    found = torch.cat([gaussian.global_loc, gaussian.local_loc.reshape(-1)])
    assert figures.add("mean", relative_error(found, mean)) < TOLERANCE
    assert figures.add("precision", relative_error(gaussian.precision.to_dense(), precision)) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["normal", "poisson_by_visit", "binomial_slopes", "student_t", "with_params", "beta_means", "crossed_items"],
)
def test_marginal_curvature(name):
    case, guide, twin = make(name, head=MarginalCurvature())
    twin.head = marginal_curvature
    compare(case, guide, twin, "marginal curvature")


REPAIRS = {
    "SoftAbs": SoftAbs,
    "strong SoftAbs": partial(SoftAbs, 0.1),
    "ModifiedCholesky": ModifiedCholesky,
    "Boost": Boost,
}


@pytest.mark.parametrize("name", ["poisson_by_visit", "correlated", "non_centered"])
@pytest.mark.parametrize("repair", REPAIRS)
def test_where_the_head_is_repaired(name, repair):
    case, guide, twin = make(name, spread=FAR, repair=REPAIRS[repair]())
    assert guide.gaussian(*case.args, **case.kwargs).head_report.num_repaired == 1
    compare(case, guide, twin, repair)


@pytest.mark.parametrize("repair", REPAIRS)
def test_free_modes_where_tails_are_repaired(repair):
    """Modes that are parameters stay where they are when the globals move, and tails there need not be definite."""
    case, guide, twin = make("student_t", spread=FAR, mode=FreeMode(), repair=REPAIRS[repair]())
    assert guide.gaussian(*case.args).tail_report.smallest_before < 0
    twin.mode = lambda theta: guide.mode.loc.reshape(-1)
    compare(case, guide, twin, f"free modes, {repair}")


def test_closed_form_mode():
    def fn(globals_, z, errors=0.5):
        precision = 1 / globals_["tau"] ** 2
        return {"y": (globals_["mu"] * precision + z / errors**2) / (precision + 1 / errors**2)}

    compare(*make("normal", mode=ClosedFormMode(fn)), "closed form")


@pytest.mark.parametrize("name", ["beta_means", "with_params"])
def test_two_differentiable_steps_change_nothing(name):
    compare(*make(name, mode=NewtonMode(differentiable_steps=2)), "two steps")


@pytest.mark.parametrize("head", [joint_curvature, marginal_curvature])
@pytest.mark.parametrize("name", ["student_t", "level_and_spread"])
def test_gradient_of_the_twin_is_the_slope_of_its_loss(name, head):
    """The oracle's own derivatives, which use the implicit function theorem and two paths, by finite differences."""
    case, guide, twin = make(name)
    twin.head = head
    noise, direction = standard_noise(1, case), normals(case.global_dim, seed=9)
    loc = guide.loc.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(twin.losses(loc, noise)[0], loc)
    expected = finite_difference(lambda t: twin.losses(loc + t * direction, noise)[0], torch.zeros(()), levels=6)
    assert figures.add("gradient of the twin", relative_error(gradient @ direction, expected)) < 1e-7


# ------------------------------------------------------------------------------------------------------ planted bugs


def hessian_along_the_mode(log_joint, global_, local):
    """The Hessian of theta -> f(theta, y(theta)) in the place of that of two arguments."""
    with torch.no_grad():
        blocks = arrowhead_information(log_joint, global_, local)
        regression = torch.linalg.solve(blocks.tail, blocks.border)
    anchor = global_.detach()
    return arrowhead_information(lambda t, y: log_joint(t, y - regression @ (t - anchor)), global_, local)


def with_field(field, change):
    def changed(log_joint, global_, local):
        blocks = arrowhead_information(log_joint, global_, local)
        return blocks._replace(**{field: change(getattr(blocks, field))})

    return changed


transposed_border = with_field("border", lambda blocks: blocks.mT.reshape(blocks.shape))


def of_other_units(field):
    return with_field(field, lambda blocks: blocks.flip(0))


def without_jacobian(self, global_, local):
    sites = self.layout.to_sites(global_, local)
    return self.density.evaluate(sites) - self.density.log_jacobian(self.density.pack(sites))


def doubled_path(loc):
    return DualPath(2 * loc - loc.detach(), loc.clone())


def detached_mode(self, *args, find=NewtonMode.find):
    return find(self, *args).detach()


def without_schur_complement(head, border, tail):
    return Arrowhead(head, border, tail).with_schur(head)


def flipped_noise(dim, original=LaplaceGaussian._local):
    return lambda self, deviation, noise: original(self, deviation, noise.flip(dim))


def without_deviation(self, deviation, noise, original=LaplaceGaussian._local):
    return original(self, torch.zeros_like(deviation), noise)


GUIDE = family
# What is wrong: the model, what is replaced, by what, and whether the loss is right all the same.
BUGS = {
    "the Hessian sees that the mode moves": ("normal", GUIDE, "arrowhead_information", hessian_along_the_mode, False),
    "the gradient does not see that the mode moves": ("normal", NewtonMode, "find", detached_mode, True),
    "the curvature path is frozen": ("normal", GUIDE, "dual_path", partial(dual_path, curvature_gain=0), True),
    "the mean path is frozen": ("normal", GUIDE, "dual_path", partial(dual_path, mean_gain=0), True),
    "one path is counted twice": ("normal", GUIDE, "dual_path", doubled_path, True),
    "no Jacobian in the density": ("gamma_rates", UnitModel, "log_joint", without_jacobian, False),
    "borders transposed": ("binomial_slopes", GUIDE, "arrowhead_information", transposed_border, False),
    "borders of other units": ("student_t", GUIDE, "arrowhead_information", of_other_units("border"), False),
    "tails of other units": ("student_t", GUIDE, "arrowhead_information", of_other_units("tail"), False),
    "coordinates of a unit swapped": ("level_and_spread", LaplaceGaussian, "_local", flipped_noise(-1), False),
    "draws of other units": ("poisson_by_visit", LaplaceGaussian, "_local", flipped_noise(-2), False),
    "units that do not follow the globals": ("normal", LaplaceGaussian, "_local", without_deviation, False),
    "no Schur complement": ("normal", GUIDE, "Arrowhead", without_schur_complement, False),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, monkeypatch):
    name, where, what, replacement, loss_is_right = BUGS[bug]
    case, guide, twin = make(name)
    monkeypatch.setattr(where, what, replacement)
    errors = differences(case, guide, twin)
    assert (errors["loss"] < TOLERANCE) is loss_is_right
    assert max(errors.values()) > 1e-3


@pytest.mark.parametrize("hidden", ["y_log_jacobian", "shape_log_jacobian", "_AutoLaplaceFamily_local_log_scale"])
def test_a_missing_factor_of_the_guide_is_found(hidden):
    case, guide, twin = make("gamma_rates")

    def short(*args):
        with poutine.block(hide=[hidden]):
            return guide(*args)

    assert differences(case, short, twin)["loss"] > 1e-3


def test_noise_of_another_shape_is_refused():
    """The oracle counts what it hands out: a guide that draws less or more than the twin is no comparison."""
    case, guide, twin = make("normal")
    noise = standard_noise(3, case)
    with pytest.raises(AssertionError):
        loss_and_gradients(Trace_ELBO(num_particles=2), case, guide, noise)
    with pytest.raises(AssertionError, match="drew none of the noise"):
        loss_and_gradients(Trace_ELBO(), case, lambda z: twin.log_joint.sample_sites(twin.log_joint.initial()), noise)
