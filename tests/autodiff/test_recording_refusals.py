"""What cannot be recorded is refused, values that are not finite are kept, and planted bugs are found."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import normals
from helpers.recordings import ELSEWHERE, POINT, derivatives

from laplace_amort import AutoLaplaceFamily
from laplace_amort.autodiff import recorder, simplify
from laplace_amort.autodiff.recording import record
from laplace_amort.errors import RecordingError

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------------------- not finite


def factored(theta, y):
    matrix = torch.eye(2) * (theta[0] + 1) + torch.ones(2, 2) * y[0, 0]
    return torch.linalg.cholesky(matrix).sum() + y.sum() * theta[1]


def test_a_cholesky_that_fails_is_nan():
    """In the value, in all gradients, and for that draw only."""
    recorded = record(factored, *POINT)
    failing = torch.tensor([-3.0, 0.0]), POINT[1]
    with pytest.raises(torch.linalg.LinAlgError):
        factored(*failing)
    assert recorded(*failing).isnan()
    gradients = torch.func.grad(recorded, argnums=(0, 1))(*failing)
    assert all(gradient.isnan().all() for gradient in gradients)
    draws = [torch.stack(parts) for parts in zip(POINT, failing, ELSEWHERE, strict=True)]
    values = torch.func.vmap(recorded)(*draws)
    assert values.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(values[2], factored(*ELSEWHERE))


def root(theta, y, shift=0.0):
    """Not a number where a unit is below a bound, and infinitely steep there; the units do not meet but in the sum."""
    return (y - POINT[1].min() - shift).sqrt().sum() + theta.sum()


def test_a_unit_that_is_not_finite_is_no_reason_to_refuse():
    """At a point compared, the value is NaN in both, and so is the gradient in one unit; those in others are finite."""
    recorded = record(root, *POINT)
    assert recorded(*ELSEWHERE).isnan()
    torch.testing.assert_close(recorded(*POINT), root(*POINT))


@pytest.mark.parametrize("shift", [0.0, 0.1], ids=["inf", "nan"])
@pytest.mark.parametrize(("error", "found"), [(0.0, False), (1e-3, True)])
def test_errors_are_found_beside_what_is_not_finite(shift, error, found):
    """Planted: one gradient is wrong, where another is not finite in model and recording alike."""
    recorded = record(lambda theta, y: root(theta, y, shift), POINT[0], POINT[1] + 5)

    def wrong(theta, y):
        return root(theta, y, shift) + error * (y[0, 0] - POINT[1][0, 0])

    gradient = torch.func.grad(wrong, argnums=1)(*POINT)
    assert gradient.isfinite().sum() == gradient.numel() - 1
    if found:
        with pytest.raises(RecordingError, match="the gradient in the units of the recorded model differs"):
            recorded.check(wrong, *POINT)
    else:
        recorded.check(wrong, *POINT)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_finite_in_one_of_the_two_alone_is_found(value):
    recorded = record(lambda theta, y: y.sum() + theta.sum(), *POINT)
    with pytest.raises(RecordingError, match="the value of the recorded model differs"):
        recorded.check(lambda theta, y: y.sum() + theta.sum() + value, *POINT)


# ---------------------------------------------------------------------------------------------------------- refusals


def frozen(theta, y):
    with torch.no_grad():
        scale = theta.exp().sum()
    return (y * scale).sum() + theta.sum()


def frozen_units(theta, y):
    with torch.no_grad():
        weight = y.sigmoid()
    return (weight * y).sum() * theta.sum()


def counted(calls=[]):  # noqa: B006
    calls.append(1)
    return len(calls)


def reused(theta, y):
    """The constant is written to between two uses."""
    weight = torch.zeros(3)
    first = (y + weight).sum()
    weight[0] = 3.0
    return first + (y + weight).sum() + theta.sum()


def fails_nearby(theta, y):
    """Positive definite at the first point only."""
    return torch.linalg.cholesky((y[1, 2] + 0.31) * torch.eye(2)).sum() + theta.sum()


VALUE = "the model takes the value of a latent out of torch"
REFUSED = {
    "if": (lambda t, y: y.sum() if t[0] > 0 else t.sum() * y.sum(), VALUE),
    "item": (lambda t, y: y.sum() * t[0].item(), rf"{VALUE} \(aten._local_scalar_dense.default\)"),
    "equal": (lambda t, y: y.sum() if torch.equal(t, t) else t.sum(), rf"{VALUE} \(aten.equal.default\)"),
    "numpy": (lambda t, y: y.sum() * float(t.detach().numpy()[0]), "the value of the recorded model differs"),
    "no_grad": (frozen, "the gradient in the globals of the recorded model differs"),
    "no_grad in units": (frozen_units, "the gradient in the units of the recorded model differs"),
    "state": (lambda t, y: y.sum() * counted() + t.sum(), "the value of the recorded model differs"),
    "random": (lambda t, y: (torch.rand_like(y) * y).sum() + t.sum(), "the value of the recorded model differs"),
    "constant in place": (reused, "the value of the recorded model differs"),
    "shape": (lambda t, y: y[y > 0].sin().sum() + t.sum(), "fails near the point(.|\n)*dynamic shape"),
    "factorization": (fails_nearby, "fails near the point(.|\n)*positive-definite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    log_joint, message = REFUSED[name]
    with pytest.raises(RecordingError, match=message):
        record(log_joint, *POINT)


@pytest.mark.parametrize("how", ["if", "where"])
def test_a_pyro_model_that_branches(how):
    def model(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = (1.0 if mu > -0.1 else 2.0) if how == "if" else torch.where(mu > -0.1, 1.0, 2.0)
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, scale))
            pyro.sample("z", dist.Normal(y, 0.5), obs=z)

    unit_model = AutoLaplaceFamily(model).unit_model(normals(4))
    if how == "if":
        with pytest.raises(RecordingError, match=VALUE):
            unit_model.recorded(torch.zeros(1), torch.zeros(4, 1))
        return
    recorded = unit_model.recorded(torch.zeros(1), torch.zeros(4, 1))
    for mu in (-1.0, 1.0):
        at = torch.tensor([mu]), torch.ones(4, 1)
        torch.testing.assert_close(recorded.log_joint(*at), unit_model.log_joint(*at), rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["detach", "data"])
def test_detached_tensors_stay_detached(how):
    def log_joint(theta, y):
        return ((theta.detach() if how == "detach" else theta.data).exp().sum() * y).sum() + theta.sum()

    recorded = record(log_joint, *POINT)
    torch.testing.assert_close(derivatives(recorded, ELSEWHERE), derivatives(log_joint, ELSEWHERE))


# -------------------------------------------------------------------------------------------------------- planted bugs


def rich(theta, y):
    """Every rule of the algebra applies to it, and there is something to merge."""
    scale = theta[0].exp()
    residual = (y - theta[1] + 1.0) / scale
    first = torch.xlogy(y.sin(), scale.expand(2, 3)).sum() - (residual**2).reshape(-1).sum()
    return first + y.cos().sin().sum() + scale.expand(2, 3).sum()


def without_reciprocal(self, old):
    target, args = REWRITTEN(self, old)
    if old.target is aten.div.Tensor and target is aten.mul.Tensor:
        args[1] = self.values[old.args[1]]
    return target, args


def merge_by_name(graph):
    """Whatever the first argument is."""
    first = {}
    for node in list(graph.nodes):
        same = first.setdefault(str((node.target, node.args[1:])), node)
        if node.op == "call_function" and same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


REWRITTEN = simplify._Simplifier._rewritten
BUGS = {
    "no reciprocal": (simplify._Simplifier, "_rewritten", without_reciprocal),
    "one is neutral in sums": (simplify, "_NEUTRAL", {aten.add.Tensor: 1}),
    "log of an exponential is the exponential": (simplify, "_exponent", lambda value: value),
    "sines are nothing": (simplify, "_SAME", simplify._SAME | {aten.sin.default}),
    "not expanded again": (simplify._Simplifier, "_expanded", lambda self, node: self.values[node].node),
    "more than equal operations are merged": (recorder, "_merge_equal", merge_by_name),
    "a gradient is lost": (recorder, "_INSTEAD", {aten.sin.default: lambda x: x.detach().sin()}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, monkeypatch):
    recorded = record(rich, *POINT)
    torch.testing.assert_close(derivatives(recorded, ELSEWHERE), derivatives(rich, ELSEWHERE), rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises(RecordingError, match="of the recorded model differs"):
        record(rich, *POINT)
