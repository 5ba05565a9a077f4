"""Gradient and curvature of each unit: against the blocks of the information, and where units overflow."""

import math

import pytest
import torch
from helpers.separable import KnownMode, Separable, separable
from helpers.strategies import standard_normal
from hypothesis import given
from torch.autograd import gradcheck

from laplace_amort.autodiff.information import (
    arrowhead_information,
    first_derivatives,
    local_curvature,
    local_information,
)


@given(problem=separable())
def test_local_information(problem):
    point = [value.clone().requires_grad_() for value in problem.point]
    gradient, tail = local_information(problem.log_joint, *point)
    slopes = first_derivatives(problem.log_joint, *point)
    torch.testing.assert_close(gradient, slopes.in_local, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tail, slopes.blocks().tail, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tail, local_curvature(slopes.in_local, slopes.local), rtol=1e-12, atol=1e-12)
    # Both are attached to both arguments: the border is a derivative of the gradient.
    pull = standard_normal(*gradient.shape, seed=problem.seed)
    (in_global,) = torch.autograd.grad((pull * gradient).sum(), point[0])
    expected = -torch.einsum("nk,nkd->d", pull, arrowhead_information(problem.log_joint, *problem.point).border)
    torch.testing.assert_close(in_global, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", [0, 1], ids=["gradient", "tail"])
def test_local_information_gradcheck(what):
    problem = KnownMode("poisson", 1, 2, 2)
    point = [problem.global_.clone().requires_grad_(), problem.mode(problem.global_).requires_grad_()]
    assert gradcheck(lambda *point: local_information(problem.log_joint, *point)[what], point)


@pytest.mark.parametrize("k", [1, 2])
def test_a_unit_that_overflows_leaves_the_others_alone(k):
    def log_joint(theta, y):
        return -(y.exp() + (y - theta) ** 2).sum()

    y = torch.zeros(3, k)
    y[1, 0] = 1000.0
    gradient, tail = local_information(log_joint, torch.zeros(1), y)
    assert gradient[1, 0] == -math.inf
    assert not tail[1].isfinite().all()
    torch.testing.assert_close(gradient[[0, 2]], -torch.ones(2, k))
    torch.testing.assert_close(tail[[0, 2]], 3 * torch.eye(k).expand(2, k, k))


def test_local_information_where_there_is_none():
    gradient, tail = local_information(lambda theta, y: (theta**2).sum(), torch.ones(2), torch.ones(3, 2))
    assert torch.equal(gradient, torch.zeros(3, 2))
    assert torch.equal(tail, torch.zeros(3, 2, 2))


def test_without_graph():
    problem = Separable(2, 3, 2)
    point = [value.clone().requires_grad_() for value in problem.point]
    with torch.no_grad():
        actual = local_information(problem.log_joint, *point)
    for one, other in zip(actual, local_information(problem.log_joint, *point), strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, other.detach())
