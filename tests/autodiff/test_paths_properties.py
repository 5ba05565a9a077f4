"""Properties over random problems: every derivative against finite differences and against a route without our code."""

import math
from functools import partial

import pytest
import torch
from helpers.oracles import (
    Figures,
    finite_difference,
    oracle_elbo,
    oracle_gradient,
    relative_error,
    slope,
    unpack,
)
from helpers.strategies import (
    dtypes,
    gains,
    problems,
    seeds,
    shapes,
    standard_normal,
    structures,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from laplace_amort import NotPositiveDefiniteError, SoftAbs, dual_path, observed_information

EXACT = 1e-9  # two routes that differ by rounding error only
DIFFERENCE = 1e-6  # against finite differences
SINGLE = 5e-3  # float32 against float64
BOUNDS = {"value": EXACT, "oracle": EXACT, "difference": DIFFERENCE}

figures = Figures()


# ----------------------------------------------------------------------------------------------------------- the ELBO


def elbo_of(problem, split=dual_path, information=observed_information, mode=None):
    """The ELBO for fixed noise as a function of theta, as a guide would compute it."""

    def elbo(theta):
        theta = theta if theta.requires_grad else theta.clone().requires_grad_()  # a parameter always does
        mean, curvature = split(theta)
        y = (mode or problem.mode)(mean)
        precision, _ = SoftAbs(problem.floor, max_relative_change=2)(information(problem.log_joint, curvature, y))
        chol = torch.linalg.cholesky(precision)
        steps = torch.linalg.solve_triangular(chol.mT, problem.noise.to(theta).mT, upper=True).mT
        draws = torch.cat([mean.reshape(-1), y.reshape(-1)]) + steps
        log_probs = torch.stack([problem.log_joint(*unpack(problem, draw)) for draw in draws])
        return log_probs.mean() - chol.diagonal().log().sum() + problem.size / 2 * (1 + math.log(2 * math.pi))

    return elbo


def gradient_of(fn, point):
    point = point.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(point), point, materialize_grads=True)[0]


def hessian_of(fn, point):
    """Reverse over reverse, as ``gradgradcheck`` does it."""
    point = point.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fn(point), point, create_graph=True)
    rows = [torch.autograd.grad(element, point, retain_graph=True)[0] for element in gradient.reshape(-1)]
    return torch.stack(rows).reshape(point.shape * 2)


def compare(problem, **variant):
    """Relative errors of the ELBO and its gradient against the oracle, and of its gradient against its own values."""
    elbo, theta = elbo_of(problem, **variant), problem.theta
    gradient = gradient_of(elbo, theta)
    return {
        "value": relative_error(elbo(theta), oracle_elbo(problem, theta, theta)),
        "oracle": relative_error(gradient, oracle_gradient(problem)),
        "difference": relative_error(gradient, finite_difference(elbo, theta)),
    }


def by_hand(log_joint, theta, y):
    """The Hessian as one writes it by hand: partial only if y does not descend from this very theta."""
    gradients = torch.autograd.grad(log_joint(theta, y), (theta, y), create_graph=True)
    elements = torch.cat([gradient.reshape(-1) for gradient in gradients])
    rows = [torch.autograd.grad(element, (theta, y), create_graph=True) for element in elements]
    hessian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    return (hessian + hessian.mT) / -2


def flip_border(log_joint, theta, y):
    sign = torch.cat([torch.ones(theta.numel()), -torch.ones(y.numel())])
    return observed_information(log_joint, theta, y) * sign * sign[:, None]


def clone_pair(theta):
    return theta.clone(), theta.clone()


def same_twice(theta):
    return theta, theta


def curvature_twice(theta):
    return (dual_path(theta).curvature,) * 2


@given(problem=problems())
def test_elbo_gradient_equals_oracle_and_finite_differences(problem):
    for name, error in compare(problem).items():
        assert figures.add(f"ELBO gradient: {name}", error) < BOUNDS[name], name


RIGHT = {
    "clone pair": {"split": clone_pair},
    "Hessian by hand": {"information": by_hand},
    "information copies its arguments": {"split": same_twice},
}


@pytest.mark.parametrize("variant", RIGHT.values(), ids=RIGHT)
@given(problem=problems())
def test_elbo_gradient_does_not_depend_on_how_it_is_written(variant, problem):
    expected, actual = (gradient_of(elbo_of(problem, **kwargs), problem.theta) for kwargs in ({}, variant))
    assert figures.add("ELBO gradient: clones, Hessian by hand", relative_error(actual, expected)) < EXACT


# What each mistake trips, and only that: a single path is consistent with itself, so finite differences of its own
# values never see it; a wrong path leaves the value alone.
PLANTED = {
    "single path": ({"split": same_twice, "information": by_hand}, {"value", "oracle"}),
    "mode from the curvature copy": ({"split": curvature_twice, "information": by_hand}, {"value", "oracle"}),
    "wrong sign of the border": ({"information": flip_border}, {"value", "oracle"}),
    "wrong sign of the mean path": ({"split": partial(dual_path, mean_gain=-1.0)}, {"oracle", "difference"}),
    "wrong sign of the curvature path": ({"split": partial(dual_path, curvature_gain=-1.0)}, {"oracle", "difference"}),
    "curvature path counted twice": ({"split": partial(dual_path, curvature_gain=2.0)}, {"oracle", "difference"}),
    "detached mode": ("detach", {"oracle", "difference"}),
}


@pytest.mark.parametrize(("variant", "tripped"), PLANTED.values(), ids=PLANTED)
@settings(max_examples=settings.default.max_examples // 5)
@given(problem=problems())
def test_comparison_catches_planted_bugs(variant, tripped, problem):
    if variant == "detach":
        variant = {"mode": lambda theta: problem.mode(theta.detach())}
    errors = compare(problem, **variant)
    assert {name for name, error in errors.items() if error > 10 * BOUNDS[name]} == tripped, errors


@given(problem=problems())
def test_wrong_sign_of_the_information_is_refused(problem):
    # SoftAbs is even: its value would hide the sign, only a bound shows it.
    information = observed_information(problem.log_joint, problem.theta, problem.mode(problem.theta))
    repair = SoftAbs(max_relative_change=1.9)
    assume(torch.linalg.eigvalsh(information)[0] > 3 * repair.floor)
    with pytest.raises(NotPositiveDefiniteError, match="wrong sign"):
        repair(-information)


@given(problem=problems(), seed=seeds)
def test_elbo_second_derivative(problem, seed):
    elbo, theta, direction = elbo_of(problem), problem.theta, standard_normal(*problem.theta_shape, seed=seed)
    hessian = hessian_of(elbo, theta)
    oracle = torch.func.hessian(lambda both: oracle_elbo(problem, both, both))(theta)
    assert figures.add("ELBO Hessian: oracle", relative_error(hessian, oracle)) < 10 * EXACT
    product = (hessian * direction).flatten(theta.dim()).sum(-1)
    expected = slope(partial(gradient_of, elbo), theta, direction)
    assert figures.add("ELBO Hessian: difference", relative_error(product, expected)) < 100 * DIFFERENCE


@given(problem=problems())
def test_elbo_gradient_in_single_precision(problem):
    gradient = gradient_of(elbo_of(problem), problem.theta.float())
    assert gradient.dtype == torch.float32
    error = relative_error(gradient.double(), oracle_gradient(problem))
    assert figures.add("ELBO gradient: float32", error) < SINGLE


# ----------------------------------------------------------------------------------------------------- gains and copies


@given(problem=problems(), mean_gain=gains, curvature_gain=gains)
def test_gains_scale_the_two_gradients(problem, mean_gain, curvature_gain):
    theta = problem.theta

    def damped(value):
        parts = ((value.detach(), gain) for gain in (mean_gain, curvature_gain))
        return tuple(constant + gain * (value - constant) for constant, gain in parts)

    split = partial(dual_path, mean_gain=mean_gain, curvature_gain=curvature_gain)
    actual = gradient_of(elbo_of(problem, split=split), theta)
    by_path = torch.func.grad(partial(oracle_elbo, problem), argnums=(0, 1))(theta, theta)
    scale = 1 + max(float(part.abs().max()) for part in by_path)  # the two may cancel
    for expected in (
        gradient_of(elbo_of(problem, split=damped), theta),
        mean_gain * by_path[0] + curvature_gain * by_path[1],
    ):
        assert figures.add("gains", float((actual - expected).abs().max()) / scale) < EXACT


@given(shape=shapes, dtype=dtypes, mean_gain=gains, curvature_gain=gains, seed=seeds)
def test_forward_and_reverse_mode_are_adjoint(shape, dtype, mean_gain, curvature_gain, seed):
    def split(value):
        return tuple(dual_path(value, mean_gain=mean_gain, curvature_gain=curvature_gain))

    value, tangent, *cotangents = (standard_normal(*shape, seed=seed + i, dtype=dtype) for i in range(4))
    outputs, tangents = torch.func.jvp(split, (value,), (tangent,))
    _, pullback = torch.func.vjp(split, value)
    (gradient,) = pullback(tuple(cotangents))
    assert all(torch.equal(output, value) for output in outputs)
    assert gradient.dtype == dtype
    assert gradient.shape == value.shape
    forward = sum((cotangent.conj() * t).sum() for cotangent, t in zip(cotangents, tangents, strict=True))
    torch.testing.assert_close(forward, (gradient.conj() * tangent).sum(), rtol=1e-4, atol=1e-4)
    expected = mean_gain * cotangents[0] + curvature_gain * cotangents[1]
    torch.testing.assert_close(gradient, expected.to(dtype))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("frozen", ["mean_gain", "curvature_gain"])
@given(shape=shapes, gain=gains, seed=seeds)
def test_gain_zero_freezes_whatever_the_frozen_side_holds(bad, frozen, shape, gain, seed):
    value, cotangent = (standard_normal(*shape, seed=seed + i) for i in range(2))
    other = {"mean_gain": "curvature_gain", "curvature_gain": "mean_gain"}[frozen]

    def loss(theta):
        copies = dual_path(theta, **{frozen: 0.0, other: gain})
        dead, alive = copies if frozen == "mean_gain" else reversed(copies)
        return (dead * bad).sum() + (alive * cotangent).sum()

    assert torch.equal(gradient_of(loss, value), gain * cotangent)
    assert torch.equal(torch.func.grad(loss)(value), gain * cotangent)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("frozen", ["mean", "curvature"])
def test_gain_zero_freezes_forward_mode_too(bad, frozen):
    def split(value):
        return getattr(dual_path(value, **{f"{frozen}_gain": 0.0}), frozen)

    _, tangent = torch.func.jvp(split, (torch.ones(2),), (torch.tensor([bad, 1.0]),))
    assert torch.equal(tangent, torch.zeros(2))


@given(structure=structures())
def test_nested_structures_round_trip(structure):
    leaves, spec = pytree.tree_flatten(structure)
    for copies in dual_path(structure):
        others, other_spec = pytree.tree_flatten(copies)
        assert other_spec == spec  # classes and keys, in order
        for leaf, other in zip(leaves, others, strict=True):
            assert other is not leaf
            assert other.dtype == leaf.dtype
            assert torch.equal(other, leaf)


@given(structure=structures())
def test_gradients_return_to_every_leaf_of_a_structure(structure):
    structure = pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), structure)
    mean, curvature = (pytree.tree_leaves(copies) for copies in dual_path(structure, curvature_gain=0.5))
    total = sum((3 * m + 4 * c).sum().real for m, c in zip(mean, curvature, strict=True))
    leaves = pytree.tree_leaves(structure)
    if leaves:
        total.backward()
    assert all(torch.equal(leaf.grad, torch.full_like(leaf, 5)) for leaf in leaves)


# ------------------------------------------------------------------------------------------------ observed information


@given(problem=problems())
def test_information_is_the_negative_hessian(problem):
    theta, y = problem.theta, problem.mode(problem.theta)
    information = observed_information(problem.log_joint, theta, y)
    assert torch.equal(information, information.mT)
    blocks = torch.func.hessian(problem.log_joint, argnums=(0, 1))(theta, y)
    sizes = theta.numel(), y.numel()
    rows = [
        torch.cat([block.reshape(size, -1) for block in row], dim=1) for size, row in zip(sizes, blocks, strict=True)
    ]
    assert figures.add("information: torch.func", relative_error(information, -torch.cat(rows))) < EXACT

    def gradient(flat):
        return torch.cat([g.reshape(-1) for g in torch.func.grad(problem.log_joint, (0, 1))(*unpack(problem, flat))])

    expected = -finite_difference(gradient, torch.cat([theta.reshape(-1), y.reshape(-1)]))
    assert figures.add("information: difference", relative_error(information, expected)) < DIFFERENCE


@given(problem=problems(), data=st.data())
def test_information_does_not_depend_on_how_arguments_are_split(problem, data):
    flat = torch.cat([problem.theta.reshape(-1), problem.mode(problem.theta).reshape(-1)])
    expected = observed_information(lambda v: problem.log_joint(*unpack(problem, v)), flat)
    cuts = sorted(data.draw(st.sets(st.integers(1, problem.size - 1)), label="cuts"))
    pieces = [piece.reshape(1, -1) for piece in torch.tensor_split(flat, cuts)]

    def log_joint(*values):
        return problem.log_joint(*unpack(problem, torch.cat([value.reshape(-1) for value in values])))

    torch.testing.assert_close(observed_information(log_joint, *pieces), expected, rtol=EXACT, atol=EXACT)


@given(problem=problems(), data=st.data())
def test_information_is_equivariant_under_permutation(problem, data):
    flat = torch.cat([problem.theta.reshape(-1), problem.mode(problem.theta).reshape(-1)])
    order = torch.tensor(data.draw(st.permutations(range(problem.size)), label="order"))

    def log_joint(*values):
        return problem.log_joint(*unpack(problem, torch.stack(values)[order.argsort()]))

    expected = observed_information(problem.log_joint, *unpack(problem, flat))[order][:, order]
    actual = observed_information(log_joint, *flat[order])
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


@given(problem=problems(), seed=seeds)
def test_third_derivative_of_the_log_joint(problem, seed):
    weight = standard_normal(problem.size, problem.size, seed=seed)
    flat = torch.cat([problem.theta.reshape(-1), problem.mode(problem.theta).reshape(-1)])

    def functional(v):
        return (weight * observed_information(problem.log_joint, *unpack(problem, v))).sum()

    gradient, direction = gradient_of(functional, flat), standard_normal(problem.size, seed=seed + 1)
    error = relative_error(gradient @ direction, slope(functional, flat, direction))
    assert figures.add("third order: difference", error) < DIFFERENCE

    def oracle(v):
        return -(weight * torch.func.hessian(lambda u: problem.log_joint(*unpack(problem, u)))(v)).sum()

    assert figures.add("third order: torch.func", relative_error(gradient, torch.func.grad(oracle)(flat))) < EXACT
