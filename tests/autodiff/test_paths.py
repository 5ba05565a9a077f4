"""The dual path outside the transform matrix: structures, gains, messages, and what the graph shows of a misuse."""

import math
import re
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from laplace_amort import (
    DualPath,
    DualPathParam,
    PathError,
    PathLeakError,
    PathMissingWarning,
    check_paths,
    dual_path,
    errors,
)

Pair = namedtuple("Pair", ["first", "second"])


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


A = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
B = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("value", "leaves"),
    [
        (A, lambda v: [v]),
        ({"a": A, "b": B}, lambda v: [v["a"], v["b"]]),
        (OrderedDict(b=B, a=A), lambda v: [v["a"], v["b"]]),
        (defaultdict(list, {"a": A, 0: B}), lambda v: [v["a"], v[0]]),
        ([A, B], list),
        ((A, B), list),
        (Pair(A, B), lambda v: [v.first, v.second]),
        ({"a": [A, (B, Pair(A, {"b": B}))]}, lambda v: [v["a"][0], v["a"][1][0], v["a"][1][1][1]["b"]]),
        ({"same": A, "twice": A}, lambda v: [v["same"], v["twice"]]),
        ({}, lambda v: []),
        ([], list),
        ((), list),
    ],
    ids=[
        *("tensor", "dict", "OrderedDict", "defaultdict", "list", "tuple", "namedtuple", "nested", "shared"),
        *("empty dict", "empty list", "empty tuple"),
    ],
)
def test_structures(value: Any, leaves: Callable[[Any], list[Tensor]]) -> None:
    dual = dual_path(value)
    assert isinstance(dual, DualPath)
    originals = leaves(value)
    for copies in dual:
        assert type(copies) is type(value)
        if isinstance(value, dict):
            assert list(copies) == list(value)
        torch.testing.assert_close(leaves(copies), originals, rtol=0, atol=0)
        assert not {id(copy) for copy in leaves(copies)} & {id(original) for original in originals}
    if originals:
        total = sum((2 * m.sin() + 3 * c.cos()).sum() for m, c in zip(*map(leaves, dual), strict=True))
        expected = sum((2 * original.sin() + 3 * original.cos()).sum() for original in originals)
        torch.testing.assert_close(torch.autograd.grad(total, originals), torch.autograd.grad(expected, originals))


def test_default_factory_is_kept() -> None:
    assert dual_path(defaultdict(list, a=A)).mean["new"] == []


@pytest.mark.parametrize("mean_gain", [0, 0.0, 0.5, 1, -1.0, Fraction(1, 4), True])
@pytest.mark.parametrize("curvature_gain", [0.0, 1.0, 2.5])
def test_gains_scale_gradients_and_not_values(mean_gain: float, curvature_gain: float) -> None:
    theta = leaf(3)
    dual = dual_path([theta], mean_gain=mean_gain, curvature_gain=curvature_gain)
    torch.testing.assert_close([dual.mean[0], dual.curvature[0]], [theta, theta], rtol=0, atol=0)
    total = (5 * dual.mean[0]).sum() + (7 * dual.curvature[0]).sum()
    (actual,) = torch.autograd.grad(total, theta, materialize_grads=True)
    torch.testing.assert_close(actual, torch.full((3,), float(5 * mean_gain + 7 * curvature_gain)))


def test_frozen_path_shuts_out_infinities() -> None:
    theta = torch.zeros(2, requires_grad=True)
    dual = dual_path(theta, mean_gain=0.0)
    (dual.mean.sqrt() + dual.curvature).sum().backward()  # the derivative of the square root is infinite
    torch.testing.assert_close(theta.grad, torch.ones(2))


@pytest.mark.parametrize("name", ["mean_gain", "curvature_gain"])
@pytest.mark.parametrize("gain", [math.nan, math.inf, -math.inf, "1", None, 1j, torch.tensor(1.0)])
def test_bad_gains(name: str, gain: Any) -> None:
    message = f"{name} must be a finite real number, got {gain!r}; 1.0 leaves the gradient exact"
    with pytest.raises(ValueError, match=re.escape(message)):
        dual_path(leaf(2), **{name: gain})


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (1.5, "value is a float"),
        (None, "value is a NoneType"),
        ({"tau": "x"}, "value['tau'] is a str"),
        ({"a": [A, (B, 2)]}, "value['a'][1][1] is a int"),
        (Pair(A, {0: {1, 2}}), "value[1][0] is a set"),
    ],
)
def test_leaf_that_is_no_tensor(value: Any, where: str) -> None:
    message = f"{where}, not a tensor; dual_path takes a tensor or a dict, list or tuple of tensors:\n"
    with pytest.raises(TypeError, match=re.escape(message + "    dual_path(torch.as_tensor(...))")):
        dual_path(value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize(
    ("wrap", "where"),
    [(lambda v: v, "value"), (lambda v: {"n": [v]}, "value['n'][0]"), (lambda v: (A, v), "value[1]")],
)
def test_leaf_without_gradient(wrap: Callable[[Tensor], Any], where: str, dtype: torch.dtype) -> None:
    message = (
        f"{where} has dtype {dtype}, which carries no gradient; dual_path needs a floating-point or complex tensor:\n"
        f"    dual_path({where}.to(torch.get_default_dtype()))"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        dual_path(wrap(torch.ones(2, dtype=dtype)))


@pytest.mark.parametrize("value", [2.0, [A], torch.ones(2, dtype=torch.int64)])
def test_param_refuses_what_has_no_gradient(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^value (is a (float|list), not a tensor|has dtype torch.int64)"):
        DualPathParam.apply(value)


def test_gradient_of_a_partial_hessian() -> None:
    """log p(theta, y) = -theta**2 y**3 with y = exp(theta): the Hessian is partial, its gradient total."""
    theta = torch.tensor(0.7, requires_grad=True)
    dual = dual_path(theta)
    y = dual.mean.exp()
    log_joint = -(dual.curvature**2) * y**3
    check_paths(dual, y, log_joint)
    first = torch.autograd.grad(log_joint, (dual.curvature, y), create_graph=True)
    hessian = torch.stack(
        [
            torch.cat([g.reshape(1) for g in torch.autograd.grad(f, (dual.curvature, y), create_graph=True)])
            for f in first
        ]
    )
    t = theta.item()
    e2, e3, e1 = math.exp(2 * t), math.exp(3 * t), math.exp(t)
    mixed = -6 * t * e2
    torch.testing.assert_close(hessian, torch.tensor([[-2 * e3, mixed], [mixed, -6 * t**2 * e1]]))
    expected = [[-6 * e3, -6 * e2 - 12 * t * e2], [-6 * e2 - 12 * t * e2, -12 * t * e1 - 6 * t**2 * e1]]
    for i in range(2):
        for j in range(2):
            (actual,) = torch.autograd.grad(hessian[i, j], theta, retain_graph=True)
            assert actual.item() == pytest.approx(expected[i][j], rel=1e-12)


def deep(value: Tensor) -> Tensor:
    for _ in range(20_000):
        value = value + 1
    return value


def in_place(value: Tensor) -> Tensor:
    out = torch.zeros(3)
    out[1:] = value
    out.mul_(2).exp_()
    return out


ROUTES: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda t: t,
    "function": lambda t: t.exp() + 1,
    "slice": lambda t: t[1:],
    "in-place into another": in_place,
    "in-place on itself": lambda t: t.mul_(2),
    "in-place on a slice of itself": lambda t: t[:1].add_(1),
    "dict": lambda t: {"y": t.exp()},
    "nested": lambda t: [torch.ones(2), (torch.zeros(1), {"y": Pair(t.cos(), torch.ones(1))})],
    "deep graph": deep,
    "custom node": lambda t: DualPathParam.apply(t)[1],
    "another dual path": lambda t: dual_path({"t": t}).curvature,
    "where": lambda t: torch.where(torch.tensor([True, False]), t, torch.zeros(2)),
    "index_put": lambda t: torch.zeros(4).index_put((torch.tensor([0, 3]),), t),
}


@pytest.mark.parametrize("route", ROUTES)
class TestCheckPaths:
    """Each way from a copy to the mode, from the right copy and from the wrong one."""

    @pytest.mark.parametrize("make_theta", [lambda: leaf(2), lambda: leaf(2).exp()], ids=["leaf", "non-leaf"])
    def test_mean_path_is_fine(self, route: str, make_theta: Callable[[], Tensor]) -> None:
        dual = dual_path(make_theta())
        check_paths(dual, ROUTES[route](dual.mean))

    def test_leak(self, route: str) -> None:
        dual = dual_path(leaf(2))
        mode = ROUTES[route](dual.curvature)
        with pytest.raises(PathLeakError, match="descends from the curvature output of dual_path, so the\nHessian"):
            check_paths(dual, mode)

    def test_leak_beside_the_right_path(self, route: str) -> None:
        dual = dual_path(leaf(2))
        modes = [dual.mean.exp(), ROUTES[route](dual.curvature)]
        with pytest.raises(PathLeakError, match=re.escape("mode[1]")):
            check_paths(dual, modes)

    def test_missing(self, route: str) -> None:
        dual = dual_path(leaf(2))
        mode = ROUTES[route](dual.mean.detach())
        with pytest.warns(PathMissingWarning, match="does not reach the mean output") as caught:
            check_paths(dual, mode)
        assert caught[0].filename == __file__
        assert "the term through the mode. Was it detached, or computed under no_grad? Compute it as\n    y_hat" in str(
            caught[0].message
        )

    def test_third_route(self, route: str) -> None:
        theta = leaf(2)
        dual = dual_path(theta)
        mode = dual.mean.exp()
        third = ROUTES[route](theta * 1)  # `* 1`: in-place is not allowed on a leaf
        parts = [third] if isinstance(third, Tensor) else flatten(third)
        right = -(dual.curvature**2).sum() * mode.sum()
        check_paths(dual, mode, right)
        with pytest.raises(PathLeakError, match="log_prob depends on the raw parameter past both outputs of dual_path"):
            check_paths(dual, mode, right + sum(part.sum() for part in parts))


def flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in (value.values() if isinstance(value, dict) else value) for t in flatten(item)]


def test_leak_message_names_the_leaf_and_the_line() -> None:
    dual = dual_path({"theta": leaf(2)})
    message = (
        "mode['y'][0] (shape (1,)) descends from the curvature output of dual_path, so the\nHessian would count the "
        "dependence of the mode on the parameter. Compute it from the mean output instead:\n    y_hat = mode(dual.mean)"
    )
    with pytest.raises(PathLeakError, match=f"^{re.escape(message)}$"):
        check_paths(dual, {"x": dual.mean["theta"], "y": (dual.curvature["theta"][:1],)})


@pytest.mark.parametrize("make_theta", [lambda: leaf(2), lambda: leaf(2).exp()], ids=["leaf", "non-leaf"])
def test_third_route_message(make_theta: Callable[[], Tensor]) -> None:
    theta = make_theta()
    dual = dual_path(theta)
    message = (
        "log_prob depends on the raw parameter past both outputs of dual_path, so the Hessian would miss that\n"
        "dependence. Pass the parameter in as an argument, and call it with the curvature output:\n"
        "    log_joint(dual.curvature, y_hat)"
    )
    with pytest.raises(PathLeakError, match=re.escape(message)):
        check_paths(dual, dual.mean, (theta * dual.curvature).sum())


def test_third_route_through_the_leaf_behind_the_parameter() -> None:
    """A constrained parameter that is read twice: two nodes, one leaf."""
    unconstrained = leaf(2)
    dual = dual_path(unconstrained.exp())
    check_paths(dual, dual.mean, (dual.curvature * dual.mean).sum())
    with pytest.raises(PathLeakError, match="past both outputs"):
        check_paths(dual, dual.mean, (dual.curvature * unconstrained.exp()).sum())


def test_log_prob_without_the_parameter_is_no_third_route() -> None:
    dual = dual_path(leaf(2))
    for log_prob in (torch.zeros(()), leaf(), dual.mean.sum(), dual.curvature.sum()):
        check_paths(dual, dual.mean, log_prob)


def test_mode_that_reaches_the_mean_in_part() -> None:
    """A unit without data, or one that does not depend on a global, is no mistake."""
    dual = dual_path({"a": leaf(2), "b": leaf(3)})
    check_paths(dual, [torch.zeros(3), dual.mean["a"].sum()])


def test_two_dual_paths_in_one_guide() -> None:
    first, second = dual_path(leaf(2)), dual_path(leaf(2))
    check_paths(first, first.mean + second.mean)
    check_paths(second, first.mean + second.mean)
    for dual, other in ((first, second), (second, first)):
        mixed = dual.mean * other.curvature
        check_paths(dual, mixed)
        with pytest.raises(PathLeakError, match="curvature output"):
            check_paths(other, mixed)
        with pytest.warns(PathMissingWarning, match="does not reach the mean output"):
            check_paths(dual, other.mean)
        check_paths(dual, dual.mean, (dual.curvature * other.curvature * dual.mean * other.mean).sum())


def test_two_dual_paths_on_one_packed_parameter() -> None:
    packed = leaf(4)
    first, second = dual_path(packed[:2]), dual_path(packed[2:])
    mode = first.mean + second.mean
    log_prob = (first.curvature * second.curvature * mode).sum()
    check_paths(first, mode, log_prob)
    check_paths(second, mode, log_prob)
    with pytest.raises(PathLeakError, match="curvature output"):
        check_paths(second, first.mean + second.curvature)


def test_dual_path_of_a_dual_path() -> None:
    outer = dual_path(leaf(2))
    inner = dual_path(outer.mean)
    check_paths(inner, inner.mean)
    check_paths(outer, inner.mean)
    check_paths(outer, inner.curvature)  # it descends from the outer mean
    with pytest.raises(PathLeakError, match="curvature output"):
        check_paths(inner, inner.curvature)
    with pytest.warns(PathMissingWarning):
        check_paths(inner, outer.mean)


def test_leak_through_an_in_place_mix() -> None:
    dual = dual_path(leaf(2))
    dual.mean.add_(dual.curvature)
    with pytest.raises(PathLeakError, match="curvature output"):
        check_paths(dual, dual.mean.exp())


@pytest.mark.parametrize("changed", [0, 1])
def test_copy_changed_in_place_after_the_mode(changed: int) -> None:
    """The copy then hangs on a later node, and the mode still on the dual one."""
    dual = dual_path(leaf(2))
    modes = dual.mean * 2, dual.curvature * 2
    dual[changed].add_(1)
    check_paths(dual, modes[0])
    with pytest.raises(PathLeakError, match="curvature output"):
        check_paths(dual, modes[1])


def test_copy_changed_in_place_by_another_dual_path() -> None:
    first, second = dual_path(leaf(2)), dual_path(leaf(2))
    mode = first.mean + second.mean
    first.curvature.mul_(second.mean)
    check_paths(first, mode)
    with pytest.raises(PathLeakError, match="curvature output"):
        check_paths(first, mode + first.curvature)


def test_graph_with_very_many_routes() -> None:
    """Sixty doublings, 2**60 routes: each node is visited once."""
    dual = dual_path(leaf(2))
    mode = dual.mean
    for _ in range(60):
        mode = mode + mode
    check_paths(dual, mode)


def test_a_pair_made_by_hand() -> None:
    theta = leaf(2)
    dual = DualPath(theta.clone(), theta.clone())
    check_paths(dual, dual.mean.exp(), (dual.curvature * dual.mean).sum())
    with pytest.raises(PathLeakError, match="curvature output"):
        check_paths(dual, dual.curvature.exp())
    with pytest.raises(PathLeakError, match="raw parameter"):
        check_paths(dual, dual.mean.exp(), theta.sum())


def without_graph() -> DualPath:
    with torch.no_grad():
        return dual_path(leaf(2))


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (without_graph, "dual.mean"),
        (lambda: dual_path(torch.zeros(2)), "dual.mean"),
        (lambda: dual_path({"a": [leaf(1), torch.zeros(2)]}), "dual.mean['a'][1]"),
        (lambda: DualPath(leaf(2).exp(), torch.zeros(2)), "dual.curvature"),
    ],
    ids=["no_grad", "requires no gradient", "one leaf of many", "by hand"],
)
def test_no_graph(make: Callable[[], DualPath], where: str) -> None:
    message = (
        f"there is no graph to follow: {where} has no grad_fn. Call dual_path on a tensor that requires a gradient"
    )
    dual = make()
    with pytest.raises(PathError, match=re.escape(message)):
        check_paths(dual, dual.mean)


@pytest.mark.parametrize(
    ("mode", "where"), [(1.0, "mode is a float"), ({"y": [A, None]}, "mode['y'][1] is a NoneType")]
)
def test_mode_that_is_no_tensor(mode: Any, where: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{where}; check_paths needs tensors")):
        check_paths(dual_path(leaf(2)), mode)


@pytest.mark.parametrize(("dual", "kind"), [((A, A), "tuple"), (A, "Tensor"), (None, "NoneType")])
def test_not_a_dual_path(dual: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"needs the DualPath that dual_path() returned, got {kind}")):
        check_paths(dual, A)


def test_nothing_is_checked_without_gradients() -> None:
    """As in SVI.evaluate_loss; there is no graph then, and no Hessian that could be wrong."""
    dual = dual_path(leaf(2))
    with torch.no_grad():
        check_paths(dual, dual.curvature.exp())
        check_paths(without_graph(), torch.zeros(2))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_leak_inside_a_reverse_mode_transform(transform: Callable[..., Any]) -> None:
    def guide(theta: Tensor, output_nr: int) -> Tensor:
        dual = dual_path(theta)
        mode = dual[output_nr].exp()
        check_paths(dual, mode)
        return mode.sum()

    transform(guide)(torch.zeros(2), 0)
    with pytest.raises(PathLeakError, match="curvature output"):
        transform(guide)(torch.zeros(2), 1)


def test_forward_as_dynamo_calls_it() -> None:
    """Where nothing requires a gradient and gains are left out, it passes a context in front."""
    mean, curvature = DualPathParam.forward(object(), A)
    torch.testing.assert_close([mean, curvature], [A, A], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.PathError, RuntimeError),
        (errors.PathLeakError, errors.PathError),
        (errors.InformationError, RuntimeError),
        (errors.NotPositiveDefiniteError, ArithmeticError),
        (errors.ModelError, RuntimeError),
        (errors.GuideCheckError, AssertionError),
    ],
)
def test_every_error_is_of_two_families(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, errors.LaplaceAmortError)
    assert issubclass(error, builtin)
    assert str(error("the message")) == "the message"


def test_guide_check_error_carries_its_report() -> None:
    assert errors.GuideCheckError("failed", report="rows").report == "rows"
    assert errors.GuideCheckError("failed").report is None


def test_a_frozen_parameter_has_a_gradient_of_zero() -> None:
    """As under torch.func: it is connected, and nothing comes back."""
    theta = leaf(3)
    (actual,) = torch.autograd.grad(dual_path(theta, mean_gain=0.0).mean.sum(), theta)
    torch.testing.assert_close(actual, torch.zeros(3), rtol=0, atol=0)
