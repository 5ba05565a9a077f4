"""The transform matrix of the dual path: one row per transform, mode, dtype or kind of input.

Every row compares with finite differences or with a pair of clones, whose derivatives are torch's own. The rows are
also run on planted mistakes, and every row has to catch at least one of them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from laplace_amort import DualPathParam, dual_path

Split = Callable[..., tuple[Tensor, Tensor]]  # (value, mean_gain=1., curvature_gain=1.) -> (mean, curvature)
Row = Callable[[Split], object]

GAINS = [(), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    def register(check: Row) -> Row:
        ROWS[name] = check
        return check

    return register


def through_dual_path(value: Tensor, *gains: float) -> tuple[Tensor, Tensor]:
    mean_gain, curvature_gain = gains or (1.0, 1.0)
    return dual_path(value, mean_gain=mean_gain, curvature_gain=curvature_gain)


def clone_pair(value: Tensor, mean_gain: float = 1.0, curvature_gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """The oracle, from torch's own operations: ``g * value + (1 - g) * value.detach()`` has the gain ``g``."""
    if mean_gain == curvature_gain == 1.0:
        return value.clone(), value.clone()
    fixed = value.detach()
    return mean_gain * value + (1 - mean_gain) * fixed, curvature_gain * value + (1 - curvature_gain) * fixed


def objective(mean: Tensor, curvature: Tensor) -> Tensor:
    """A scalar in which the two paths play different parts and every mixed derivative is there."""
    return (mean**3 * curvature.sin()).sum() + mean.sum() ** 2 * curvature.cos().sum()


def everything(split: Split) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The two outputs, and a nonlinear function of them, for checks by finite differences."""

    def function(theta: Tensor) -> tuple[Tensor, ...]:
        mean, curvature = split(theta)
        return mean, curvature, objective(mean, curvature)

    return function


def point(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def agrees(split: Split, transform: Callable[..., Any], *shape: int) -> None:
    """The transform of the objective is that of the clone pair, for all gains."""
    theta = point(*(shape or (3,))).detach()
    for gains in GAINS:
        same(
            transform(lambda t, g=gains: objective(*split(t, *g)))(theta),
            transform(lambda t, g=gains: objective(*clone_pair(t, *g)))(theta),
        )


def gradient_agrees(split: Split, theta: Tensor, leaf: Tensor | None = None, **close: Any) -> None:
    """Values, dtype, shape, device and the gradient with respect to ``leaf`` are those of the clone pair."""
    for gains in GAINS:
        outputs, expected = split(theta, *gains), clone_pair(theta, *gains)
        for output in outputs:  # bit by bit: no gain touches a value
            torch.testing.assert_close(output, theta, rtol=0, atol=0, check_stride=False)
            assert output.requires_grad
        gradients = []
        for mean, curvature in (outputs, expected):
            total = objective(mean, curvature)
            gradients += torch.autograd.grad(total.abs(), theta if leaf is None else leaf, retain_graph=True)
        torch.testing.assert_close(*gradients, **(close or {"rtol": 1e-12, "atol": 1e-12}))


row("gradcheck")(lambda split: gradcheck(everything(split), point(2, 2)))
row("gradcheck, forward-mode")(
    lambda split: gradcheck(everything(split), point(2, 2), check_forward_ad=True, check_backward_ad=False)
)
row("gradcheck, batched")(lambda split: gradcheck(everything(split), point(2, 2), check_batched_grad=True))
row("gradcheck, batched forward-mode")(
    lambda split: gradcheck(
        everything(split),
        point(2, 2),
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
    )
)
row("gradgradcheck, reverse over reverse")(
    lambda split: gradgradcheck(everything(split), point(2, 2), check_batched_grad=True)
)
row("gradgradcheck, forward over reverse")(
    lambda split: gradgradcheck(
        everything(split), point(2, 2), check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )
)
row("grad")(lambda split: agrees(split, grad))
row("hessian")(lambda split: agrees(split, hessian))
row("jacfwd of jacfwd")(lambda split: agrees(split, lambda f: jacfwd(jacfwd(f))))
row("jacrev of jacrev")(lambda split: agrees(split, lambda f: jacrev(jacrev(f))))
row("jacfwd of jacrev")(lambda split: agrees(split, lambda f: jacfwd(jacrev(f))))
row("jacrev of jacfwd")(lambda split: agrees(split, lambda f: jacrev(jacfwd(f))))
row("jacrev of hessian")(lambda split: agrees(split, lambda f: jacrev(hessian(f))))
row("vmap of grad")(lambda split: agrees(split, lambda f: vmap(grad(f), in_dims=1, out_dims=2), 2, 3, 2))
row("vmap of hessian")(lambda split: agrees(split, lambda f: vmap(hessian(f)), 4, 3))


@row("vmap")
def _(split: Split) -> None:
    theta = point(4, 3)
    for in_dim in (0, 1):
        same(vmap(split, in_dims=in_dim, out_dims=in_dim)(theta), (theta, theta))
    same(vmap(vmap(split))(theta), (theta, theta))
    # A batch that only enters through the function, with the parameter shared.
    scale = point(5, seed=1)
    shared = [vmap(lambda s, f=f: objective(*f(s * theta)))(scale).sum() for f in (split, clone_pair)]
    same(*[torch.autograd.grad(total, theta) for total in shared])


@row("batched reverse passes to third order")
def _(split: Split) -> None:
    """The use the dual path is made for: a Hessian in the curvature copy alone, and then its gradient."""

    def log_det(theta: Tensor, f: Split, gains: tuple[float, ...] = ()) -> Tensor:
        mean, curvature = f(theta, *gains)
        log_joint = objective(mean.exp(), curvature) + (curvature**4).sum() / 4
        (first,) = torch.autograd.grad(log_joint, curvature, create_graph=True)
        basis = torch.eye(theta.numel())
        (second,) = torch.autograd.grad(first, curvature, basis, create_graph=True, is_grads_batched=True)
        return torch.linalg.det(second)

    theta = point(3)
    gradcheck(lambda t: log_det(t, split), theta)
    for gains in GAINS:
        same(*[torch.autograd.grad(log_det(theta, f, gains), theta) for f in (split, clone_pair)])


def compiled(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Compile without graph breaks. The default backend would hand the same graph on to a C++ compiler."""

    def traced(theta: Tensor) -> tuple[Any, bool]:
        return function(theta), torch.compiler.is_compiling()

    torch.compiler.reset()
    run = torch.compile(traced, fullgraph=True, backend="aot_eager")

    def call(theta: Tensor) -> Any:
        with warnings.catch_warnings():
            # torch's own tracing of any custom Function; nothing a user could do about it.
            warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
            result, was_compiled = run(theta)
        assert was_compiled
        return result

    return call


@row("compile, forward")
def _(split: Split) -> None:
    theta = point(3).detach()
    same(compiled(split)(theta), (theta, theta))
    same(compiled(lambda t: objective(*split(t)))(theta), objective(theta, theta))


@row("compile, backward")
def _(split: Split) -> None:
    theta = point(3)
    for gains in GAINS:
        total = compiled(lambda t, g=gains: objective(*split(t, *g)))(theta)
        same(torch.autograd.grad(total, theta), torch.autograd.grad(objective(*clone_pair(theta, *gains)), theta))


def check_in_place(split: Split, output_nr: int) -> None:
    theta = point(3)
    before = theta.detach().clone()
    outputs = split(theta)
    outputs[output_nr].mul_(3.0).add_(1.0)
    same(theta.detach(), before)
    same(outputs[1 - output_nr].detach(), before)
    expected = list(clone_pair(theta))
    expected[output_nr] = expected[output_nr] * 3.0 + 1.0
    same(outputs[output_nr], expected[output_nr])
    same(*[torch.autograd.grad(objective(*pair), theta) for pair in (outputs, expected)])


row("in-place on the mean output")(lambda split: check_in_place(split, 0))
row("in-place on the curvature output")(lambda split: check_in_place(split, 1))


def check_one_output(split: Split, output_nr: int) -> None:
    theta = point(3)
    gradcheck(lambda t: split(t)[output_nr].sin(), theta)
    for gains in GAINS:
        totals = [f(theta, *gains)[output_nr].sin().sum() for f in (split, clone_pair)]
        actual, expected = [torch.autograd.grad(total, theta, materialize_grads=True) for total in totals]
        same(actual, expected)


row("only the mean output used")(lambda split: check_one_output(split, 0))
row("only the curvature output used")(lambda split: check_one_output(split, 1))


def check_without_graph(split: Split, mode: Callable[[], Any]) -> None:
    theta = point(3)
    before = theta.detach().clone()
    with mode():
        outputs = split(theta)
        for number, output in enumerate(outputs):
            assert not output.requires_grad
            assert output.is_inference() == clone_pair(theta)[number].is_inference()
            same(output, before)
            output.zero_()  # it is nobody's view
        same(theta.detach(), before)


@row("no_grad")
def _(split: Split) -> None:
    check_without_graph(split, torch.no_grad)
    with torch.no_grad(), torch.enable_grad():
        gradient_agrees(split, point(3))


@row("inference_mode")
def _(split: Split) -> None:
    check_without_graph(split, torch.inference_mode)
    with torch.inference_mode():
        made_there = torch.ones(3)
    same(tuple(output.clone() for output in split(made_there)), (torch.ones(3), torch.ones(3)))


@row("meta device")
def _(split: Split) -> None:
    theta = torch.empty(2, 3, device="meta", requires_grad=True)
    gradients = []
    for mean, curvature in (split(theta), clone_pair(theta)):
        assert mean.device == curvature.device == theta.device
        assert mean.shape == curvature.shape == theta.shape
        gradients += torch.autograd.grad(objective(mean, curvature), theta)
    assert gradients[0].shape == gradients[1].shape == theta.shape
    assert gradients[0].device == theta.device


row("float32")(lambda split: gradient_agrees(split, point(3, dtype=torch.float32), rtol=1e-5, atol=1e-6))
row("float64")(lambda split: gradient_agrees(split, point(3, dtype=torch.float64)))


@row("complex128")
def _(split: Split) -> None:
    theta = point(3, dtype=torch.complex128)
    gradient_agrees(split, theta)
    gradcheck(everything(split), theta, check_forward_ad=True, check_batched_grad=True)
    gradgradcheck(everything(split), theta)


@row("0-d tensor")
def _(split: Split) -> None:
    gradient_agrees(split, point())
    gradcheck(everything(split), point())


row("empty tensor")(lambda split: gradient_agrees(split, point(0, 3)))
row("nn.Parameter")(lambda split: gradient_agrees(split, torch.nn.Parameter(point(3).detach())))


@row("non-leaf")
def _(split: Split) -> None:
    leaf = point(3)
    gradient_agrees(split, leaf.exp(), leaf)


@row("broadcast")
def _(split: Split) -> None:
    leaf = point(3, 1)
    gradient_agrees(split, leaf.expand(3, 4), leaf)
    mean, curvature = split(leaf.expand(3, 4))
    mean[0, 0] = 7.0  # the elements have memory of their own
    same((mean[0, 1:], curvature), (leaf[0].expand(3), leaf.expand(3, 4)))


@row("not contiguous")
def _(split: Split) -> None:
    leaf = point(4, 3)
    gradient_agrees(split, leaf.T[::2], leaf)


@row("integer")
def _(split: Split) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        with pytest.raises(TypeError, match=rf"value has dtype {dtype}, which carries no gradient(.|\n)*\.to\("):
            split(torch.ones(3, dtype=dtype))


SUBJECTS: dict[str, Split] = {"apply": DualPathParam.apply, "dual_path": through_dual_path}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_matrix(subject: str, name: str) -> None:
    ROWS[name](SUBJECTS[subject])


class Twin(Function):
    """A second implementation without mistakes, from which the planted ones are made."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, mean_gain: float, curvature_gain: float) -> tuple[Tensor, Tensor]:
        if not (value.is_floating_point() or value.is_complex()):
            raise TypeError(f"value has dtype {value.dtype}, which carries no gradient: value.to(float)")
        return value.clone(), value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.gains = inputs[1:]

    @staticmethod
    def backward(ctx: Any, mean: Tensor, curvature: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gains[0] * mean + ctx.gains[1] * curvature, None, None


class ForwardModeTwin(Twin):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *gains: None) -> tuple[Tensor, Tensor]:
        return ctx.gains[0] * tangent, ctx.gains[1] * tangent


def drops_mean(ctx: Any, mean: Tensor, curvature: Tensor) -> tuple[Tensor | None, ...]:
    return ctx.gains[1] * curvature, None, None


def doubles_curvature(ctx: Any, mean: Tensor, curvature: Tensor) -> tuple[Tensor | None, ...]:
    return ctx.gains[0] * mean + 2 * ctx.gains[1] * curvature, None, None


def cuts_second_order(ctx: Any, mean: Tensor, curvature: Tensor) -> tuple[Tensor | None, ...]:
    return (ctx.gains[0] * mean + ctx.gains[1] * curvature).detach(), None, None


def disagreeing_jvp(ctx: Any, tangent: Tensor, *gains: None) -> tuple[Tensor, Tensor]:
    return ctx.gains[0] * tangent, 2 * ctx.gains[1] * tangent


def views(value: Tensor, *gains: float) -> tuple[Tensor, Tensor]:
    return value.view_as(value), value.view_as(value)


def flat_zeros(value: Tensor, *gains: float) -> tuple[Tensor, Tensor]:
    return torch.zeros(value.numel()), torch.zeros(value.numel())


def single_precision(value: Tensor, *gains: float) -> tuple[Tensor, Tensor]:
    return value.float().to(value.dtype), value.float().to(value.dtype)


def twin(base: type[Twin], **mistakes: Callable[..., Any]) -> Split:
    node = type("Planted", (base,), {name: staticmethod(method) for name, method in mistakes.items()})
    return lambda value, *gains: node.apply(value, *(gains or (1.0, 1.0)))


REVERSE = ["gradcheck", "gradcheck, batched", "gradgradcheck, reverse over reverse", "grad", "jacrev of jacrev"]
REVERSE += ["vmap", "vmap of grad", "compile, backward", "batched reverse passes to third order"]
REVERSE += ["float32", "float64", "0-d tensor", "nn.Parameter", "non-leaf", "broadcast", "not contiguous"]
REVERSE += ["in-place on the mean output", "in-place on the curvature output"]
FORWARD = ["gradcheck, forward-mode", "gradcheck, batched forward-mode", "jacfwd of jacfwd"]
FORWARD += ["gradgradcheck, forward over reverse"]
MIXED = ["hessian", "jacfwd of jacrev", "jacrev of jacfwd", "jacrev of hessian", "vmap of hessian", "complex128"]
ALIASES = [*REVERSE[-2:], "no_grad", "inference_mode", "broadcast", "gradcheck, batched forward-mode"]

# What is planted, in which twin, and rows that must catch it.
PLANTS: dict[str, tuple[type[Twin], dict[str, Callable[..., Any]], list[str]]] = {
    "drops a path": (Twin, {"backward": drops_mean}, [*REVERSE, "only the mean output used"]),
    "drops a path, with jvp": (ForwardModeTwin, {"backward": drops_mean}, MIXED),
    "doubles a path": (Twin, {"backward": doubles_curvature}, [*REVERSE, "only the curvature output used"]),
    "doubles a path, with jvp": (ForwardModeTwin, {"backward": doubles_curvature}, MIXED),
    "cuts the second order": (Twin, {"backward": cuts_second_order}, ["gradgradcheck, reverse over reverse"]),
    "jvp disagrees": (ForwardModeTwin, {"jvp": disagreeing_jvp}, FORWARD + MIXED),
    "returns views": (ForwardModeTwin, {"forward": views}, ALIASES),
    "fresh flat outputs": (Twin, {"forward": flat_zeros}, ["meta device", "empty tensor", "vmap", "compile, forward"]),
    "rounds to float32": (Twin, {"forward": single_precision}, ["float64", "compile, forward"]),
    "takes integers": (Twin, {"forward": clone_pair}, ["integer"]),
}


@pytest.mark.parametrize(("plant", "name"), [(plant, name) for plant in PLANTS for name in PLANTS[plant][2]])
def test_planted_mistake_fails(plant: str, name: str) -> None:
    base, mistakes, _ = PLANTS[plant]
    ROWS[name](twin(base))  # so it is the mistake that fails, and not the twin
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        ROWS[name](twin(base, **mistakes))


@pytest.mark.parametrize("name", ["no_grad", "inference_mode"])
def test_planted_graph_fails(name: str) -> None:
    """A pair that records a graph where there should be none."""

    def always_records(value: Tensor, *gains: float) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            return clone_pair(value, *gains)

    ROWS[name](clone_pair)
    with pytest.raises(AssertionError):
        ROWS[name](always_records)


def test_every_row_can_fail() -> None:
    assert {name for _, _, names in PLANTS.values() for name in names} == set(ROWS)
