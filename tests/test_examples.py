"""The worked examples: modes against independent roots and derivatives, guides against the log joint."""

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

from laplace_amort import LogJoint, PathLeakError, datasets
from laplace_amort.examples import epil, multisite
from laplace_amort.testing import CheckSettings, check_guide

EXAMPLES = [multisite, epil]
GUIDES = [
    pytest.param(example, guide, id=f"{example.__name__.rsplit('.', 1)[-1]}-{guide}")
    for example in EXAMPLES
    for guide in ("AmortizedGuide", "UnamortizedGuide")
]


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
    mode = float(multisite.closed_form_mode(theta, effect, se))
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
    torch.testing.assert_close(multisite.closed_form_mode(THETA, effects, SE), roots, rtol=1e-9, atol=1e-12)
    for effect, root in zip(effects, roots, strict=True):

        def found(theta, effect=effect):
            return multisite.closed_form_mode(theta, effect, SE)

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
    assert torch.autograd.gradcheck(multisite.closed_form_mode, args)
    assert torch.autograd.gradgradcheck(multisite.closed_form_mode, args)


def test_mode_in_float32():
    effects = special_effects()
    double = multisite.closed_form_mode(THETA, effects, SE)
    theta = THETA.float().requires_grad_()
    single = multisite.closed_form_mode(theta, effects.float(), SE.float())
    torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=1e-7)
    gradient = torch.autograd.grad(single[effects.abs() < 100].sum(), theta, create_graph=True)[0]
    curvature = torch.autograd.grad(gradient.sum(), theta)[0]
    assert gradient.isfinite().all()
    assert curvature.isfinite().all()


# Patients without a seizure, with few, and with many more than expected; log sigma small and large.
@pytest.mark.parametrize("total", [0.0, 4.0, 400.0])
@pytest.mark.parametrize("expected", [0.5, 30.0, 1e4])
@pytest.mark.parametrize("log_sigma", [-3.0, -0.6, 1.0])
def test_newton_mode_and_derivatives_against_lambert_w(total, expected, log_sigma):
    """Y - E exp(u) = u / s**2 has the root s**2 Y - W(s**2 E exp(s**2 Y))."""
    x = torch.zeros(1, 4, 6)
    x[..., 0] = 1
    y = torch.full((1, 4), total / 4)
    theta = torch.zeros(7)
    theta[0] = torch.tensor(expected / 4).log()

    def found(log_sigma):
        return epil.conditional_mode(torch.cat([theta[:6], log_sigma.reshape(1)]), x, y)[0]

    def oracle(log_sigma):
        variance = mpmath.exp(2 * mpmath.mpf(log_sigma))
        return variance * total - mpmath.lambertw(variance * expected * mpmath.exp(variance * total)).real

    at = torch.tensor(log_sigma)
    with mpmath.workdps(60):
        for order in range(4):
            wanted = float(mpmath.diff(oracle, log_sigma, order))
            assert float(found(at)) == pytest.approx(wanted, rel=1e-8, abs=1e-9), order
            found = torch.func.grad(found)


def test_newton_names_the_patients_that_did_not_converge():
    x, y = epil.data()
    theta = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r"did not converge in 2 Newton steps for patients \[.*\b24\b.*\]"):
        epil.conditional_mode(theta, x, y, max_steps=2)
    with pytest.raises(RuntimeError, match=r"Is theta finite\? It is \[nan, "):
        epil.conditional_mode(theta * torch.nan, x, y)


def reference_theta(name):
    """The globals at the mean of the reference posterior, in unconstrained space and in the order of the model."""
    variables = datasets.reference(name).variables
    if name == "multisite":
        return torch.stack([variables[site].mean for site in ("mu", "log_raw_scale", "log_raw_df")])
    return torch.cat([variables["beta"].mean, variables["log_sigma"].mean.reshape(1)])


def short_name(example):
    return example.__name__.rsplit(".", 1)[-1]


def set_parameters(example, args):
    """Put a guide of the example where its posterior is: both parameters, for either guide."""
    theta = reference_theta(short_name(example))
    mode = example.closed_form_mode if example is multisite else example.conditional_mode
    y_hat = mode(theta, *args)
    pyro.param("theta", theta)
    pyro.param("y_hat", y_hat)
    return torch.cat([theta, y_hat])


@pytest.mark.parametrize(("example", "guide_name"), GUIDES)
def test_guide_is_the_gaussian_of_the_log_joint(example, guide_name):
    args = example.data()
    loc = set_parameters(example, args)
    guide = getattr(example, guide_name)(*args)
    gaussian = guide.gaussian(*args)
    torch.testing.assert_close(gaussian.loc, loc)
    assert guide.report.num_repaired == 0
    log_joint = LogJoint(example.model, *args)
    hessian = torch.autograd.functional.hessian(log_joint, loc)
    gradient = torch.autograd.functional.jacobian(log_joint, loc)
    # The repair moves an eigenvalue by a relative 2 exp(-2 eigenvalue / floor): 6e-5 for the smallest of epil.
    torch.testing.assert_close(gaussian.precision_matrix, -hessian, rtol=1e-6, atol=2e-4)
    assert gradient[example.NUM_GLOBALS :].abs().max() < 1e-7  # the locals are at their conditional mode


@pytest.mark.parametrize(("example", "guide_name"), GUIDES)
def test_vectorized_particles_are_the_draws_of_the_gaussian(example, guide_name):
    """Each particle's log weight, recomputed from its packed draw alone."""
    args = example.data()
    set_parameters(example, args)
    guide = getattr(example, guide_name)(*args)
    vectorized = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    loss = vectorized.loss(example.model, guide, *args)
    pyro.set_rng_seed(1)
    with pyro.plate("num_particles_vectorized", 3, dim=-2):
        draws = poutine.trace(guide).get_trace(*args).nodes["joint"]["value"].squeeze(-2)
    log_joint = LogJoint(example.model, *args)
    with torch.no_grad():
        gaussian = guide.gaussian(*args)
        weights = torch.stack([log_joint(draw) - gaussian.log_prob(draw) for draw in draws])
    assert loss == pytest.approx(-float(weights.mean()), rel=1e-9)


@pytest.mark.parametrize(("example", "guide_name"), GUIDES)
def test_guide_trains_and_runs_without_a_graph(example, guide_name):
    args = example.data()
    guide = getattr(example, guide_name)(*args)
    svi = SVI(example.model, guide, ClippedAdam({"lr": 0.01}), Trace_ELBO())
    svi.step(*args)
    before = pyro.param("theta").clone()
    svi.step(*args)
    assert (pyro.param("theta") != before).all()
    assert numpy.isfinite(svi.evaluate_loss(*args))
    samples = Predictive(example.model, guide=guide, num_samples=4)(*args)
    parallel = Predictive(example.model, guide=guide, num_samples=4, parallel=True)(*args)
    local = "t" if example is multisite else "u"
    assert samples[local].shape == (4, len(args[0]))
    assert parallel[local].shape[0] == 4
    if example is epil:
        assert (samples["sigma"] > 0).all()


def few_units(example):
    """Three units, one of them extreme, are enough to check every path, and quick."""
    units = [0, 15, 22] if example is multisite else [0, 24, 57]
    return tuple(column[units] for column in example.data())


@pytest.mark.parametrize(("example", "guide_name"), GUIDES)
def test_guide_passes_the_gradient_checks(example, guide_name):
    args = few_units(example)
    guide = getattr(example, guide_name)(*args)
    repair = getattr(example, "REPAIR", CheckSettings().repair)
    report = check_guide(example.model, guide, *args, settings=CheckSettings(repair=repair, max_elements=3))
    assert report.ok
    assert len(report.rows) >= 5


@pytest.mark.parametrize("example", EXAMPLES)
def test_mode_from_the_wrong_copy_is_refused(example, monkeypatch):
    args = few_units(example)
    name = "closed_form_mode" if example is multisite else "conditional_mode"
    mode, declare = getattr(example, name), example.dual_path_param
    declared = []
    monkeypatch.setattr(example, "dual_path_param", lambda *a: declared.append(declare(*a)) or declared[-1])
    monkeypatch.setattr(example, name, lambda mean, *args: mode(declared[-1].curvature, *args))
    with pytest.raises(PathLeakError, match="y_hat = mode"):
        example.AmortizedGuide(*args)(*args)


@pytest.mark.parametrize("example", EXAMPLES)
def test_check_case_fits_the_command(example):
    model, guide, args, *kwargs = example.check_case()
    assert model is example.model
    assert isinstance(guide, example.AmortizedGuide)
    assert [tuple(arg.shape) for arg in args] == [tuple(arg.shape) for arg in example.data()]
    assert all(set(given) == {"settings"} for given in kwargs)
