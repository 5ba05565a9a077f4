"""The structure check: it passes what has units, and refuses what couples them, by name."""

import re

import pytest
import torch
from helpers.separable import Separable, separable
from helpers.strategies import standard_normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import Function

from laplace_amort import InformationError, StructureError
from laplace_amort.autodiff.information import arrowhead_information
from laplace_amort.autodiff.structure import check_structure

FEW = settings.default.max_examples // 2
POINT = torch.tensor([0.3, -0.2], dtype=torch.float64), standard_normal(5, 2, seed=1)


def independent(theta, y):
    return -(theta**4).sum() - ((y - theta) ** 2).sum() - y.cosh().prod(-1).sum() - (theta.exp() * y**2).sum()


def random_walk(theta, y):
    return independent(theta, y) - ((y[1:, 0] - y[:-1, 0]) ** 2).sum()


def sum_to_zero(theta, y):
    return independent(theta, y) - y[:, 1].sum() ** 2


def across(theta, y):
    """The first coordinate of a unit with the second of the next."""
    return independent(theta, y) + 3 * y[0, 0] * y[1, 1]


def two_of_five(theta, y):
    return independent(theta, y) - (y[2] * y[4]).sum()


COUPLED = {
    "random walk": (
        random_walk,
        "'level' of unit 0 and 'level' of unit 1 have a second derivative of 2 (5 of 5 units are coupled, by 'level')",
    ),
    "sum to zero": (
        sum_to_zero,
        "'slope' of unit 0 and 'slope' of unit 1 have a second derivative of -2 (5 of 5 units are coupled, by 'slope')",
    ),
    "across coordinates": (
        across,
        "'level' of unit 0 and 'slope' of unit 1 have a second derivative of 3 (2 of 5 units are coupled, by 'level', "
        "'slope')",
    ),
    "two units": (
        two_of_five,
        "'level' of unit 2 and 'level' of unit 4 have a second derivative of -1 (2 of 5 units are coupled, by 'level', "
        "'slope')",
    ),
}


@pytest.mark.parametrize("with_blocks", [False, True], ids=["", "blocks at hand"])
@pytest.mark.parametrize("case", COUPLED)
def test_coupled_units_are_named(case, with_blocks):
    log_joint, message = COUPLED[case]
    blocks = arrowhead_information(log_joint, *POINT) if with_blocks else None
    message = f"units are not independent of each other given the globals: {message}, so the information is no block"
    with pytest.raises(StructureError, match=re.escape(message)):
        check_structure(log_joint, *POINT, blocks, names=["level", "slope"])


def test_the_cure():
    cure = r"(?s)Sample what couples them outside .* dense matrix of its \d+ elements .*pyro.plate\('one', 1\)"
    with pytest.raises(StructureError, match=cure):
        check_structure(random_walk, *POINT)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(None, "coordinate 0 of unit 0 and coordinate 1 of unit 1"), (["y", "y"], "'y' of unit 0 and 'y' of unit 1")],
)
def test_names_of_coordinates(names, expected):
    with pytest.raises(StructureError, match=f"{expected} have a second .*coupled, by {expected.split(' of')[0]}"):
        check_structure(across, *POINT, names=names)


@given(problem=separable())
def test_independent_units_pass(problem):
    check_structure(problem.log_joint, *problem.point)
    check_structure(problem.log_joint, *problem.point, arrowhead_information(problem.log_joint, *problem.point))


@settings(max_examples=FEW)
@given(problem=separable(), strength=st.sampled_from([1.0, -1.0, 1e-2, 1e-4]), data=st.data())
def test_any_coupling_of_two_units_is_found(problem, strength, data):
    units = sorted(data.draw(st.permutations(range(problem.num_units + 1)))[:2])
    places = [data.draw(st.integers(0, problem.local_dim - 1)) for _ in units]
    theta, local = problem.global_, torch.cat([problem.local, problem.local[:1]])

    def log_joint(theta, y):
        first, second = (y[unit, place] for unit, place in zip(units, places, strict=True))
        rest = problem.log_joint(theta, y[:-1]) - (y[-1] ** 2).sum() - theta.sum() * y[-1].sum()
        return rest + strength * (first - second).cosh()

    pair = " and ".join(f"coordinate {place} of unit {unit}" for unit, place in zip(units, places, strict=True))
    with pytest.raises(StructureError, match=f"{pair} have a second derivative of"):
        check_structure(log_joint, theta, local)


@pytest.mark.parametrize(("strength", "found"), [(1e-3, True), (1e-10, False)])
def test_what_is_too_weak_to_tell_from_rounding(strength, found):
    def log_joint(theta, y):
        return independent(theta, y) + strength * y[0, 0] * y[1, 0]

    if found:
        with pytest.raises(StructureError):
            check_structure(log_joint, *POINT)
    else:
        check_structure(log_joint, *POINT)


@pytest.mark.parametrize("scales", [(1e-6, 1.0), (1e6, 1e-3)])
def test_units_of_very_different_size(scales):
    """A coupling of small units is not lost beside the curvature of a large one; rounding errors are no coupling."""
    size = torch.tensor([1.0, *[scales[1]] * 4])[:, None] * scales[0]

    def log_joint(theta, y):
        return -(theta**2).sum() - (size * (y - theta).cosh()).sum()

    check_structure(log_joint, *POINT)
    with pytest.raises(StructureError, match=r"unit 3 and .* of unit 4 "):
        check_structure(lambda theta, y: log_joint(theta, y) + size[3, 0] * y[3, 0] * y[4, 0], *POINT)


def test_float32():
    problem = Separable(3, 3, 2, terms=("scaled", "poisson", "mixture"), seed=3)
    point = [value.float() for value in problem.point]
    check_structure(problem.log_joint, *point)
    with pytest.raises(StructureError):
        check_structure(lambda theta, y: problem.log_joint(theta, y) - y[:, 0].sum() ** 2, *point)


def test_nothing_but_units_or_globals():
    check_structure(lambda theta, y: -(y**2).sum(), torch.zeros(0), torch.ones(2, 1))
    check_structure(lambda theta, y: -(theta**2).sum(), torch.ones(2), torch.ones(0, 1))


def test_state_is_left_alone():
    """No random number is drawn from torch's generator, and no graph is kept."""
    before = torch.get_rng_state()
    theta = POINT[0].clone().requires_grad_()
    check_structure(independent, theta, POINT[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert theta.grad is None


# ----------------------------------------------------------------------------------------------------- other defects


class Doubled(Function):
    """A product of two numbers; its backward is wrong for one of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(first, second):
        return first * second

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        first, second = ctx.saved_tensors
        return 2 * grad * second, grad * first


@pytest.mark.parametrize("order", [1, -1])
def test_wrong_backward(order):
    def log_joint(theta, y):
        return independent(theta, y) + Doubled.apply(*[theta.sum(), y.sum()][::order])

    with pytest.raises(InformationError, match=r"Hessian of log_joint is not symmetric: .* a Function whose backward"):
        check_structure(log_joint, *POINT)


@pytest.mark.parametrize("part", ["border", "tail"])
def test_blocks_of_another_point(part):
    blocks = arrowhead_information(independent, *POINT)
    wrong = blocks._replace(**{part: 1.01 * getattr(blocks, part)})
    with pytest.raises(StructureError, match=r"not those of log_joint at this point: unit 0 disagrees"):
        check_structure(independent, *POINT, wrong)


def test_head_of_another_point():
    blocks = arrowhead_information(independent, *POINT)
    with pytest.raises(InformationError, match="the Hessian of log_joint is not symmetric"):
        check_structure(independent, *POINT, blocks._replace(head=1.01 * blocks.head))


@pytest.mark.parametrize("part", ["head", "border", "tail"])
def test_blocks_that_are_not_finite(part):
    """NaN compares as neither too large nor small enough."""
    blocks = arrowhead_information(independent, *POINT)
    with pytest.raises((StructureError, InformationError)):
        check_structure(independent, *POINT, blocks._replace(**{part: getattr(blocks, part) * float("nan")}))


def test_refusals_of_the_information():
    with pytest.raises(InformationError, match=r"argument 'local' .* is nan at index \(0, 0\)"):
        check_structure(independent, POINT[0], POINT[1] * float("nan"))
