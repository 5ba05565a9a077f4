"""A recorded log joint against the model itself: values, derivatives, parameters, draws mapped over, and refusals."""

import operator

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import counts, normals
from helpers.oracles import Figures, relative_error
from helpers.recordings import ELSEWHERE, POINT, derivatives, operations
from helpers.unit_models import UNIT_MODELS, poisson_by_visit
from torch import fx

from laplace_amort import AutoLaplaceFamily, RecordingError
from laplace_amort.autodiff.recording import record

figures = Figures()


def unit_model_of(name):
    case = UNIT_MODELS[name]()
    return AutoLaplaceFamily(case.model, unit_plate=case.unit_plate).unit_model(*case.args, **case.kwargs), case


def point_of(case, seed, size=0.3):
    return size * normals(case.global_dim, seed=seed), size * normals(case.num_units, case.local_dim, seed=seed + 1)


# --------------------------------------------------------------------------------------------------------- Pyro models


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_derivatives_are_those_of_the_model(name):
    unit_model, case = unit_model_of(name)
    recorded = record(unit_model.log_joint, *point_of(case, seed=1))
    leaves = list(unit_model.density.parameters().values())
    point = point_of(case, seed=3, size=0.6)
    actual = derivatives(recorded, point, leaves=leaves)
    expected = derivatives(unit_model.log_joint, point, leaves=leaves)
    assert expected[1].abs() > 1e-6
    for order, pair in enumerate(zip(actual[:5], expected[:5], strict=True)):
        assert figures.add(f"derivatives of order {order}", relative_error(*pair)) < 1e-9
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_draws_are_mapped_over(name):
    """Values and gradients, as a fit on fixed draws takes them."""
    unit_model, case = unit_model_of(name)
    recorded = unit_model.recorded(*point_of(case, seed=1)).recording
    points = [point_of(case, seed=seed) for seed in (3, 5, 7)]
    draws = [torch.stack(parts) for parts in zip(*points, strict=True)]
    looped = torch.stack([unit_model.log_joint(*point) for point in points])
    torch.testing.assert_close(torch.func.vmap(recorded)(*draws), looped, rtol=1e-10, atol=1e-10)
    expected = [torch.func.grad(unit_model.live().log_joint, argnums=(0, 1))(*point) for point in points]
    actual = torch.func.vmap(torch.func.grad(recorded, argnums=(0, 1)))(*draws)
    for mapped, parts in zip(actual, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(mapped, torch.stack(parts), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["normal", "student_t", "beta_means", "categorical_probs", "correlated", "with_params"]
)
def test_float32(name):
    torch.set_default_dtype(torch.float32)
    unit_model, case = unit_model_of(name)
    recorded = record(unit_model.log_joint, *point_of(case, seed=1))
    actual, expected = (derivatives(f, point_of(case, seed=3), order=2) for f in (recorded, unit_model.log_joint))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_single_precision_beside_data_in_double_precision():
    torch.set_default_dtype(torch.float32)
    data = torch.linspace(-3.0, 3.0, 500, dtype=torch.float64)
    point = torch.ones(1), torch.zeros(500, 1)

    def log_joint(global_, local, factor=1.0):
        return -factor * ((data - torch.sin(local[:, 0] + global_)) ** 2).sum()

    recorded = record(log_joint, *point)
    assert recorded(*point).dtype == torch.float64
    recorded.check(lambda *at: log_joint(*at, factor=1 + 1e-6), *point)  # as single precision rounds
    with pytest.raises(RecordingError, match="the value of the recorded model differs"):
        recorded.check(lambda *at: log_joint(*at, factor=1 + 1e-3), *point)


@pytest.mark.parametrize("name", ["with_params", "module"])
def test_parameters_count_with_their_values_at_the_time(name):
    unit_model, case = unit_model_of(name)
    point, leaves = point_of(case, seed=3), list(unit_model.density.parameters().values())
    recorded = record(unit_model.log_joint, *point)
    before = derivatives(recorded, point, 1, leaves)
    assert (before[2:].abs() > 1e-4).all()
    with torch.no_grad():
        for leaf in leaves:
            leaf += 0.3
    after = derivatives(recorded, point, 1, leaves)
    torch.testing.assert_close(after, derivatives(unit_model.log_joint, point, 1, leaves), rtol=1e-10, atol=1e-10)
    assert (after - before).abs().max() > 0.01


def test_what_depends_on_data_alone_is_computed_once():
    """The factorials of counts are constants; the gamma functions of a latent are not."""
    unit_model, case = unit_model_of("poisson_by_visit")
    of_data = record(unit_model.log_joint, *point_of(case, seed=1))
    assert "lgamma" not in operations(of_data)
    pyro.clear_param_store()
    unit_model, case = unit_model_of("negative_binomial")
    assert "lgamma" in operations(record(unit_model.log_joint, *point_of(case, seed=1)))


def test_python_of_the_model_is_not_run_again():
    calls = []

    def log_joint(theta, y):
        calls.append(1)
        return (y.exp() * theta.sum()).sum()

    recorded = record(log_joint, *POINT)
    made = len(calls)
    values = [recorded(*POINT) for _ in range(3)]
    assert len(calls) == made
    assert values == [log_joint(*POINT)] * 3


# ---------------------------------------------------------------------------------------------------- size and merging


class Weighed(fx.Interpreter):
    """Run a recording, and sum the bytes of all results that are not views."""

    num_bytes = 0

    def run_node(self, n):
        result = super().run_node(n)
        if n.op == "call_function" and n.target is not operator.getitem:
            views = [r.alias_info for r in getattr(getattr(n.target, "_schema", None), "returns", [])]
            if not any(views):
                parts = result if isinstance(result, tuple) else (result,)
                self.num_bytes += sum(part.numel() * part.itemsize for part in parts)
        return result


@pytest.mark.parametrize("name", ["normal", "binomial_slopes", "beta_means", "correlated"])
def test_memory_is_what_a_run_takes(name):
    unit_model, case = unit_model_of(name)
    recorded = record(unit_model.log_joint, *point_of(case, seed=1))
    run = Weighed(recorded.operations.module())
    torch.testing.assert_close(run.run(*point_of(case, seed=3)), recorded(*point_of(case, seed=3)), rtol=0, atol=0)
    assert 0.9 * run.num_bytes <= recorded.num_bytes <= 1.3 * run.num_bytes


def test_length_and_bytes_of_a_known_function():
    """A selection, which is a view; exponential and product of six elements; a sum."""
    recorded = record(lambda theta, y: (y.exp() * theta[0]).sum(), *POINT)
    assert (len(recorded), recorded.num_bytes) == (4, 8 * (6 + 6 + 1))
    assert len(record(lambda theta, y: torch.tensor(3.0), *POINT)) == 0


def test_memory_grows_with_the_units_and_length_does_not():
    sizes = []
    for n in (20, 40, 80):
        guide = AutoLaplaceFamily(poisson_by_visit)
        unit_model = guide.unit_model(counts(n), torch.arange(n), n)
        recorded = record(unit_model.log_joint, torch.zeros(2), torch.zeros(n, 1))
        sizes.append((recorded.num_bytes, len(recorded)))
    assert sizes[2][0] - sizes[1][0] == 2 * (sizes[1][0] - sizes[0][0]) > 0
    assert sizes[0][1] == sizes[1][1] == sizes[2][1]


def test_what_is_computed_twice_is_kept_once():
    """In the memory as well: exponential, sine, two products, a difference and a sum of six elements each."""

    def log_joint(theta, y):
        return (y.exp() * y.exp().sin() - 2 * y.exp().sin()).sum() + theta.sum()

    recorded = record(log_joint, *POINT)
    assert sorted(operations(recorded)) == ["add", "exp", "mul", "mul", "sin", "sub", "sum", "sum"]
    assert recorded.num_bytes == 8 * (5 * 6 + 3)


def test_what_the_algebra_makes_twice_is_kept_once():
    recorded = record(lambda theta, y: (y / theta[0] + (y.sin() / theta[0]).cos()).sum(), *POINT)
    assert operations(recorded).count("reciprocal") == 1


# ------------------------------------------------------------------------------------------------- writing in place


def filled(theta, y):
    cov = torch.zeros(2, 2)
    cov[0, 0], cov[1, 1], cov[1, 0] = theta[0].exp(), y.exp().sum(), theta[1]
    cov[0, 1] = cov[1, 0]
    return torch.linalg.cholesky(cov).diagonal().log().sum() + (cov @ y).sin().sum()


def masked(theta, y):
    out = y * theta[0]
    out[POINT[1] > 0.15] = theta[1]
    return out.sin().sum()


def chained(theta, y):
    out = y.clone().mul_(theta[0]).sin_().add_(1.0)
    out[:, 1:] *= y[:, :2]
    return (out.add_(y) ** 3).sum()


def copied(theta, y):
    out = torch.ones(2, 3)
    out[1] = y[0].exp()
    other = torch.zeros(2, 3)
    other.copy_(out * theta.unsqueeze(-1))
    return (out * other.sin()).sum()


def accumulated(theta, y):
    total = torch.zeros(())
    for row in y:
        total += (row.sin() * theta[0].exp()).sum()
    return total * theta[1]


def half_cauchy(theta, y):
    """Torch fills in minus infinity below zero, in place."""
    density = dist.HalfCauchy(theta[0].exp(), validate_args=False)
    return density.log_prob(y.exp()).sum() + dist.HalfCauchy(1.0, validate_args=False).log_prob(theta.exp()).sum()


IN_PLACE = [filled, masked, chained, copied, accumulated, half_cauchy]


@pytest.mark.parametrize("log_joint", IN_PLACE)
def test_writing_in_place(log_joint):
    recorded = record(log_joint, *POINT)
    assert not any(name.endswith("_") for name in operations(recorded))
    actual, expected = (derivatives(f, ELSEWHERE) for f in (recorded, log_joint))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    draws = [torch.stack(parts) for parts in zip(POINT, ELSEWHERE, strict=True)]
    expected = torch.stack([log_joint(*POINT), log_joint(*ELSEWHERE)])
    torch.testing.assert_close(torch.func.vmap(recorded)(*draws), expected, rtol=1e-10, atol=1e-10)


def test_writing_a_parameter_in_place():
    parameter = torch.tensor(2.0, requires_grad=True)

    def log_joint(theta, y):
        out = torch.zeros(3)
        out[0], out[1] = parameter * theta[0], parameter
        return (out.exp() * y).sum()

    recorded = record(log_joint, *POINT)
    parameter.data.fill_(0.5)
    actual, expected = (derivatives(f, ELSEWHERE, leaves=[parameter]) for f in (recorded, log_joint))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
