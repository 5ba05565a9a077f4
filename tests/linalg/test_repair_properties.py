"""Properties of the repairs over spectra where eigenvalues coincide, nearly coincide, vanish or are negative."""

import pytest
import torch
from helpers.oracles import finite_difference, relative_error, slope, softabs_by_doubling
from helpers.strategies import batches, floors, orthogonal, seeds, spectra, standard_normal, well_conditioned
from hypothesis import given
from hypothesis import strategies as st

from laplace_amort import NoRepair, NotPositiveDefiniteError, SoftAbs
from laplace_amort.linalg.arrowhead_repair import repair_head
from laplace_amort.linalg.boost import Boost
from laplace_amort.linalg.modified_cholesky import ModifiedCholesky
from laplace_amort.linalg.softabs import softabs, softabs_matrix

EXACT = 1e-9  # two routes that differ by rounding error only, relative to the largest eigenvalue
DIFFERENCE = 1e-6  # against finite differences


REPAIRS = {"SoftAbs": SoftAbs, "ModifiedCholesky": ModifiedCholesky, "Boost": lambda f: Boost(f, SoftAbs(f))}
all_repairs = pytest.mark.parametrize("kind", REPAIRS)


def repair(matrix, floor, kind="SoftAbs", scale=None):
    strategy = REPAIRS[kind](floor).prepare(matrix.shape[-1], like=matrix)
    return strategy(matrix, scale)[0]


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
    assert torch.equal(repaired, repaired.mT)
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


@pytest.mark.parametrize("kind", ["SoftAbs", "ModifiedCholesky"])
@given(batch=batches(), floor=floors, seed=seeds)
def test_report_equals_recomputed_numbers(kind, batch, floor, seed):
    scale = standard_normal(batch.shape[-1], seed=seed).exp()
    repaired, report = REPAIRS[kind](floor)(batch, scale)
    before, after = (value / torch.outer(scale, scale).sqrt() for value in (batch, repaired))
    change = torch.linalg.matrix_norm(after - before) / torch.linalg.matrix_norm(after)
    excess = torch.linalg.eigvalsh((after - before) - 1e-3 * after)[:, -1]
    spectra_before, spectra_after = (torch.linalg.eigvalsh(value)[:, 0] for value in (before, after))
    near = 1e-11 * (1 + float(before.abs().max()))
    assert report.num_matrices == len(batch)
    assert int((excess > near).sum()) <= report.num_repaired <= int((excess > -near).sum())
    assert report.relative_change == pytest.approx(float(change.max()), abs=1e-11)
    if report.worst:
        assert report.smallest_before == pytest.approx(float(spectra_before.min()), abs=near)
        assert report.smallest_after == pytest.approx(float(spectra_after.min()), abs=near)
        assert float(change[report.worst]) == pytest.approx(float(change.max()), abs=1e-11)
    else:  # nothing was near to needing it
        assert float(spectra_before.min()) > 20 * floor * (1 - 1e-9)
        assert float((spectra_before - report.smallest_before).abs().min()) < near


@all_repairs
@given(batch=batches(), floor=floors, seed=seeds, own=st.booleans())
def test_a_batch_is_repaired_matrix_by_matrix(kind, batch, floor, seed, own):
    scale = standard_normal(*(batch.shape[:-1] if own else batch.shape[-1:]), seed=seed).exp()
    scales = scale.expand(batch.shape[:-1])
    expected = torch.stack([repair(matrix, floor, kind, s) for matrix, s in zip(batch, scales, strict=True)])
    assert relative_error(repair(batch, floor, kind, scale), expected) < 1e-12
    nested = repair(batch.unsqueeze(0), floor, kind, scale.unsqueeze(0) if own else scale)
    assert torch.equal(nested, repair(batch, floor, kind, scale).unsqueeze(0))


@all_repairs
@given(spectrum=spectra(), floor=floors, seed=seeds)
def test_rescaled_coordinates_give_the_rescaled_result(kind, spectrum, floor, seed):
    """With the scale rescaled alike: then the unit of a coordinate does not matter."""
    scale, factor = (standard_normal(len(spectrum.eigenvalues), seed=seed + i).exp() for i in range(2))
    square = torch.outer(factor, factor)
    expected = repair(spectrum.matrix, floor, kind, scale)
    actual = repair(square * spectrum.matrix, floor, kind, factor**2 * scale)
    assert relative_error(actual / square, expected) < 1e-11


def test_without_the_scale_units_matter():
    """So the property above says something."""
    matrix, square = torch.diag(torch.tensor([1.0, -1.0])), torch.tensor([[1.0, 0.1], [0.1, 0.01]])
    assert relative_error(repair(square * matrix, 0.5) / square, repair(matrix, 0.5)) > 0.1


# Along each of these paths an eigenvalue passes zero, two coincide (at t = 0 without an avoided crossing), or the
# matrix passes 20 floors, from where on it is left alone.
PATHS = {
    "through zero": lambda t, basis: basis @ torch.diag(torch.stack([t, 0 * t + 1])) @ basis.mT,
    "two through zero": lambda t, basis: basis @ torch.diag(torch.stack([t, 2 * t])) @ basis.mT,
    "crossing": lambda t, basis: basis @ torch.diag(torch.stack([t + 0.1, 0.1 - t])) @ basis.mT,
    "turning": lambda t, basis: 0.3 * basis + 0.3 * basis.mT + t * basis.abs(),
    "single": lambda t, basis: t.reshape(1, 1),
    "away": lambda t, basis: basis @ torch.diag(torch.stack([2 + t / 10, 2 - t / 5])) @ basis.mT,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["SoftAbs", "ModifiedCholesky"])
def test_smooth_along_paths(kind, path):
    """Value, slope and curvature from autograd against finite differences of the same path, on both sides and at 0."""
    basis, floor = torch.tensor([[0.6, -0.8], [0.8, 0.6]]), 0.1
    scale = torch.ones(1 if path == "single" else 2)

    def along(t):
        result = repair(PATHS[path](t, basis), floor, kind, scale)
        return (result * torch.tensor([[1.0, 0.4], [-0.3, 2.0]])[: len(scale), : len(scale)]).sum()

    def derivative(fn):
        def of(t):
            t = t if t.requires_grad else t.clone().requires_grad_()
            return torch.autograd.grad(fn(t) + 0 * t, t, create_graph=True)[0]

        return of

    for t in torch.tensor([-0.5, -0.05, -1e-6, 0.0, 1e-9, 0.03, 0.1, 0.5]):
        first, second = derivative(along), derivative(derivative(along))
        assert relative_error(first(t).detach(), finite_difference(along, t, floor / 4)) < 1e-8
        assert relative_error(second(t), finite_difference(first, t, floor / 4)) < 1e-7


def clipped(floor):
    """Planted: the eigenvalues below the floor are raised to it, and the others stay."""

    class Clipped(SoftAbs):
        def _repair(self, matrix):
            repaired, change = super()._repair(matrix)
            return repaired + torch.relu(self.floor - matrix), change

    return Clipped(floor)


def test_planted_kink_is_seen(monkeypatch):
    monkeypatch.setitem(REPAIRS, "SoftAbs", clipped)
    with pytest.raises(AssertionError):
        test_smooth_along_paths("SoftAbs", "single")


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


ANY = {**REPAIRS, "NoRepair": lambda floor: NoRepair()}


@pytest.mark.parametrize("of_a_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ANY)
@given(spectrum=spectra(), floor=floors, seed=seeds)
def test_what_is_repaired_is_symmetric_to_the_bit(kind, dtype, of_a_head, spectrum, floor, seed):
    """Or distributions of torch refuse it, which in float32 see asymmetries of 1e-6."""
    size = len(spectrum.eigenvalues)
    matrix = spectrum.matrix.to(dtype)
    scale = standard_normal(size, seed=seed).exp().to(dtype)
    strategy = ANY[kind](floor).prepare(size, like=matrix)
    try:
        if of_a_head:
            root = orthogonal(size, seed).to(dtype) * scale
            repaired, _ = repair_head(strategy, matrix, root @ root.mT)
        else:
            repaired, _ = strategy(matrix, scale)
    except NotPositiveDefiniteError:
        assert kind == "NoRepair"
        return
    assert repaired.dtype == dtype
    assert torch.equal(repaired, repaired.mT)


def test_a_product_of_factors_would_not_be_symmetric():
    """Planted: the eigenvectors are put together again, and no more."""
    matrix = torch.stack([standard_normal(4, 4, seed=seed).float() for seed in range(20)])
    matrix = matrix + matrix.mT
    values, vectors = torch.linalg.eigh(matrix)
    plain = (vectors * softabs(values, 0.1).unsqueeze(-2)) @ vectors.mT
    assert not torch.equal(plain, plain.mT)
    repaired = softabs_matrix(matrix, values, vectors, 0.1)
    assert torch.equal(repaired, repaired.mT)
    assert relative_error(repaired, plain) < 1e-6
