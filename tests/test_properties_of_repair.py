"""Properties of SoftAbs over spectra where eigenvalues coincide, nearly coincide, vanish or are negative."""

import pytest
import torch
from hypothesis import given
from oracles import finite_difference, relative_error, slope, softabs_by_doubling
from strategies import batches, floors, orthogonal, seeds, spectra, standard_normal, well_conditioned

from laplace_amort import SoftAbs

EXACT = 1e-9  # two routes that differ by rounding error only, relative to the largest eigenvalue
DIFFERENCE = 1e-6  # against finite differences


def repair(matrix, floor):
    return SoftAbs(floor, max_relative_change=2)(matrix)[0]


def gradient_of(fn, matrix, create_graph=False):
    """Gradient of a scalar function of a matrix, which is shown only the symmetric part."""
    matrix = matrix if matrix.requires_grad else matrix.clone().requires_grad_()
    return torch.autograd.grad(fn((matrix + matrix.mT) / 2), matrix, create_graph=create_graph)[0]


def curvature_of(fn, matrix, direction):
    """The same of its directional derivative: one row of the Hessian, reverse over reverse."""
    matrix = matrix.clone().requires_grad_()
    derivative = (direction * gradient_of(fn, matrix, create_graph=True)).sum()
    return torch.autograd.grad(derivative + 0 * matrix.sum(), matrix)[0]  # a constant has no graph


def test_references_against_known_answers():
    eigenvalues = torch.tensor([-200.0, -1.0, -1e-3, 1e-3, 0.4, 3.0, 200.0])
    doubled = softabs_by_doubling(torch.diag(eigenvalues), 0.5).diagonal()
    torch.testing.assert_close(doubled, eigenvalues / torch.tanh(2 * eigenvalues), rtol=1e-13, atol=1e-13)
    assert float(softabs_by_doubling(torch.zeros(1, 1), 0.5)) == pytest.approx(0.5, abs=1e-15)
    point = torch.tensor([0.3, -0.8])
    jacobian = finite_difference(lambda v: torch.stack([v.prod().exp(), v[0].sin()]), point)
    factor = torch.exp(point.prod())
    expected = torch.stack([factor * point.flip(0), torch.stack([point[0].cos(), torch.zeros(())])])
    torch.testing.assert_close(jacobian, expected, rtol=1e-11, atol=1e-11)


@given(spectrum=spectra(), floor=floors)
def test_value_equals_doubling_and_no_eigenvalue_falls_below_the_floor(spectrum, floor):
    repaired = repair(spectrum.matrix, floor)
    assert relative_error(repaired, softabs_by_doubling(spectrum.matrix, floor)) < EXACT
    assert relative_error(repaired, repaired.mT) < 1e-14
    eigenvalues = torch.linalg.eigvalsh(repaired)
    assert eigenvalues[0] >= floor - 1e-13 * eigenvalues[-1]


@given(spectrum=well_conditioned(), floor=floors)
def test_leaves_well_conditioned_matrices_alone(spectrum, floor):
    matrix = floor * spectrum.matrix
    assert torch.linalg.eigvalsh(matrix)[0] > 12 * floor
    repaired, report = SoftAbs(floor, max_relative_change=1e-8)(matrix)
    assert torch.linalg.matrix_norm(repaired - matrix) <= 1e-8 * torch.linalg.matrix_norm(matrix)
    assert report.num_repaired == 0


@given(spectrum=spectra(max_size=4), floor=floors, seed=seeds)
def test_derivatives_equal_doubling_and_finite_differences(spectrum, floor, seed):
    matrix, step = spectrum.matrix, floor / 2
    weight, direction = (standard_normal(*matrix.shape, seed=seed + i) for i in range(2))

    def ours(value):
        return (weight * repair((value + value.mT) / 2, floor)).sum()

    def oracle(value):
        return (weight * softabs_by_doubling(value, floor)).sum()

    def along(value):
        return (direction * gradient_of(ours, value)).sum()

    first, second = gradient_of(ours, matrix), curvature_of(ours, matrix, direction)
    assert relative_error(first, gradient_of(oracle, matrix)) < EXACT
    assert relative_error(first, finite_difference(ours, matrix, step)) < DIFFERENCE
    assert relative_error(second, curvature_of(oracle, matrix, direction)) < EXACT
    assert relative_error((second * direction).sum(), slope(along, matrix, direction, step)) < DIFFERENCE


@given(spectrum=spectra(), floor=floors, seed=seeds)
def test_equivariant_under_orthogonal_conjugation(spectrum, floor, seed):
    basis = orthogonal(len(spectrum.eigenvalues), seed)
    turned = repair(basis @ spectrum.matrix @ basis.mT, floor)
    assert relative_error(turned, basis @ repair(spectrum.matrix, floor) @ basis.mT) < 1e-12


@given(batch=batches(), floor=floors)
def test_report_equals_recomputed_numbers(batch, floor):
    repaired, report = SoftAbs(floor, max_relative_change=2)(batch)
    change = torch.linalg.matrix_norm(repaired - batch) / torch.linalg.matrix_norm(repaired)
    moved = torch.linalg.eigvalsh((repaired - batch) - 1e-3 * repaired)[:, -1] > 0
    size = float(batch.abs().max())
    assert report.num_matrices == len(batch)
    assert report.num_repaired == int(moved.sum())
    assert report.smallest_before == pytest.approx(float(torch.linalg.eigvalsh(batch).min()), abs=1e-12 * (1 + size))
    assert report.smallest_after == pytest.approx(float(torch.linalg.eigvalsh(repaired).min()), abs=1e-12 * (1 + size))
    assert report.relative_change == pytest.approx(float(change.max()), abs=1e-12)
    assert float(change[report.worst]) == pytest.approx(float(change.max()), abs=1e-12)


@given(batch=batches(), floor=floors)
def test_a_batch_is_repaired_matrix_by_matrix(batch, floor):
    expected = torch.stack([repair(matrix, floor) for matrix in batch])
    torch.testing.assert_close(repair(batch, floor), expected, rtol=1e-12, atol=1e-12)


def floored(matrix, floor):
    """The rival that one would write first: clip the eigenvalues; not smooth, and its eigh has no derivative."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return (eigenvectors * eigenvalues.abs().clamp(min=floor)) @ eigenvectors.mT


@pytest.mark.parametrize(
    "spectrum", [(1.0, 1.0), (1.0, -1.0), (0.5, 3.0)], ids=["repeated", "opposite", "at the floor"]
)
def test_comparison_catches_clipped_eigenvalues(spectrum):
    matrix, weight = torch.diag(torch.tensor(spectrum)), standard_normal(2, 2, seed=1)
    gradient = gradient_of(lambda value: (weight * floored(value, 0.5)).sum(), matrix)
    expected = gradient_of(lambda value: (weight * softabs_by_doubling(value, 0.5)).sum(), matrix)
    assert not relative_error(gradient, expected) < DIFFERENCE  # NaN, or far off
