"""Each rule of the algebra: it gives the same function, it is applied where it holds, and nowhere else."""

import pytest
import torch
from helpers.models import normals
from helpers.oracles import Figures, relative_error
from helpers.recordings import derivatives, operations
from helpers.strategies import seeds, standard_normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

from laplace_amort.autodiff import simplify
from laplace_amort.autodiff.recording import record
from laplace_amort.errors import RecordingError

figures = Figures()

M, N = 3, 4
SHAPES = [(), (1,), (N,), (1, N), (M, 1), (M, N)]


def full(a, b):
    return torch.broadcast_shapes(a.shape, b.shape)


def weighted(x):
    """Not the sum alone, which forgets the order of what it sums."""
    return (x.reshape(-1).sin() * normals(x.numel())).sum()


# Of two arguments that broadcast; each has something that a rule applies to, for most shapes.
RULES = {
    "log of exp": lambda a, b: a.exp().log() * b,
    "log of expanded exp": lambda a, b: a.exp().expand(full(a, b)).log() + b,
    "exp of log of exp": lambda a, b: (a.exp().log() - b).exp().log(),
    "xlogy of exp": lambda a, b: torch.xlogy(b, a.exp()),
    "xlogy of expanded exp": lambda a, b: torch.xlogy(b.sin(), a.exp().expand(full(a, b))),
    "square": lambda a, b: (a - b) ** 2 + a.square(),
    "division": lambda a, b: a / b.exp(),
    "division by expanded": lambda a, b: (a + b) / b.exp().expand(full(a, b)),
    "quotient of quotients": lambda a, b: (a / (2 + b.sin())) / (b / (2 + a.sin())).cosh(),
    "neutral": lambda a, b: ((a * 1 + 0) / 1 - 0) * b + (b * 1.0 + 0.0),
    "expanded": lambda a, b: a.expand(full(a, b)).exp() * b.expand(full(a, b)),
    "expanded twice": lambda a, b: (a.expand(full(a, b)) * 2).expand(2, *full(a, b)).sin() * b,
    "Bernoulli density": lambda a, b: torch.distributions.Bernoulli(logits=a, validate_args=False).log_prob(
        b.sigmoid()
    ),
    "normal density": lambda a, b: torch.distributions.Normal(a, b.exp(), validate_args=False).log_prob(a.sin()),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("total", [torch.sum, weighted])
@settings(max_examples=settings.default.max_examples // 2)
@given(shapes=st.tuples(st.sampled_from(SHAPES), st.sampled_from(SHAPES)), seed=seeds)
def test_a_rule_gives_the_same_function(rule, total, shapes, seed):
    a, b = (standard_normal(*shape, seed=seed + i) for i, shape in enumerate(shapes))

    def function(a, b):
        return total(RULES[rule](a, b))

    recorded = record(function, a, b)
    point = a + 0.1, b - 0.1
    actual, expected = (derivatives(f, point, order=2) for f in (recorded, function))
    assert figures.add(rule, relative_error(actual, expected)) < 1e-12


A, B = standard_normal(seed=3), standard_normal(N, seed=4)
LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
SMALL_WEIGHTS = standard_normal(N, seed=5)

# A function of a scalar and of N numbers, and all operations that are left of it.
APPLIED = {
    "xlogy of exp": (lambda a, b: torch.xlogy(b, a.exp()).sum(), "mul sum"),
    "xlogy of expanded exp": (lambda a, b: torch.xlogy(b, a.exp().expand(N)).sum(), "mul sum"),
    "xlogy with data": (lambda a, b: torch.xlogy(SMALL_WEIGHTS, b.exp()).sum() * a, "mul sum mul"),
    "square": (lambda a, b: (b**2).sum() + a.square(), "mul sum mul add"),
    "square of a number": (lambda a, b: (b**2.0).sum() * a, "mul sum mul"),
    "division": (lambda a, b: (b / a).sum(), "reciprocal mul sum"),
    "division by expanded": (lambda a, b: (b / a.expand(N)).sum(), "reciprocal mul sum"),
    "neutral": (lambda a, b: ((b * 1 + 0 - 0.0) / 1.0).sum() * a, "sum mul"),
    "expanded": (lambda a, b: (a.expand(N).exp().expand(M, N) + b).sum(), "exp add expand sum"),
    "Bernoulli": (
        lambda a, b: binary_cross_entropy_with_logits(b, LABELS, reduction="none").sum() * a,
        "softplus mul sub sum mul",
    ),
    "xlogy after another use": (
        lambda a, b: (lambda x: torch.xlogy(x.cumsum(0), x).sum() * b.sum())(a.exp().expand(N)),
        "exp expand cumsum mul sum sum mul",
    ),
}


@pytest.mark.parametrize("name", APPLIED)
def test_a_rule_is_applied(name):
    function, expected = APPLIED[name]
    assert operations(record(function, A, B)) == expected.split()


def whole(b):
    return (b > 0).long()


# What looks like a rule and is none: nothing is left out.
KEPT = {
    "Bernoulli with weights": (
        lambda a, b: a * binary_cross_entropy_with_logits(b, LABELS, SMALL_WEIGHTS, reduction="sum"),
        "binary_cross_entropy_with_logits mul expand",
    ),
    "cube": (lambda a, b: (b**3).sum() * a, "pow sum mul"),
    "inverse square": (lambda a, b: (b**-2).sum() * a, "pow sum mul"),
    "square root": (lambda a, b: (b.cosh() ** 0.5).sum() * a, "cosh pow sum mul"),
    "floor": (lambda a, b: (torch.div(b, a, rounding_mode="floor") * b).sum(), "div mul sum"),
    "trunc": (lambda a, b: (torch.div(b, a, rounding_mode="trunc") * b).sum(), "div mul sum"),
    "few by many": (lambda a, b: (a / b).sum(), "div sum"),
    "many by many": (lambda a, b: (b / (b * a)).sum(), "mul div sum"),
    "log of exp": (lambda a, b: (a.exp().log() * b).sum(), "exp log mul sum"),
    "log of expanded exp": (lambda a, b: (a.exp().expand(N).log() * b).sum(), "exp log mul sum"),
    "log of a sum of exp": (lambda a, b: (b.exp() + a.exp()).log().sum(), "exp exp add log sum"),
    "log of a product": (lambda a, b: (b.exp() * 2).log().sum() * a, "exp mul log sum mul"),
    "log1p of exp": (lambda a, b: b.exp().log1p().sum() * a, "exp log1p sum mul"),
    "log of expm1": (lambda a, b: b.cosh().expm1().log().sum() * a, "cosh expm1 log sum mul"),
    "log2 of exp": (lambda a, b: b.exp().log2().sum() * a, "exp log2 sum mul"),
    "exp of log": (lambda a, b: b.cosh().log().exp().sum() * a, "cosh log exp sum mul"),
    "xlogy of no exp": (lambda a, b: torch.xlogy(b, b.cosh()).sum() * a, "cosh xlogy sum mul"),
    "xlogy of exp of whole numbers": (lambda a, b: torch.xlogy(a, whole(b).exp()).sum(), "gt _to_copy exp xlogy sum"),
    "xlogy of exp and no exp": (lambda a, b: torch.xlogy(b.exp(), b.cosh()).sum() * a, "exp cosh xlogy sum mul"),
    "plus one": (lambda a, b: (b + 1).sin().sum() * a, "add sin sum mul"),
    "minus one": (lambda a, b: (b - 1).sin().sum() * a, "sub sin sum mul"),
    "times zero": (lambda a, b: (b * 0).cos().sum() * a, "mul cos sum mul"),
    "from zero": (lambda a, b: (0 - b).exp().sum() * a, "rsub exp sum mul"),
    "one over": (lambda a, b: (1 / b).sum() * a, "reciprocal sum mul"),
    "data that are one": (lambda a, b: (b * torch.ones(N)).sum() * a, "mul sum mul"),
    "log of exp of whole numbers": (lambda a, b: (whole(b).exp().log() * a).sum(), "gt _to_copy exp log mul sum"),
    "log of exp of complex numbers": (
        lambda a, b: torch.complex(b, 4 * b).exp().log().imag.sum() * a,
        "mul complex exp log view_as_real select sum mul",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_rule_is_not_applied_where_it_does_not_hold(name):
    function, expected = KEPT[name]
    recorded = record(function, A, B)
    assert operations(recorded) == expected.split()
    actual, expected = (derivatives(f, (A - 0.2, B + 0.1), order=2) for f in (recorded, function))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_density_of_a_bernoulli_variable_far_out(dtype):
    """Against logarithms of logistic functions, which lose no digits in either tail."""
    logits = torch.tensor([-700.0, -60.0, -41.0, -39.0, -20.0, 0.0, 20.0, 39.0, 41.0, 60.0, 700.0], dtype=dtype)
    labels = (torch.arange(len(logits)) % 2).to(dtype)

    def density(a, b):
        return a.sum() * 0 - binary_cross_entropy_with_logits(b, labels, reduction="none").sum()

    def right(a, b):
        return a.sum() * 0 + torch.nn.functional.logsigmoid(torch.where(labels > 0, b, -b)).sum()

    recorded = record(density, torch.zeros(1, dtype=dtype), logits)
    assert "softplus" in operations(recorded)
    point = torch.zeros(1, dtype=dtype), logits
    for actual, expected in zip(derivatives(recorded, point, 2), derivatives(right, point, 2), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=64 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------------- size of operations

CONSTANT_SIZE = {
    "exp": lambda a, n: a.exp().expand(n).log1p().exp().sum(),
    "before": lambda a, n: (a.expand(n).exp() * 2 + 1).sum(),
    "two": lambda a, n: (a.expand(n) * a.sin().expand(n)).tanh().sum(),
    "quotient": lambda a, n: (a.expand(n) / a.exp().expand(n)).sum(),
    "power": lambda a, n: (a.exp().expand(2, n) ** 2.5).sum(),
    "after a sum": lambda a, n: (lambda x: x.sum() + x.sin().sum())(a.exp().expand(n)),
}


@pytest.mark.parametrize("name", CONSTANT_SIZE)
def test_an_expanded_scalar_stays_one_number(name):
    """What the operations take does not grow with the number of units, and the result is right."""
    recorded = [record(lambda a, y, n=n: CONSTANT_SIZE[name](a, n) + y, A, B.sum()) for n in (10, 1000)]
    assert recorded[0].num_bytes == recorded[1].num_bytes
    point = A + 0.1, B.sum()
    expected = derivatives(lambda a, y: CONSTANT_SIZE[name](a, 1000) + y, point, order=2)
    torch.testing.assert_close(derivatives(recorded[1], point, order=2), expected, rtol=1e-12, atol=0)


def test_one_scale_for_all_units_costs_nothing_of_their_size():
    """Of a normal density, logarithm and reciprocal of a scale are those of one number."""

    def log_joint(a, b):
        return torch.distributions.Normal(b, a.exp().expand(len(b)), validate_args=False).log_prob(0.3).sum()

    few, many = (record(log_joint, A, standard_normal(n, seed=0)) for n in (100, 200))
    assert many.num_bytes - few.num_bytes == 800 * 6


# ----------------------------------------------------------------------------------------------------------- dtypes

MIXED = {
    "0-dim float64 with float32": lambda a, b: a * b.float(),
    "expanded float64 with float32": lambda a, b: a.expand(N) * b.float(),
    "0-dim float32 with float64": lambda a, b: a.float() + b,
    "float32 by expanded float64": lambda a, b: b.float() / a.exp().expand(N),
    "float32 by 0-dim float64": lambda a, b: b.float() / a.exp(),
    "log of expanded exp of another dtype": lambda a, b: a.exp().expand(N).log() * b.float(),
    "xlogy": lambda a, b: torch.xlogy(b.float(), a.exp().expand(N)),
    "neutral after promotion": lambda a, b: (a.expand(N) * b.float() * 1 + 0) ** 2,
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes(name):
    """A number of torch's does not raise the dtype of a vector, but a vector does."""

    def function(a, b):
        return MIXED[name](a, b).sum()

    expected, recorded = function(A, B), record(function, A, B)
    assert recorded(A, B).dtype == expected.dtype
    tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        derivatives(recorded, (A, B), 1), derivatives(function, (A, B), 1), rtol=tolerance, atol=tolerance
    )


def test_a_rule_for_mixed_dtypes_would_be_found(monkeypatch):
    """Planted: an expanded number is used as it is with a vector of another dtype."""
    monkeypatch.setattr(simplify._Simplifier, "_is_uniform", lambda self, old: True)
    with pytest.raises(RecordingError, match="differs"):
        record(lambda a, b: MIXED["expanded float64 with float32"](a, b).sum(), A, B)


# ------------------------------------------------------------------------------------------- views of what is smaller

# Of a column (M, 1) and a matrix (M, N): what torch has laid out in full is expanded, or a part of something else,
# after the algebra.
VIEWS = {
    "reshape of expanded": lambda a, b: a.expand(M, N).exp().reshape(-1),
    "view of expanded": lambda a, b: a.expand(M, N).exp().view(N, M) * b.view(N, M),
    "view after another use": lambda a, b: (lambda x: x.cumsum(1).view(-1) + x.view(-1))(a.expand(M, N).exp()),
    "another use after view": lambda a, b: (lambda x: x.view(-1) + x.cumsum(1).view(-1))(a.expand(M, N).exp()),
    "view of a slice": lambda a, b: (b[:, 1:3] * 1.0).view(-1) * 2,
    "view of log of exp of a slice": lambda a, b: b[:, ::2].exp().log().view(-1),
    "view of a diagonal": lambda a, b: (b[:, :M].diagonal() + 0).view(1, M),
    "view of a square of a slice": lambda a, b: (b[:, 1:] ** 2).view(-1),
    "flattened transpose": lambda a, b: (b.mT * a.mT).contiguous().view(-1),
    "transpose of expanded": lambda a, b: a.expand(M, N).exp().mT.reshape(-1),
    "rows": lambda a, b: torch.stack([row.view(2, -1).sin() for row in (a.expand(M, N) * 2).unbind(0)]),
    "parts": lambda a, b: torch.cat([part.reshape(-1).sin() for part in a.expand(M, N).exp().split(2, -1)]),
    "selection": lambda a, b: a.expand(M, N).exp()[1, 2:].view(2, 1) * b[0, :2],
    "window": lambda a, b: a.expand(M, N).exp().view(-1).unfold(0, 3, 2),
    "matrix product": lambda a, b: a.expand(M, N).exp().mT @ (b * 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_after_the_algebra(name):
    a, b = standard_normal(M, 1, seed=6), standard_normal(M, N, seed=7)

    def function(a, b):
        return (VIEWS[name](a, b).sin() * b.cosh().log().sum()).sum() + (a**3).sum()

    recorded = record(function, a, b)
    actual, expected = (derivatives(f, (a + 0.1, b - 0.1), order=2) for f in (recorded, function))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    draws = torch.stack([a, a + 0.1]), torch.stack([b, b - 0.1])
    mapped = torch.func.vmap(recorded)(*draws)
    looped = torch.stack([function(*draw) for draw in zip(*draws, strict=True)])
    torch.testing.assert_close(mapped, looped, rtol=1e-12, atol=1e-12)
