"""Batches of symmetric matrices: the screen against eigenvalues, taking out and putting back, the 2x2 eigenvectors."""

import math
import re

import pytest
import torch
from helpers.repairs import MATRICES
from helpers.strategies import batches, seeds, standard_normal
from hypothesis import given
from hypothesis import strategies as st

from laplace_amort import NotPositiveDefiniteError
from laplace_amort.linalg import symmetric
from laplace_amort.linalg.symmetric import eigh, put, screen, select, symmetric_part, unravel


def scales(batch, seed, own):
    """Positive, for every matrix its own or one for all."""
    shape = batch.shape[:-1] if own else batch.shape[-1:]
    return standard_normal(*shape, seed=seed).exp()


@given(batch=batches(), seed=seeds, own=st.booleans(), shift=st.sampled_from([-1.5, 0.0, 1e-3, 1.5]))
def test_screen_finds_the_eigenvalues_that_are_not_above_the_shift(batch, seed, own, shift):
    scale = scales(batch, seed, own)
    root = scale.expand(batch.shape[:-1]).sqrt()
    smallest = torch.linalg.eigvalsh(batch / (root.unsqueeze(-1) * root.unsqueeze(-2)))[:, 0]
    found, nearest = screen(batch, scale, shift)
    found = torch.zeros(0, dtype=torch.long) if found is None else found
    assert (found.numel() == 0) is (nearest is not None)
    clear = (smallest - shift).abs() > 1e-9 * (1 + batch.abs().amax(dim=(-2, -1)))  # else rounding decides
    below = torch.zeros(len(batch), dtype=torch.bool).index_fill(0, found, True)
    assert torch.equal(below[clear], (smallest <= shift)[clear])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_every_pivot_counts(n):
    """Diagonal matrices of which one element is below the shift."""
    batch = torch.diag_embed(2 - 1.5 * torch.eye(n))
    found, _ = screen(torch.cat([2 * torch.eye(n)[None], batch]), None, 1.0)
    assert found.tolist() == list(range(1, n + 1))
    assert screen(batch, None, 0.4) == (None, 0)


def test_nearest_is_the_smallest_in_units_of_the_scale():
    batch, scale = torch.tensor([2.0, 6.0, 3.0]).reshape(3, 1, 1), torch.tensor([[1.0], [10.0], [2.0]])
    assert int(screen(batch, None, 0.0)[1]) == 0
    assert int(screen(batch, scale, 0.0)[1]) == 1


def test_an_infinite_pivot_of_finite_matrices_is_no_reason_to_look_closer():
    matrix = torch.diag(torch.tensor([1e300, 1.0])).unsqueeze(0)
    assert screen(matrix, torch.tensor([1e-300, 1.0]), 0.0) == (None, 0)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(n, value):
    for i in range(n):
        for j in range(n):
            batch = 2 * torch.eye(n).repeat(3, 1, 1)
            batch[1, i, j] = batch[1, j, i] = value
            with pytest.raises(NotPositiveDefiniteError, match=rf"the matrix is {value} at index \[1, ."):
                screen(symmetric_part(batch), None, 1e-3)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(2), "scale has shape (2,); for matrices (4, 3, 3) it must be (4, 3) or (3,)"),
        (torch.ones(()), "scale has shape (); for matrices (4, 3, 3) it must be (4, 3) or (3,)"),
        (torch.tensor([1.0, 0.0, 1.0]), "scale is 0.0 at index [1]; it is a precision that must be positive"),
        (torch.tensor([1.0, 2.0, -1.0]), "scale is -1.0 at index [2]"),
        (torch.ones(4, 3).index_fill(0, torch.tensor(3), math.nan), "scale is nan at index [3, 0]"),
        (torch.ones(4, 3).index_fill(1, torch.tensor(1), math.inf), "scale is inf at index [0, 1]"),
    ],
)
def test_scales_that_are_none(scale, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        screen(torch.eye(3).expand(4, 3, 3), scale.double(), 0.0)


def test_a_scale_of_another_dtype():
    with pytest.raises(
        TypeError, match=r"scale is torch.float64 on cpu, but the matrices are torch.float32 on cpu; con"
    ):
        screen(torch.eye(2, dtype=torch.float32), torch.ones(2), 0.0)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_symmetric_part(n):
    exact = torch.ones(3, n, n).cumsum(-1).cumsum(-2)
    assert symmetric_part(exact) is exact
    nearly = exact.clone()
    nearly[1, n - 1, 0] += 1e-6
    torch.testing.assert_close(symmetric_part(nearly), (nearly + nearly.mT) / 2, rtol=0, atol=0)
    nearly[1, n - 1, 0] += 1.0
    with pytest.raises(ValueError, match=r"differs from its transpose by 1; a precision matrix is symmetric"):
        symmetric_part(nearly)


def test_not_square():
    for shape in ((2, 3), (3,)):
        with pytest.raises(ValueError, match=re.escape(f"expected square matrices of shape (*, n, n), got {shape}")):
            symmetric_part(torch.ones(shape))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (1, 1, 4)])
def test_taking_out_and_putting_back(batch):
    count = torch.Size(batch).numel()
    matrix = torch.arange(4.0 * count).reshape(*batch, 2, 2)
    scale = torch.arange(1.0, 1 + 2 * count).reshape(*batch, 2)
    for index in (torch.arange(count), torch.tensor([count - 1]), torch.tensor([], dtype=torch.long)):
        some, unit = select(matrix, scale, index)
        roots = scale.reshape(-1, 2)[index].sqrt()
        assert torch.equal(some, matrix.reshape(-1, 2, 2)[index])
        torch.testing.assert_close(unit.expand(len(index), 2, 2), roots.unsqueeze(-1) * roots.unsqueeze(-2))
        assert torch.equal(put(matrix, index, some), matrix)
        replaced = put(matrix, index, -1 - some)
        assert replaced.shape == matrix.shape
        expected = [unravel(i, matrix.shape[:-2]) for i in index]
        assert [tuple(i.tolist()) for i in (replaced < 0).all(-1).all(-1).nonzero()] == expected
    assert select(matrix, None, index)[1] is None


@pytest.mark.parametrize("name", ["indefinite 2x2", "zero 2x2", "1x1", "spread"])
def test_eigh(name):
    matrix = MATRICES[name]
    check_eigh(matrix)
    check_eigh(1e-200 * matrix)
    check_eigh(1e200 * matrix)


@given(batch=batches(max_size=2), power=st.sampled_from([-290, -20, 0, 20, 290]))
def test_eigh_of_batches(batch, power):
    check_eigh(batch * 10.0**power)


def test_eigh_of_the_largest_numbers():
    largest = torch.finfo(torch.float64).max
    torch.testing.assert_close(eigh(torch.eye(2) * largest)[0], torch.full((2,), largest))


def check_eigh(matrix):
    eigenvalues, eigenvectors = eigh(matrix)
    size = matrix.abs().amax(dim=(-2, -1), keepdim=True) + 1e-320
    rebuilt = (eigenvectors * (eigenvalues / size.squeeze(-1)).unsqueeze(-2)) @ eigenvectors.mT
    torch.testing.assert_close(rebuilt, matrix / size, rtol=0, atol=1e-14)
    identity = torch.eye(matrix.shape[-1]).expand_as(matrix)
    torch.testing.assert_close(eigenvectors.mT @ eigenvectors, identity, rtol=0, atol=1e-14)
    assert (eigenvalues.diff(dim=-1) >= 0).all()


def test_planted_screen_without_its_last_pivot_is_caught(monkeypatch):
    """The comparison with eigenvalues does see an elimination that stops early."""
    pivots = symmetric._pivots
    monkeypatch.setattr(symmetric, "_pivots", lambda matrix, shift: pivots(matrix, shift)[:1])
    with pytest.raises(AssertionError):
        test_screen_finds_the_eigenvalues_that_are_not_above_the_shift()
