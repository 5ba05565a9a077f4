"""Blocks are repaired in units that do not depend on coordinates, and what is positive definite stays."""

import pytest
import torch

from laplace_amort import Boost, ModifiedCholesky, NoRepair, NotPositiveDefiniteError, SoftAbs
from laplace_amort.linalg.arrowhead_repair import repair_head, repair_tails

REPAIRS = [SoftAbs(), ModifiedCholesky(), NoRepair()]
NEARLY_ONE = torch.tensor([[1.0, 0.9998], [0.9998, 1.0]], dtype=torch.float64)
STAY = {
    "a unit without data beside one with a million": torch.tensor([1.0, 1e6, 3.0], dtype=torch.float64)[:, None, None],
    "coordinates of different size": torch.tensor([[[1e6, 0.0], [0.0, 1.0]], [[1e6, 9.0], [9.0, 1.0]]]).double(),
    "coordinates that are nearly one": torch.stack([NEARLY_ONE, 5 * NEARLY_ONE, 30 * torch.eye(2).double()]),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def symmetric(n, seed=0):
    matrix = random(n, n, seed=seed)
    return matrix + matrix.mT


def definite(n, seed=0):
    root = random(n, n, seed=seed)
    return root @ root.mT + torch.eye(n)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("name", STAY)
def test_what_is_positive_definite_stays(name, repair):
    repaired, report = repair_tails(repair, STAY[name])
    torch.testing.assert_close(repaired, STAY[name], rtol=1e-6, atol=0)
    assert report.num_repaired == 0


def test_a_unit_is_repaired_alone():
    tail = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, -3.0])), 4 * torch.eye(2)])
    repaired, report = repair_tails(SoftAbs(), tail)
    torch.testing.assert_close(repaired, tail.abs())
    assert (report.num_repaired, report.worst) == (1, (1,))
    with pytest.raises(NotPositiveDefiniteError, match=r"\[1\]"):
        repair_tails(NoRepair(), tail)


def test_a_flat_unit_gets_a_share_of_what_is_typical():
    repaired, _ = repair_tails(SoftAbs(floor=1e-3), torch.tensor([0.0, 100.0, 100.0]).reshape(3, 1, 1))
    typical = 100 * (2 / 3) ** 0.5
    torch.testing.assert_close(repaired[0, 0, 0], torch.tensor(1e-3 * 1e-2 * 1e-2 * typical))
    assert repaired[1:].flatten().tolist() == [100.0, 100.0]


def test_tails_do_not_depend_on_the_units_of_coordinates():
    tail = torch.stack([symmetric(3, seed) for seed in range(5)])
    units = torch.tensor([1e-3, 1.0, 50.0])
    change = units[:, None] * units
    repaired, _ = repair_tails(SoftAbs(), tail)
    torch.testing.assert_close(repair_tails(SoftAbs(), tail * change)[0], repaired * change, rtol=1e-7, atol=0)
    assert not torch.allclose(repaired, tail)


def check_invariance(repair_schur):
    head, schur, change = definite(3), symmetric(3, 1), random(3, 3, seed=2)
    repaired = repair_schur(schur, head)
    there = repair_schur(change.mT @ schur @ change, change.mT @ head @ change)
    torch.testing.assert_close(there, change.mT @ repaired @ change, rtol=1e-8, atol=1e-8)
    assert torch.linalg.eigvalsh(schur)[0] < 0 < torch.linalg.eigvalsh(repaired)[0]


def test_the_head_does_not_depend_on_coordinates():
    check_invariance(lambda schur, head: repair_head(SoftAbs(floor=0.05), schur, head)[0])


def test_a_diagonal_reference_depends_on_coordinates():
    with pytest.raises(AssertionError):
        check_invariance(lambda schur, head: SoftAbs(floor=0.05)(schur, head.diagonal())[0])


@pytest.mark.parametrize("repair", REPAIRS)
def test_collinear_globals_stay(repair):
    head = torch.tensor([[1.0, 2000.0], [2000.0, 4000025.0]])  # an intercept, and a slope in years
    schur = 0.3 * head
    repaired, report = repair_head(repair, schur, head)
    assert torch.equal(repaired, schur)
    assert report.smallest_before == pytest.approx(0.3, rel=1e-5)


def test_an_indefinite_head_is_no_obstacle():
    head = torch.diag(torch.tensor([-4.0, 9.0]))
    schur = torch.diag(torch.tensor([-5.0, 3.0]))
    repaired, report = repair_head(SoftAbs(), schur, head)
    torch.testing.assert_close(repaired, schur.abs(), rtol=1e-6, atol=1e-12)
    assert report.smallest_before == pytest.approx(-5 / 4, rel=0.05)


@pytest.mark.parametrize(
    "repair", [SoftAbs(floor=0.1), ModifiedCholesky(floor=0.1), Boost().prepare(3, torch.zeros(()))]
)
def test_derivatives_flow_through_the_reference(repair):
    def head(schur, reference):
        return repair_head(repair, (schur + schur.mT) / 2, (reference + reference.mT) / 2)[0]

    def tails(tail):
        return repair_tails(repair, (tail + tail.mT) / 2)[0]

    inputs = symmetric(3, 1).requires_grad_(), definite(3).requires_grad_()
    assert torch.autograd.gradcheck(head, inputs)
    assert torch.autograd.gradgradcheck(head, inputs)
    assert torch.autograd.gradcheck(tails, torch.stack([symmetric(3, 3), definite(3, 4)]).requires_grad_())


def test_nothing_to_repair():
    empty = torch.zeros(0, 0)
    repaired, report = repair_head(SoftAbs(), empty, empty)
    assert repaired.shape == (0, 0)
    assert report.num_repaired == 0
