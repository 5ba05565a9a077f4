"""Whitening: a linear map and its transpose, against the dense inverse of the precision."""

import dataclasses

import numpy
import pytest
import torch
from helpers.arrowheads import ArrowheadCase, arrowhead_cases
from helpers.oracles import Figures
from helpers.strategies import Spectrum, spectra
from hypothesis import given
from hypothesis import strategies as st

from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.linalg.whitening import Whitening

figures = Figures()

CASES = [
    ArrowheadCase(global_dim, num_units, local_dim, log_condition=1.0, seed=seed)
    for seed, (global_dim, num_units, local_dim) in enumerate([(2, 3, 2), (3, 1, 4), (0, 2, 1), (2, 0, 1), (1, 4, 1)])
]


def coordinates_of(case, with_units, rest=3, dtype=torch.float64):
    size = case.global_dim + rest + (case.num_units * case.local_dim if with_units else 0)
    return Whitening(case.arrowhead(dtype), with_units, size)


def dense(whitening, method="step"):
    """The map as a matrix, a column for each unit vector."""
    columns = [getattr(whitening, method)(unit) for unit in numpy.eye(whitening.size)]
    return numpy.stack(columns, axis=-1) if columns else numpy.zeros((0, 0))


def close(actual, expected, name, tolerance=1e-10):
    assert actual.shape == expected.shape
    error = numpy.abs(actual - expected).max(initial=0.0) / max(numpy.abs(expected).max(initial=0.0), 1e-300)
    assert figures.add(name, float(error)) < tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_units", [True, False])
@pytest.mark.parametrize("rest", [0, 3])
def test_steps_of_standard_normal_numbers_have_the_covariance_of_the_posterior(case, with_units, rest):
    """Exactly, through the matrix of the map: L L' is the inverse of the precision, and the identity for the rest."""
    whitening = coordinates_of(case, with_units, rest)
    covariance = torch.linalg.inv(case.arrowhead().to_dense()).numpy()
    known = len(covariance) if with_units else case.global_dim
    expected = numpy.eye(whitening.size)
    expected[:known, :known] = covariance[:known, :known]
    step = dense(whitening)
    close(step @ step.T, expected, "covariance of steps")
    assert step.dtype == numpy.float64
    # Units follow globals, not the other way round.
    assert not step[: case.global_dim, case.global_dim :].any()


@given(case=arrowhead_cases().filter(lambda case: not case.batch), with_units=st.booleans(), rest=st.integers(0, 2))
def test_pull_is_the_transpose_of_step(case, with_units, rest):
    whitening = coordinates_of(case, with_units, rest)
    step, vjp = dense(whitening), dense(whitening, "vjp")
    close(vjp, step.T, "transpose")
    rng = numpy.random.default_rng(case.seed)
    u, g = rng.standard_normal((2, whitening.size))
    scale = numpy.abs(whitening.step(u)) @ numpy.abs(g)
    assert abs(whitening.step(u) @ g - u @ whitening.vjp(g)) <= 1e-10 * scale
    assert whitening.norm(g) == pytest.approx(numpy.linalg.norm(step.T @ g), rel=1e-10)


def test_a_pull_that_is_not_the_transpose_is_found(monkeypatch):
    """Planted: a step whose units forget the globals is pulled back by the right map."""
    whitening = coordinates_of(CASES[0], True)
    right = dense(whitening, "vjp")
    draw_local = Arrowhead.draw_local
    monkeypatch.setattr(Arrowhead, "draw_local", lambda self, deviation, noise: draw_local(self, 0 * deviation, noise))
    assert numpy.abs(dense(whitening) - right.T).max() > 0.01


@pytest.mark.parametrize("case", [case for case in CASES if case.global_dim], ids=str)
def test_norm_of_a_gradient_and_distance_of_globals(case):
    """A gradient is as long as the Newton step that it leads to: g' P^-1 g and (P^-1 g)' P (P^-1 g) are the same."""
    whitening, d = coordinates_of(case, False, rest=0), case.global_dim
    schur = case.arrowhead().schur_complement.numpy()
    gradient = numpy.random.default_rng(0).standard_normal(d)
    newton = numpy.linalg.solve(schur, gradient)
    assert whitening.norm(gradient) == pytest.approx((gradient @ newton) ** 0.5, rel=1e-10)
    assert whitening.distance(newton) == pytest.approx((newton @ schur @ newton) ** 0.5, rel=1e-10)
    assert whitening.distance(newton) == pytest.approx(whitening.norm(gradient), rel=1e-10)
    assert whitening.distance(0 * newton) == whitening.norm(0 * gradient) == 0.0
    unit = numpy.eye(d)[0]
    assert whitening.distance(whitening.step(unit)) == pytest.approx(1.0, rel=1e-10)


@pytest.mark.parametrize("with_units", [True, False])
def test_parameters_other_than_globals_do_not_count_in_a_distance(with_units):
    whitening = coordinates_of(CASES[0], with_units)
    difference = numpy.random.default_rng(0).standard_normal(whitening.size)
    alone = numpy.concatenate([difference[:2], numpy.zeros(whitening.size - 2)])
    assert whitening.distance(difference) == whitening.distance(alone) == whitening.distance(difference[:2]) > 0
    assert whitening.norm(difference) > whitening.norm(alone)


def test_parameters_without_a_known_scale_keep_their_own():
    whitening = dataclasses.replace(Whitening.of_information(4 * numpy.eye(2)), size=5)
    u = numpy.arange(1.0, 6.0)
    expected = [0.5, 1.0, 3.0, 4.0, 5.0]
    numpy.testing.assert_allclose(whitening.step(u), expected, rtol=1e-14)
    numpy.testing.assert_allclose(whitening.vjp(u), expected, rtol=1e-14)


def test_float32_and_graphs():
    """Numbers of SciPy are float64 whatever the model is made of; what the precision is made of gets no gradient."""
    blocks = [block.requires_grad_() for block in CASES[0].blocks(torch.float32)]
    whitening = Whitening(Arrowhead(*blocks), True, 8)
    exact = coordinates_of(CASES[0], True, rest=0)
    with torch.no_grad():
        u = numpy.random.default_rng(0).standard_normal(8)
        for method in ("step", "vjp"):
            actual = getattr(whitening, method)(u)
            assert actual.dtype == numpy.float64
            numpy.testing.assert_allclose(actual, getattr(exact, method)(u), rtol=1e-4, atol=1e-4)
        assert whitening.distance(u) == pytest.approx(exact.distance(u), rel=1e-4)
    assert all(block.grad is None for block in blocks)


# ------------------------------------------------------------------------------------------------ of an information


@given(spectrum=spectra())
def test_information_of_any_sign_gives_finite_standard_deviations(spectrum):
    """One over the root of the size of each eigenvalue, with a floor at a share of the largest."""
    information = spectrum.matrix.numpy()
    whitening = Whitening.of_information(information)
    step = dense(whitening)
    assert numpy.isfinite(step).all()
    values, vectors = numpy.linalg.eigh(information)
    size = numpy.abs(values)
    size = numpy.maximum(size, max(1e-10 * size.max(), numpy.finfo(float).tiny))
    precision = (vectors * size) @ vectors.T
    # L^-1 of it is what is well conditioned enough to compare: L' P L is the identity.
    error = numpy.abs(step.T @ precision @ step - numpy.eye(len(step))).max()
    assert error < 1e-14 * len(step) * size.max() / size.min()
    assert not whitening.with_units


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((4.0, 9.0), (0.5, 1 / 3)),
        ((-4.0, 9.0), (0.5, 1 / 3)),
        ((-4.0, -0.25), (0.5, 2.0)),
        ((1.0, 0.0), (1.0, 1e5)),
        ((-1e-30, 100.0), (1e4, 0.1)),
    ],
)
def test_standard_deviations_of_known_informations(values, expected):
    whitening = Whitening.of_information(numpy.diag(values))
    numpy.testing.assert_allclose(dense(whitening), numpy.diag(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_an_indefinite_one_is_turned_along_its_axes(seed):
    spectrum = Spectrum((-3.0, 0.5, 2.0), seed)
    step = dense(Whitening.of_information(spectrum.matrix.numpy()))
    expected = Spectrum((1 / 3, 2.0, 0.5), seed).matrix.numpy()
    numpy.testing.assert_allclose(step @ step.T, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("information", [numpy.zeros((2, 2)), numpy.full((2, 2), 1e-300), numpy.zeros((0, 0))])
def test_nothing_known_is_finite(information):
    whitening = Whitening.of_information(information)
    u = numpy.ones(len(information))
    for result in (whitening.step(u), whitening.vjp(u)):
        assert numpy.isfinite(result).all()
        assert result.shape == u.shape
    assert numpy.isfinite([whitening.norm(u), whitening.distance(u)]).all()


def test_memory_layouts_of_numpy():
    """Transposed, strided and reversed arrays are as good as any."""
    matrix = Spectrum((1.0, 4.0, 9.0), seed=3).matrix.numpy()
    expected = dense(Whitening.of_information(matrix))
    backwards = numpy.ascontiguousarray(matrix[::-1, ::-1])[::-1, ::-1]
    numpy.testing.assert_array_equal(dense(Whitening.of_information(backwards)), expected)
    whitening = Whitening.of_information(numpy.asfortranarray(matrix))
    u = numpy.arange(6.0)[::-2]
    numpy.testing.assert_array_equal(whitening.step(u), whitening.step(u.copy()))
