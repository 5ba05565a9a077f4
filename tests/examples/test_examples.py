"""The worked examples: modes against independent roots and derivatives, guides against the log joint."""

import re
import textwrap

import mpmath
import numpy
import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import ClippedAdam

import laplace_amort
from laplace_amort import (
    AutoLaplaceFamily,
    FixedDrawELBO,
    JointCurvature,
    LogJoint,
    MarginalCurvature,
    PathLeakError,
    fit,
)
from laplace_amort.examples import datasets, epil, multisite, radon
from laplace_amort.testing import CheckSettings, check_guide

EXAMPLES = [multisite, epil, radon]


def closed_form_mode(theta, effect, se):
    """The example's mode as a function of the globals in one vector."""
    return multisite.closed_form_mode(dict(zip(multisite.GLOBALS, theta, strict=True)), effect, se)["t"]


def cubic(theta, r, se):
    """Coefficients of the cubic in t, written out again."""
    scale, df = 1.9 * se.max() + theta[1].exp(), 2.5 + theta[2].exp()
    a = df * scale**2
    return a, df, torch.stack([torch.ones_like(r), -r, a + (df + 1) * se**2, -r * a], dim=-1)


def real_root(coefficients):
    roots = numpy.roots(coefficients)
    return float(roots[numpy.argmin(numpy.abs(roots.imag))].real)


def implicit_mode(theta, effect, se, start):
    """The same root with its first three derivatives, by two differentiable Newton steps from its value."""
    scale, df = 1.9 * se.max() + theta[1].exp(), 2.5 + theta[2].exp()
    a, r = df * scale**2, effect - theta[0]
    b = a + (df + 1) * se**2
    t = start
    for _ in range(2):
        t = t - (((t - r) * t + b) * t - r * a) / ((3 * t - 2 * r) * t + b)
    return t


THETA = torch.tensor([0.1, -1.0, 1.5], dtype=torch.float64)
SE = torch.tensor(0.3, dtype=torch.float64)


def special_effects():
    """Effects where something could break: r = 0, both sides of either switch, both far ends."""
    _, _, coefficients = cubic(THETA, SE * 0, SE)
    b = float(coefficients[2])
    p_is_zero = (3 * b) ** 0.5
    a = b - float((2.5 + THETA[2].exp() + 1) * SE**2)

    def excess(r):  # the switch of the formula is where this changes sign
        p, q = b - r**2 / 3, r * (b / 3 - a) - 2 * r**3 / 27
        return 400 * max(p, 0.0) ** 3 - 27 * q**2

    low, high = 0.0, p_is_zero
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) >= 0 else (low, middle)
    distances = [0.0, 1e-9, 0.2, low * 0.999, low, high * 1.001, p_is_zero * (1 - 1e-9), p_is_zero, p_is_zero + 1e-6]
    distances += [2 * p_is_zero, 1e3, 1e6]
    return torch.tensor([sign * d for d in distances for sign in (1, -1)], dtype=torch.float64) + THETA[0]


@given(
    mu=st.floats(-100, 100),
    log_raw_scale=st.floats(-8, 4),
    log_raw_df=st.floats(-4, 6),
    log_se=st.floats(-6, 3),
    distance=st.floats(-1e4, 1e4),
)
def test_mode_is_the_only_real_root_of_the_cubic(mu, log_raw_scale, log_raw_df, log_se, distance):
    torch.set_default_dtype(torch.float64)
    theta, se = torch.tensor([mu, log_raw_scale, log_raw_df]), torch.tensor(log_se).exp()
    effect = theta[0] + distance * se
    _, _, coefficients = cubic(theta, effect - theta[0], se)
    mode = float(closed_form_mode(theta, effect, se))
    assert mode == pytest.approx(real_root(coefficients.numpy()), rel=1e-8, abs=1e-10 * float(se))
    slope = 3 * mode**2 - 2 * float(effect - theta[0]) * mode + float(coefficients[2])
    assert slope > 0  # as everywhere if the root is unique


def test_roots_and_derivatives_where_the_formula_changes():
    effects = special_effects()
    roots = []
    for effect in effects:
        _, _, coefficients = cubic(THETA, effect - THETA[0], SE)
        roots.append(real_root(coefficients.numpy()))
    roots = torch.tensor(roots)
    torch.testing.assert_close(closed_form_mode(THETA, effects, SE), roots, rtol=1e-9, atol=1e-12)
    for effect, root in zip(effects, roots, strict=True):

        def found(theta, effect=effect):
            return closed_form_mode(theta, effect, SE)

        def expected(theta, effect=effect, root=root):
            return implicit_mode(theta, effect, SE, root)

        for _ in range(3):
            found, expected = torch.func.jacrev(found), torch.func.jacrev(expected)
            size = 1 + float((effect - THETA[0]).abs())
            torch.testing.assert_close(found(THETA), expected(THETA), rtol=1e-7, atol=1e-9 * size)


def test_textbook_formula_fails_where_ours_does_not():
    """The comparisons above can fail: Cardano's cube roots cancel near mu, and his discriminant far from it."""

    def cardano(r, a, b):
        p, q = b - r**2 / 3, r * (b / 3 - a) - 2 * r**3 / 27
        half = (q**2 / 4 + p**3 / 27).sqrt()
        return sum(x.sign() * x.abs() ** (1 / 3) for x in (-q / 2 + half, -q / 2 - half)) + r / 3

    a, b = torch.tensor(10.0), torch.tensor(12.0)
    assert float(multisite.cubic_root(torch.tensor(3.0), a, b)) == pytest.approx(float(cardano(3.0, a, b)), rel=1e-12)
    near = torch.tensor(1e-9)  # t = r a / b to first order
    assert float(multisite.cubic_root(near, a, b) / near) == pytest.approx(10 / 12, rel=1e-13)
    assert float(cardano(near, a, b) / near) != pytest.approx(10 / 12, rel=1e-9)
    far = torch.logspace(6, 9, 20)
    torch.testing.assert_close(multisite.cubic_root(far, a, b), far, rtol=1e-11, atol=0)
    assert cardano(far, a, b).isnan().any()


def test_mode_passes_gradgradcheck():
    effect, se = multisite.data()
    theta = THETA.clone().requires_grad_()
    args = theta, effect[:4].requires_grad_(), se[:4].requires_grad_()
    assert torch.autograd.gradcheck(closed_form_mode, args)
    assert torch.autograd.gradgradcheck(closed_form_mode, args)


def test_mode_in_float32():
    effects = special_effects()
    double = closed_form_mode(THETA, effects, SE)
    theta = THETA.float().requires_grad_()
    single = closed_form_mode(theta, effects.float(), SE.float())
    torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=1e-7)
    gradient = torch.autograd.grad(single[effects.abs() < 100].sum(), theta, create_graph=True)[0]
    curvature = torch.autograd.grad(gradient.sum(), theta)[0]
    assert gradient.isfinite().all()
    assert curvature.isfinite().all()


def reference_start(name):
    """An ``init_loc_fn`` that starts a guide at the mean of the reference posterior."""
    variables = datasets.reference(name).variables
    return lambda site: variables[site["name"]].mean


@pytest.mark.parametrize("log_sigma", [-3.0, -0.6, 1.0])
def test_modes_of_epil_against_lambert_w(log_sigma):
    """Y - E exp(u) = u / s**2 has the root s**2 Y - W(s**2 E exp(s**2 Y)); one patient has Y = 0, one 302."""
    start = {"beta": datasets.reference("epil").variables["beta"].mean, "sigma": torch.tensor(log_sigma).exp()}
    x, y = epil.data()
    guide = AutoLaplaceFamily(epil.model, init_loc_fn=lambda site: start.get(site["name"], torch.zeros(59)))
    modes = guide.median(x, y)["u"].tolist()
    variance = mpmath.exp(2 * mpmath.mpf(log_sigma))
    with mpmath.workdps(200):
        for mode, total, expected in zip(modes, y.sum(-1), (x @ start["beta"]).exp().sum(-1), strict=True):
            counted = variance * float(total)
            root = counted - mpmath.lambertw(variance * float(expected) * mpmath.exp(counted)).real
            assert mode == pytest.approx(float(root), rel=1e-9, abs=1e-9)


def test_log_joint_of_radon_by_hand():
    county, floor, log_radon = (column[:40] for column in radon.data())
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5 + 2 * (int(county.max()) + 1), generator=generator)
    log_joint = LogJoint(radon.model, county, floor, log_radon)
    sites = {name: value.numpy() for name, value in log_joint.constrain(values).items()}

    def normal(z, loc, scale):
        return float((-0.5 * ((z - loc) / scale) ** 2 - numpy.log(scale) - 0.5 * numpy.log(2 * numpy.pi)).sum())

    expected = normal(sites["mu_alpha"], 0, 10) + normal(sites["mu_beta"], 0, 10)
    for name in ("sigma_alpha", "sigma_beta", "sigma_y"):
        expected += numpy.log(2) + normal(sites[name], 0, 1) + float(numpy.log(sites[name]))  # the last for log sigma
    for name in ("alpha", "beta"):
        expected += normal(sites[name], sites[f"mu_{name}"], sites[f"sigma_{name}"])
    for c, f, z in zip(county.tolist(), floor.tolist(), log_radon.numpy(), strict=True):
        expected += normal(z, sites["alpha"][c] + sites["beta"][c] * f, sites["sigma_y"])
    assert float(log_joint(values)) == pytest.approx(expected, rel=1e-12)


def test_radon_finds_its_counties():
    args = radon.data()
    guide = AutoLaplaceFamily(radon.model, init_loc_fn=reference_start("radon"))
    gaussian = guide.gaussian(*args)
    assert guide.layout.frame.name == "counties"
    assert (guide.layout.global_dim, guide.layout.local_dim, guide.layout.num_units) == (5, 2, 85)
    assert gaussian.tail_report.num_repaired == 0
    # A Gaussian has its conditional mean at its mode: the normal equations of one county, written out.
    (county, floor, log_radon), c = args, 1
    sites = {name: value.detach() for name, value in gaussian.median().items()}
    x = torch.stack([torch.ones_like(floor), floor], dim=-1)[county == c]
    prior = torch.stack([sites["sigma_alpha"], sites["sigma_beta"]]) ** -2
    precision = x.mT @ x / sites["sigma_y"] ** 2 + prior.diag()
    linear = x.mT @ log_radon[county == c] / sites["sigma_y"] ** 2 + prior * torch.stack(
        [sites["mu_alpha"], sites["mu_beta"]]
    )
    expected = torch.linalg.solve(precision, linear)
    torch.testing.assert_close(torch.stack([sites["alpha"][c], sites["beta"][c]]), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gaussian.precision.tail[c].detach(), precision, rtol=1e-9, atol=1e-9)


def joint_gaussian(guide, args):
    """The packed Gaussian of the guide that is written by hand."""
    return poutine.trace(guide).get_trace(*args).nodes["joint"]["fn"]


def test_the_guide_by_hand_is_the_automatic_one():
    args = multisite.data()
    pyro.param("theta", THETA)
    by_hand = joint_gaussian(multisite.AmortizedGuide(*args), args)
    start = dict(zip(multisite.GLOBALS, THETA, strict=True))
    _, guide, _ = multisite.check_case()
    guide.init_loc_fn = lambda site: start.get(site["name"], torch.zeros(44))
    automatic = guide.gaussian(*args)
    loc = torch.cat([automatic.global_loc, automatic.local_loc.flatten()])
    torch.testing.assert_close(by_hand.loc, loc, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_hand.precision_matrix, automatic.precision.to_dense(), rtol=1e-9, atol=1e-9)


def test_the_guide_by_hand_is_the_gaussian_of_the_log_joint():
    args = multisite.data()
    theta = torch.stack([datasets.reference("multisite").variables[name].mean for name in multisite.GLOBALS])
    pyro.param("theta", theta)
    gaussian = joint_gaussian(multisite.AmortizedGuide(*args), args)
    torch.testing.assert_close(gaussian.loc, torch.cat([theta, closed_form_mode(theta, *args)]))
    log_joint = LogJoint(multisite.model, *args)
    loc = gaussian.loc.detach()
    hessian = torch.autograd.functional.hessian(log_joint, loc)
    torch.testing.assert_close(gaussian.precision_matrix, -hessian, rtol=1e-6, atol=1e-6)
    gradient = torch.autograd.functional.jacobian(log_joint, loc)
    assert gradient[len(theta) :].abs().max() < 1e-7  # the locals are at their conditional mode


def test_the_guide_by_hand_trains_and_runs_without_a_graph():
    args = multisite.data()
    guide = multisite.AmortizedGuide(*args)
    svi = SVI(multisite.model, guide, ClippedAdam({"lr": 0.01}), Trace_ELBO(3, vectorize_particles=True))
    svi.step(*args)
    before = pyro.param("theta").clone()
    svi.step(*args)
    assert (pyro.param("theta") != before).all()
    assert numpy.isfinite(svi.evaluate_loss(*args))
    assert Predictive(multisite.model, guide=guide, num_samples=4)(*args)["t"].shape == (4, 44)


def test_a_mode_from_the_wrong_copy_is_refused(monkeypatch):
    args = few_units(multisite)
    declare, mode, declared = multisite.dual_path_param, multisite.closed_form_mode, []
    monkeypatch.setattr(multisite, "dual_path_param", lambda *a: declared.append(declare(*a)) or declared[-1])

    def leaking(global_, *args):
        return mode(dict(zip(global_, declared[-1].curvature, strict=True)), *args)

    monkeypatch.setattr(multisite, "closed_form_mode", leaking)
    with pytest.raises(PathLeakError, match="y_hat = mode"):
        multisite.AmortizedGuide(*args)(*args)


def few_units(example):
    """Two units are enough to check every path, and quick."""
    args = example.data()
    return tuple(column[args[0] < 2] for column in args) if example is radon else tuple(column[:2] for column in args)


@pytest.mark.parametrize(
    ("example", "head"), [*((example, JointCurvature()) for example in EXAMPLES), (multisite, MarginalCurvature())]
)
def test_the_case_passes_the_gradient_checks(example, head):
    model, guide, args = example.check_case()
    assert model is example.model
    assert [tuple(arg.shape) for arg in args] == [tuple(arg.shape) for arg in example.data()]
    guide.head = head
    report = check_guide(model, guide, *few_units(example), settings=CheckSettings(max_elements=1))
    assert report.ok
    assert len(report.rows) >= 5


def test_the_guide_by_hand_passes_the_gradient_checks():
    args = few_units(multisite)
    report = check_guide(
        multisite.model, multisite.AmortizedGuide(*args), *args, settings=CheckSettings(max_elements=1)
    )
    assert report.ok
    assert len(report.rows) >= 5


@pytest.mark.parametrize(("example", "elbo"), [(multisite, -26.85), (epil, -690.2), (radon, -1066.3)])
def test_fit_as_its_docstring_shows(example, elbo, capsys):
    """The ELBOs are those that long runs of SVI end at (``laplace-amort demo``), to 0.7 nats."""
    block = re.search(r"^To fit it::\n\n((?:    .*\n)+)", example.__doc__, re.MULTILINE)
    exec(textwrap.dedent(block[1]), vars(laplace_amort) | vars(example))
    printed = capsys.readouterr().out
    assert printed.startswith("RIGHT")
    guide = AutoLaplaceFamily(example.model, head=MarginalCurvature() if example is radon else JointCurvature())
    family = fit(example.model, *example.data(), guide=guide, objective=FixedDrawELBO(), progress=False)
    assert family.objective == pytest.approx(elbo, abs=0.7)
