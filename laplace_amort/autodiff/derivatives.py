"""Derivatives of a log joint with checks: whatever is missing or not finite is named by its argument."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from laplace_amort.autodiff.graph import ancestors_of, edges_above
from laplace_amort.errors import InformationError
from laplace_amort.types import Density

__all__ = [
    "ARGUMENTS",
    "argument_names",
    "check_finite",
    "check_values",
    "differentiate",
    "gradients",
    "independent_copies",
    "log_joint_at",
    "recorded_at",
    "refuse_without_autograd",
    "reverse_passes",
]


ARGUMENTS = ("argument 'global_'", "argument 'local' (a row for each unit)")

# Every function that the decorator returns shares the code of its wrapper.
_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__

_CURE = (
    "Replace that operation by one that torch can differentiate three times "
    "(not rsample of Gamma, Beta or Dirichlet, torch.cdist, or torch.igamma in its first argument)."
)


def independent_copies(values: Sequence[Tensor]) -> list[Tensor]:
    """Copies that are independent of each other, and leave the caller's graph alone, yet lead back to the values."""
    return [value.clone() if value.requires_grad else value.clone().requires_grad_() for value in values]


def log_joint_at(log_joint: Density, copies: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Evaluate a log joint, and refuse a result that cannot be differentiated twice."""
    result = recorded_at(log_joint, copies)
    _refuse_once_differentiable(result, copies, names)
    return result


def recorded_at(log_joint: Density, copies: Sequence[Tensor]) -> Tensor:
    """Evaluate a log joint that is made of torch's own operations, which can all be differentiated twice, or fail."""
    result = log_joint(*copies)
    _check_scalar(result)
    return result


def gradients(result: Tensor, values: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """The gradient of a scalar in each argument, with a graph; an argument that does not matter is refused by name."""
    found = differentiate(result, values, names, "first")
    for name, value, gradient in zip(names, values, found, strict=True):
        if gradient is None and value.numel():
            raise InformationError(
                f"log_joint does not depend on {name} (shape {tuple(value.shape)}), so its information is zero. Drop "
                "the argument, or use it inside log_joint (a closure over the outer variable is not seen)."
            )
    filled = [torch.zeros_like(v) if g is None else g for v, g in zip(values, found, strict=True)]
    # Look at the value only once the gradients are there: a NaN is easier to place by its argument.
    for name, gradient in zip(names, filled, strict=True):
        check_finite(gradient, f"the gradient of log_joint with respect to {name}")
    check_finite(result, "log_joint")
    return filled


def _refuse_once_differentiable(result: Tensor, values: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse a Function whose backward is marked as differentiable once, on the way from an argument to the result.

    Torch itself does not complain: the error node that it leaves in the graph of the gradient leads on to no argument,
    so a second backward towards the arguments passes it by, and the Hessian would be short of a term.
    """
    edges = ancestors_of(result)
    marked = [edge for edge in edges if _is_marked(getattr(getattr(edge[0], "_forward_cls", None), "backward", None))]
    above = {getattr(node, "variable", node) for node, _ in edges_above(marked)} if marked else set()
    for name, value in zip(names, values, strict=True):
        if (value if value.is_leaf else value.grad_fn) in above:
            raise InformationError(
                f"the second derivative of log_joint with respect to {name} does not exist in torch: an operation in "
                f"log_joint is marked as differentiable once only.\n{_CURE}"
            )


def _is_marked(backward: object) -> bool:
    return getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE


def differentiate(
    output: Tensor, values: Sequence[Tensor], names: Sequence[str], order: str, basis: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """One (batched) reverse pass; on failure, find the argument to blame by trying each alone."""

    def attempt(wanted: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            output,
            wanted,
            grad_outputs=basis,
            is_grads_batched=basis is not None,
            create_graph=True,
            allow_unused=True,
        )

    try:
        return attempt(values)
    except RuntimeError as error:
        for name, value in zip(names, values, strict=True):
            try:
                attempt([value])
            except RuntimeError as blamed:
                raise InformationError(
                    f"the {order} derivative of log_joint with respect to {name} does not exist in torch: {blamed}\n"
                    f"{_CURE}"
                ) from blamed
        raise InformationError(f"the {order} derivative of log_joint failed: {error}") from error


def refuse_without_autograd() -> None:
    """Refuse what cannot hold a Hessian: inference mode and the JIT.

    :raises InformationError: under either.
    """
    if torch.is_inference_mode_enabled():
        raise InformationError(
            "observed information needs autograd, which inference_mode switches off for good. Use no_grad instead:\n"
            "    with torch.no_grad(): ..."
        )
    if torch.jit.is_tracing():
        raise InformationError(
            "torch.jit.trace cannot hold a Hessian, so JitTrace_ELBO cannot run this guide. Use Trace_ELBO() instead"
        )


def check_values(names: Sequence[str], values: Sequence[Tensor]) -> None:
    """Refuse arguments that are not finite floating-point tensors of one kind, and a place without autograd."""
    if not values:
        raise TypeError("observed_information needs at least one value: observed_information(log_joint, theta, y)")
    refuse_without_autograd()
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a real floating-point tensor, got {kind}")
        if value.is_inference():
            raise InformationError(
                f"{name} was made under inference_mode and cannot be differentiated; make it under no_grad instead"
            )
        if value.dtype != values[0].dtype or value.device != values[0].device:
            raise TypeError(
                f"{name} is {value.dtype} on {value.device}, but {names[0]} is {values[0].dtype} on "
                f"{values[0].device}; convert one of them: value.to(other)"
            )
        check_finite(value, name)


def _check_scalar(result: object) -> None:
    if not isinstance(result, Tensor):
        raise InformationError(f"log_joint returned {type(result).__name__}, not a tensor")
    if result.dim() != 0:
        raise InformationError(
            f"log_joint returned a tensor of shape {tuple(result.shape)}, not a scalar. Sum it:\n"
            "    lambda *values: log_joint(*values).sum()"
        )
    if not result.requires_grad:
        raise InformationError(
            "the result of log_joint is not connected to any argument: it depends on none of them, or was detached, "
            "or was computed under no_grad"
        )


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinity, and say where the first is."""
    if torch.isfinite(tensor.detach().sum()):  # one pass; a sum may overflow where no element does
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        index = tuple(int(i) for i in (~finite).nonzero()[0])
        where = f" at index {index}" if index else ""
        raise InformationError(
            f"{what} is {tensor[index].item()}{where} (shape {tuple(tensor.shape)}). Is a value outside its support, "
            "or a square root, norm or cube root taken at zero?"
        )


def argument_names(log_joint: Density, values: Sequence[object]) -> list[str]:
    """Names as the user wrote them in the signature, else positions."""
    try:
        bound = inspect.signature(log_joint).bind(*values)
    except (TypeError, ValueError):  # builtins without a signature; a wrong count is the call's own error
        return [f"argument {i}" for i in range(len(values))]
    names: list[str] = []
    for name, value in bound.arguments.items():
        starred = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"argument {len(names) + i}" for i in range(len(value))] if starred else [f"argument '{name}'"]
    return names


# Passes are made together while they bring back no more elements than this. Beyond, arithmetic takes longer than calls,
# and it is faster where memory is near.
_TOGETHER = 50_000


def reverse_passes(outputs: Sequence[Tensor], seeds: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    r"""Return the products :math:`\sum_o s_o^\top \partial o / \partial v` for each of ``m`` seeds.

    They have a graph where gradients are enabled; the graph of the outputs is kept.

    :param outputs: tensors of any shape; those without a graph add nothing.
    :param seeds: for each output, ``(m, *output.shape)``.
    :param values: globals and units that the graph of the outputs leads to, or units alone.
    :return: for each value, ``(m, *value.shape)``.
    :raises InformationError: naming the value, if an operation has no such derivative.
    """
    num_seeds = len(seeds[0])
    attached = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    products: Sequence[Tensor | None] = [None] * len(values)
    if attached and num_seeds:
        together = num_seeds > 1 and num_seeds * sum(value.numel() for value in values) <= _TOGETHER
        try:
            products = (_batched if together else _one_by_one)(attached, values)
        except RuntimeError:
            for output, seed in attached:
                differentiate(output, values, ARGUMENTS[-len(values) :], "second", seed)  # finds the one to blame
            raise
    return [v.new_zeros(num_seeds, *v.shape) if p is None else p for v, p in zip(values, products, strict=True)]


def _batched(attached: Sequence[tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> Sequence[Tensor | None]:
    outputs, seeds = zip(*attached, strict=True)
    graph = torch.is_grad_enabled()
    return torch.autograd.grad(
        outputs, values, seeds, retain_graph=True, create_graph=graph, allow_unused=True, is_grads_batched=True
    )


def _one_by_one(attached: Sequence[tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> Sequence[Tensor | None]:
    outputs, seeds = zip(*attached, strict=True)
    graph = torch.is_grad_enabled()
    rows = [
        torch.autograd.grad(outputs, values, seed, retain_graph=True, create_graph=graph, allow_unused=True)
        for seed in zip(*seeds, strict=True)
    ]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
