"""ModifiedCholesky: against its formulas written out, against the hard maxima of the book, and its guarantees."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers.oracles import relative_error
from helpers.repairs import MATRICES, MIXED, check_derivatives, symmetrized
from helpers.strategies import batches, floors, seeds, spectra, standard_normal, well_conditioned
from hypothesis import given
from torch import Tensor

from laplace_amort import NotPositiveDefiniteError, SoftAbs
from laplace_amort.linalg import modified_cholesky
from laplace_amort.linalg.modified_cholesky import ModifiedCholesky
from laplace_amort.linalg.repair import Repair

SCALE = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def smooth_abs(c: float, floor: float) -> float:
    return floor if abs(c) < 1e-9 * floor else c / math.tanh(c / floor)


def written_out(matrix: Tensor, floor: float, absolute: Callable[[float, float], float] = smooth_abs) -> Tensor:
    """E, element by element in plain Python; with ``abs`` in place of the smooth one, E of hard maxima."""
    a, n = matrix.tolist(), len(matrix)
    squares = sum(a[i][j] ** 2 for i in range(n) for j in range(n) if i != j)
    bound = sum(absolute(a[i][i], floor) for i in range(n)) + math.sqrt(floor**2 + squares / max(n**2 - 1, 1))
    rows, increases = [row[:] for row in a], []
    for j in range(n):
        pivot, raised = rows[j][j], absolute(rows[j][j], floor)
        if j < n - 1:
            least = sum(rows[i][j] ** 2 for i in range(j + 1, n)) / bound
            raised = (raised + least + absolute(raised - least, floor)) / 2
        increases.append(raised - pivot)
        for i in range(j + 1, n):
            for k in range(j + 1, n):
                rows[i][k] -= rows[i][j] * rows[k][j] / raised
    return torch.tensor(increases)


def hard(c: float, floor: float) -> float:
    return max(abs(c), floor)


def repaired(matrix: Tensor, floor: float) -> Tensor:
    """The repair itself, without the screen before it."""
    return ModifiedCholesky(floor)._repair(matrix.unsqueeze(0))[0].squeeze(0)


@given(spectrum=spectra(), floor=floors)
def test_equals_its_formulas(spectrum, floor):
    expected = spectrum.matrix + torch.diag(written_out(spectrum.matrix, floor))
    assert relative_error(ModifiedCholesky(floor)(spectrum.matrix)[0], expected) < 1e-9


def test_a_small_floor_gives_the_hard_maxima():
    matrix = MATRICES["spread"]
    expected = matrix + torch.diag(written_out(matrix, 1e-7, hard))
    torch.testing.assert_close(ModifiedCholesky(1e-7)(matrix)[0], expected, rtol=0, atol=1e-9)


@given(spectrum=spectra(), floor=floors)
def test_pivots_are_at_least_the_floor_and_elements_bounded(spectrum, floor):
    result = ModifiedCholesky(floor)(spectrum.matrix)[0]
    increase = result - spectrum.matrix
    assert torch.equal(increase, torch.diag(increase.diagonal()))
    assert increase.diagonal().min() >= -1e-12
    factor = torch.linalg.cholesky(result)
    pivots = factor.diagonal() ** 2
    assert pivots.min() >= floor * (1 - 1e-9)
    assert (increase.diagonal() <= 2 * pivots + 1e-9).all()
    beta = modified_cholesky._element_bound(spectrum.matrix, floor).sqrt()
    assert factor.tril(-1).abs().max() <= beta * (1 + 1e-9)


@given(spectrum=well_conditioned())
def test_leaves_alone_whatever_is_twenty_floors_from_indefinite(spectrum):
    """Also without the screen: so there is no step at it."""
    floor = 0.99 * float(torch.linalg.eigvalsh(spectrum.matrix)[0]) / 20
    assert relative_error(repaired(spectrum.matrix, floor), spectrum.matrix) < 1e-13
    result, report = ModifiedCholesky(floor)(spectrum.matrix)
    assert result is spectrum.matrix or torch.equal(result, spectrum.matrix)
    assert report.num_repaired == 0


def test_correlations_near_one_are_the_hardest_to_leave_alone():
    for n in (2, 3, 6):
        for smallest in (1e-6, 1e-3, 0.1):
            matrix = (1 - smallest) * torch.ones(n, n) + smallest * torch.eye(n)
            change = repaired(matrix, smallest * 0.99 / 20) - matrix
            assert change.abs().max() < 1e-14  # rounding errors of n eliminations, of elements up to 1


@given(spectrum=spectra(max_size=1), floor=floors)
def test_of_a_number_it_is_softabs(spectrum, floor):
    assert relative_error(ModifiedCholesky(floor)(spectrum.matrix)[0], SoftAbs(floor)(spectrum.matrix)[0]) < 1e-14


@given(batch=batches(), floor=floors, seed=seeds)
def test_the_default_bound_refuses_nothing(batch, floor, seed):
    scale = standard_normal(batch.shape[-1], seed=seed).exp()
    assert ModifiedCholesky(floor)(-batch, scale)[1].relative_change <= 2 + 1e-12


def test_bound():
    matrix = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])  # relative change 2 / sqrt 2
    ModifiedCholesky(max_relative_change=1.415)(matrix)
    with pytest.raises(NotPositiveDefiniteError, match=r"bound 1\.414[\s\S]*\n    ModifiedCholesky\(max_relative_ch"):
        ModifiedCholesky(max_relative_change=1.414)(matrix)
    with pytest.raises(ValueError, match="floor must be a positive share of the scale, got 0"):
        ModifiedCholesky(0.0)


def test_float32_and_extreme_sizes():
    for size in (1e-12, 1.0, 1e12):
        matrix = MATRICES["indefinite"].float() * size
        result, report = ModifiedCholesky(1e-3)(matrix, torch.full((3,), size, dtype=torch.float32))
        expected = ModifiedCholesky(1e-3)(MATRICES["indefinite"], torch.ones(3))[0]
        torch.testing.assert_close((result / size).double(), expected, rtol=1e-5, atol=1e-5)
        assert result.dtype == torch.float32
        assert report.smallest_before == pytest.approx(-1.2, rel=1e-5)


def test_is_a_repair_without_parameters():
    assert isinstance(ModifiedCholesky(), Repair)
    assert ModifiedCholesky().prepare(3, torch.zeros(())) == ModifiedCholesky(1e-3, 2.0)


# --------------------------------------------------------------------------------------------------- derivatives

NAMES = ["1x1", "zero 2x2", "indefinite 2x2", "repeated", "multiple of the identity", "zero", "zero eigenvalues"]
NAMES += ["negative", "nested batch"]


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str) -> None:
    matrix = MATRICES[name]
    check_derivatives(symmetrized(ModifiedCholesky(0.5)), matrix, SCALE[: matrix.shape[-1]])


def test_derivatives_of_a_batch_of_which_some_are_repaired() -> None:
    check_derivatives(symmetrized(ModifiedCholesky(0.5)), MIXED, SCALE)


def test_planted_hard_maxima_have_wrong_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modified_cholesky, "softabs", lambda values, floor: values.abs().clamp(min=floor))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_derivatives("zero 2x2")
