"""Fixed standard normal draws in pairs: moments, seeds, dtypes, refusals."""

import pytest
import torch

from laplace_amort.fitting.objectives.draws import Draws, antithetic_draws

GLOBAL, LOCAL = torch.zeros(2, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)


def moments(draws, order):
    """The mean over the two of each pair, ``(S / 2, D)``."""
    rows = torch.cat([draws.global_, draws.local.flatten(1)], -1)
    rows = torch.stack([rows] * order).prod(0)
    half = len(rows) // 2
    return rows[:half] / 2 + rows[half:] / 2


@pytest.mark.parametrize("num_draws", [2, 6, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_odd_moments_are_exactly_zero(num_draws, dtype):
    draws = antithetic_draws(num_draws, GLOBAL.to(dtype), LOCAL.to(dtype), seed=3)
    assert draws.global_.shape == (num_draws, 2)
    assert draws.local.shape == (num_draws, 5, 3)
    for order in (1, 3, 5):
        assert torch.equal(moments(draws, order), torch.zeros(num_draws // 2, 17, dtype=dtype))
    assert (moments(draws, 2) > 0).all()


def test_products_of_odd_order_are_zero_too():
    """A pair turns the sign of everything at once."""
    draws = antithetic_draws(8, GLOBAL, LOCAL, seed=3)
    product = draws.global_[:, 0] * draws.local[:, 1, 2] * draws.local[:, 4, 0]
    assert torch.equal(product[:4], -product[4:])
    pair = draws.global_[:, 0] * draws.local[:, 1, 2]
    assert torch.equal(pair[:4], pair[4:])


def test_they_are_standard_normal():
    """Even moments 1, 3 and 15, and no correlation: 4.8 standard errors are 2e-6 by chance each, 2e-5 for all 13."""
    draws = antithetic_draws(100_000, GLOBAL[:1], LOCAL[:1, :2], seed=0)
    rows = torch.cat([draws.global_, draws.local.flatten(1)], -1)[:50_000]
    for order, expected in [(2, 1.0), (4, 3.0), (6, 15.0)]:
        powers = rows**order
        error = powers.std(0) / len(rows) ** 0.5
        assert ((powers.mean(0) - expected).abs() < 4.8 * error).all()
    correlation = (rows.mT @ rows / len(rows))[torch.triu(torch.ones(3, 3), diagonal=1) == 1]
    assert (correlation.abs() < 4.8 / len(rows) ** 0.5).all()
    assert abs(float(draws.half_squares().mean()) - 1.5) < 4.8 * (1.5 / len(rows)) ** 0.5


def test_half_squares():
    draws = Draws(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[[3.0], [1.0]], [[0.5], [0.0]]]))
    assert draws.half_squares().tolist() == [(1 + 4 + 9 + 1) / 2, 0.125]
    assert antithetic_draws(4, torch.zeros(0), torch.zeros(0, 1), seed=0).half_squares().tolist() == [0.0] * 4


def test_the_same_seed_gives_the_same_numbers_and_another_one_others():
    first, same, other = (antithetic_draws(6, GLOBAL, LOCAL, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(first, same, other, strict=True):
        assert torch.equal(a, b)
        assert not (a == c).any()
    assert len(first.local.abs().unique()) == 3 * LOCAL.numel()  # nothing but the pairs is repeated


def test_globals_and_units_have_numbers_of_their_own():
    """Also where they are equally many, and a generator that starts anew would give the same."""
    draws = antithetic_draws(8, torch.zeros(15, dtype=torch.float64), LOCAL, seed=1)
    assert not torch.isin(draws.global_, draws.local).any()


def test_only_shape_and_dtype_of_what_is_given_matter():
    expected = antithetic_draws(4, GLOBAL, LOCAL, seed=1)
    actual = antithetic_draws(4, (GLOBAL + 7.0).requires_grad_(), LOCAL * torch.nan, seed=1)
    assert all(map(torch.equal, actual, expected))
    assert not actual.global_.requires_grad


def test_the_generator_of_torch_stays_as_it_is():
    state = torch.get_rng_state()
    first = antithetic_draws(6, GLOBAL, LOCAL, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert all(map(torch.equal, antithetic_draws(6, GLOBAL, LOCAL, seed=1), first))


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_float32_draws_are_those_of_float64_rounded(default):
    torch.set_default_dtype(default)
    exact, rounded = (antithetic_draws(4, GLOBAL.to(d), LOCAL.to(d), seed=1) for d in (torch.float64, torch.float32))
    for a, b in zip(exact, rounded, strict=True):
        assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
        assert torch.equal(a.float(), b)
        assert not torch.equal(a, b.double())


@pytest.mark.parametrize("number", [-2, 0, 1, 3, 65])
def test_odd_numbers_are_refused(number):
    with pytest.raises(ValueError, match=rf"pairs of opposite sign, so their number must be even, got {number}$"):
        antithetic_draws(number, GLOBAL, LOCAL, seed=0)
