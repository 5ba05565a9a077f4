"""Boost: its parameter, what it adds, and that the gradient reaches it."""

import copy
import re

import pytest
import torch
from helpers.repairs import MATRICES, MIXED, check_derivatives, symmetrized, with_eigenvalues
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from laplace_amort import NotPositiveDefiniteError, SoftAbs
from laplace_amort.linalg.boost import Boost
from laplace_amort.linalg.modified_cholesky import ModifiedCholesky
from laplace_amort.linalg.repair import NoRepair, Repair

SCALE = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def boost(strength=0.2, base=None, size=3):
    return Boost(strength, base).prepare(size, like=torch.zeros((), dtype=torch.float64))


def test_adds_its_strength_in_units_of_the_scale():
    matrix = with_eigenvalues(1.0, 3.0, 9.0)
    for strategy in (boost(), boost(base=NoRepair())):
        torch.testing.assert_close(strategy(matrix)[0], matrix + 0.2 * torch.eye(3))
        torch.testing.assert_close(strategy(matrix, SCALE)[0], matrix + torch.diag(0.2 * SCALE))
    own = torch.stack([SCALE, SCALE.flip(0), 2 * SCALE])
    batch = matrix.expand(3, 3, 3)
    torch.testing.assert_close(boost()(batch, own)[0], batch + torch.diag_embed(0.2 * own))


@pytest.mark.parametrize("base", [SoftAbs(0.5), ModifiedCholesky(0.5)], ids=["SoftAbs", "ModifiedCholesky"])
def test_the_base_repairs_what_is_boosted(base):
    result, report = boost(base=base)(MIXED, SCALE)
    expected, expected_report = base(MIXED + torch.diag(0.2 * SCALE), SCALE)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)
    assert str(report) == str(expected_report)
    assert report.num_repaired > 0


def test_it_can_do_without_the_base():
    """A strength that makes up for the negative eigenvalue leaves nothing to repair."""
    matrix = with_eigenvalues(-0.5, 1.0, 2.0)
    assert boost(0.6, NoRepair())(matrix)[1].num_repaired == 0
    with pytest.raises(NotPositiveDefiniteError, match=r"its smallest eigenvalue is -0\.1"):
        boost(0.4, NoRepair())(matrix)


@pytest.mark.parametrize("strength", [1e-12, 1e-3, 0.7, 50.0, 1e4])
def test_strength_at_the_start(strength):
    torch.testing.assert_close(boost(strength).strength, torch.full((3,), strength), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["negative", "zero", "batch"])
def test_derivatives_in_matrix_scale_and_strength(name):
    strategy = boost(base=SoftAbs(0.5))

    def repaired(matrix, scale, raw):
        return functional_call(strategy, {"raw": raw}, (matrix, scale))[0]

    check_derivatives(
        lambda matrix, *others: repaired((matrix + matrix.mT) / 2, *others),
        MATRICES[name],
        SCALE,
        torch.tensor([-1.0, 0.3, 2.0]),
    )


def test_backward_reaches_the_parameter():
    strategy = boost()
    symmetrized(strategy)(MIXED, SCALE).sum().backward()
    assert (strategy.raw.grad != 0).all()


def test_planted_detached_strength_is_seen(monkeypatch):
    strategy = boost()
    monkeypatch.setattr(Boost, "strength", property(lambda self: nn.functional.softplus(self.raw.detach())))
    with pytest.raises((RuntimeError, AssertionError)):
        gradcheck(lambda raw: functional_call(strategy, {"raw": raw}, (MIXED,))[0], torch.ones(3, requires_grad=True))


def test_preparing_gives_a_copy_with_parameters_of_its_own():
    template = Boost(0.2)
    first, second = template.prepare(2, torch.zeros((), dtype=torch.float32)), template.prepare(3, SCALE)
    assert isinstance(template, Repair)
    assert list(template.parameters()) == []
    assert (first.raw.shape, first.raw.dtype, second.raw.shape, second.raw.dtype) == (
        (2,),
        torch.float32,
        (3,),
        torch.float64,
    )
    with torch.no_grad():
        second.raw.add_(1.0)
    again = second.prepare(3, SCALE)
    assert (again.raw < second.raw).all()
    assert first(torch.eye(2, dtype=torch.float32))[0].dtype == torch.float32


def test_a_base_that_learns_is_prepared_too():
    strategy = Boost(0.1, Boost(0.3)).prepare(2, SCALE)
    assert [name for name, _ in strategy.named_parameters()] == ["raw", "base.raw"]
    torch.testing.assert_close(strategy(torch.eye(2))[0], 1.4 * torch.eye(2))


def test_state_copies():
    strategy = boost(0.4)
    copied = copy.deepcopy(strategy)
    restored = boost(0.1)
    restored.load_state_dict(strategy.state_dict())
    for other in (copied, restored):
        assert torch.equal(other(torch.eye(3))[0], strategy(torch.eye(3))[0])
        assert other.raw is not strategy.raw


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_strength_must_be_positive(strength):
    with pytest.raises(
        ValueError, match=f"strength must be a positive share of the scale, got {strength}; the default"
    ):
        Boost(strength)


def test_using_it_unprepared_or_for_another_size():
    with pytest.raises(RuntimeError, match=re.escape("boost = boost.prepare(matrix.shape[-1], like=matrix)")):
        Boost()(torch.eye(2))
    for matrix in (torch.eye(2), torch.ones(())):
        with pytest.raises(ValueError, match="this Boost was prepared for matrices of size 3, and this one is"):
            boost()(matrix)
