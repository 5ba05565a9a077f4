r"""Two differentiable copies of one parameter: one for the mean, one for the curvature.

The amortized Laplace family has :math:`\hat\theta` as its only parameter. Its precision is the observed information
at :math:`(\hat\theta, \hat y(\hat\theta))` with :math:`\theta` and :math:`y` taken as *independent* arguments, while
the gradient of the ELBO must see that :math:`\hat y` moves with :math:`\hat\theta`. Two copies of the parameter say
exactly that: the *mean* copy flows into :math:`\hat y` and into the mean of the guide, the *curvature* copy flows
into the Hessian only, and their gradients are summed on the way back.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import Function

from laplace_amort.autodiff.graph import Edge

__all__ = ["CURVATURE", "MEAN", "DualPath", "DualPathParam", "dual_path", "is_dual_edge", "map_leaves"]

MEAN, CURVATURE = 0, 1  # output numbers of the autograd node


class DualPathParam(Function):
    r"""Return two copies of a tensor and, in ``backward``, the sum of their gradients.

    With gains :math:`g_m, g_c` (both 1 by default) the node computes

    .. math:: (m, c) = (\theta, \theta), \qquad
              \bar\theta = g_m \bar m + g_c \bar c, \qquad
              (\dot m, \dot c) = (g_m \dot\theta,\; g_c \dot\theta).

    Prefer :func:`dual_path`, which takes structures of tensors and gives the copies their names. The outputs are
    copies, not views, so that in-place operations on one touch neither the parameter nor the other.

    .. note:: With unit gains ``theta.clone(), theta.clone()`` has the very same gradients. What this node adds is a
        contract: named roles that :func:`check_paths` can follow through the graph, gains, input validation, and a
        tested list of transforms.

    Shapes: ``value (*)`` to ``(*), (*)``. Derivatives of every order exist in forward and reverse mode, under
    ``torch.func`` transforms and under ``torch.compile(fullgraph=True)`` (compile a function that calls ``apply``, not
    ``apply`` itself).

    :raises TypeError: if the value is not a floating-point or complex tensor.

    Example::

        >>> import torch
        >>> theta = torch.tensor([1., 2.], requires_grad=True)
        >>> mean, curvature = DualPathParam.apply(theta)
        >>> (3 * mean + 4 * curvature).sum().backward()
        >>> theta.grad
        tensor([7., 7.])
    """

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Apply the node to ``value`` and, optionally, the two gains; returns ``(mean, curvature)``."""
        # Forward mode needs a Function with a `jvp`, and Dynamo refuses one; so there are two, of one graph. Dynamo
        # does not come here: it takes `forward` and `backward` of the class that it finds `apply` on, which has none.
        return super(DualPathParam, _ForwardModeDualPathParam).apply(*args, **kwargs)

    @staticmethod
    def forward(value: Tensor, mean_gain: float = 1.0, curvature_gain: float = 1.0) -> tuple[Tensor, Tensor]:
        """Copy ``value`` twice."""
        if isinstance(mean_gain, Tensor):
            # Dynamo calls forward(ctx, value) where nothing requires a gradient and the gains are left to their
            # defaults: it tells the two styles of Function apart by the number of arguments alone.
            value = mean_gain
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            raise TypeError(_not_differentiable(value, "value"))
        return value.clone(), value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the gains; absent gradients stay ``None`` so that a path nobody used costs nothing."""
        ctx.gains = inputs[1:] + (1.0, 1.0)[len(inputs) - 1 :]
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Sum the gradients of the two paths, each times its gain."""
        total: Tensor | None = None
        for grad, gain in zip(grad_outputs, ctx.gains, strict=True):
            if grad is None:
                continue
            # A frozen path sends zeros, it is not multiplied: 0 * inf would be NaN.
            term = grad if gain == 1 else grad * gain if gain else torch.zeros_like(grad)
            total = term if total is None else total + term
        return (total,) + (None,) * (ctx.num_inputs - 1)


class _ForwardModeDualPathParam(DualPathParam):
    """The eager twin of :class:`DualPathParam`, with a rule for forward-mode differentiation."""

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, Tensor]:
        tangent = grad_inputs[0]
        mean, curvature = (tangent * gain if gain else torch.zeros_like(tangent) for gain in ctx.gains)
        return mean, curvature


if TYPE_CHECKING:  # a named tuple with a type variable is Python's from 3.11 on
    from typing import Generic

    from typing_extensions import TypeVar

    Value = TypeVar("Value", default=Any)

    class DualPath(NamedTuple, Generic[Value]):
        """Split one value or many; both copies have the type of what was split."""

        mean: Value
        curvature: Value
else:

    class DualPath(NamedTuple):
        """The two copies: ``mean`` for the mode and the guide's mean, ``curvature`` for the Hessian only."""

        mean: Any
        curvature: Any


@overload
def dual_path(value: Tensor, *, mean_gain: float = ..., curvature_gain: float = ...) -> DualPath[Tensor]: ...


@overload
def dual_path(value: Value, *, mean_gain: float = ..., curvature_gain: float = ...) -> DualPath[Value]: ...


def dual_path(value: Any, *, mean_gain: float = 1.0, curvature_gain: float = 1.0) -> DualPath:
    r"""Split a parameter into a copy for the mean and a copy for the curvature; their gradients are summed.

    Do not use it when the precision of your guide has parameters of its own, or when :math:`\hat y` is a free
    parameter rather than a function of :math:`\hat\theta`: there is then no dependence to hide.

    The gains scale what each path sends back: 1 is exact, 0 freezes a path, values between damp it. A gain other
    than 1 makes the gradient a biased one, on purpose.

    :param value: a tensor of any shape, or a dict, list or tuple of them, nested as you like.
    :param float mean_gain: factor on the gradient that the mean path sends back.
    :param float curvature_gain: factor on the gradient that the curvature path sends back.
    :return: :class:`DualPath` whose two fields have the structure, shapes and values of ``value``.
    :raises TypeError: if a leaf is not a floating-point or complex tensor; the message names the leaf.
    :raises ValueError: if a gain is not a finite real number.

    Example: the Hessian of ``-theta**2 * y`` in ``theta`` alone is ``-2 * y``, whatever ``y`` is a function of; its
    derivative with respect to the parameter still knows that ``y = theta**3``::

        >>> import torch
        >>> theta = torch.tensor(2., requires_grad=True)
        >>> mean, curvature = dual_path(theta)
        >>> y = mean ** 3
        >>> log_joint = -curvature ** 2 * y
        >>> grad, = torch.autograd.grad(log_joint, curvature, create_graph=True)
        >>> hessian, = torch.autograd.grad(grad, curvature, create_graph=True)
        >>> hessian
        tensor(-16., grad_fn=<MulBackward0>)
        >>> hessian.backward()
        >>> theta.grad                                    # d/dtheta (-2 theta**3) = -6 theta**2
        tensor(-24.)

    Reference: Schulman et al. (2015), *Gradient Estimation Using Stochastic Computation Graphs*, section 3, for
    losses that differ from the quantity differentiated; here the two are one.
    """
    gains = _checked_gain("mean_gain", mean_gain), _checked_gain("curvature_gain", curvature_gain)
    pairs: list[tuple[Tensor, Tensor]] = []

    def split(leaf: Any, where: str) -> None:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(_not_differentiable(leaf, where))
        pairs.append(DualPathParam.apply(leaf, *gains))

    map_leaves(split, value)

    def rebuild(output_nr: int) -> Any:
        outputs = iter([pair[output_nr] for pair in pairs])
        return map_leaves(lambda leaf, where: next(outputs), value)

    return DualPath(rebuild(MEAN), rebuild(CURVATURE))


def is_dual_edge(edge: Edge, output_nr: int | None = None) -> bool:
    """Whether a graph edge leaves a dual-path node, by the output with this number if one is given."""
    is_dual = issubclass(getattr(edge[0], "_forward_cls", object), DualPathParam)
    return is_dual and output_nr in (None, edge[1])


def map_leaves(fn: Callable[[Any, str], Any], value: Any, where: str = "value") -> Any:
    """Apply ``fn(leaf, name)`` to every leaf of a nested dict, list or tuple and rebuild the structure."""
    if isinstance(value, dict):
        mapped = value.copy()  # keeps the class, and a default factory
        mapped.update({key: map_leaves(fn, item, f"{where}[{key!r}]") for key, item in value.items()})
        return mapped
    if isinstance(value, list | tuple):
        items = [map_leaves(fn, item, f"{where}[{index}]") for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return fn(value, where)


def _checked_gain(name: str, gain: float) -> float:
    if not isinstance(gain, numbers.Real) or not math.isfinite(gain):
        raise ValueError(f"{name} must be a finite real number, got {gain!r}; 1.0 leaves the gradient exact")
    return float(gain)


def _not_differentiable(value: Any, where: str) -> str:
    if isinstance(value, Tensor):
        return (
            f"{where} has dtype {value.dtype}, which carries no gradient; dual_path needs a floating-point or complex "
            f"tensor:\n    dual_path({where}.to(torch.get_default_dtype()))"
        )
    return (
        f"{where} is a {type(value).__name__}, not a tensor; dual_path takes a tensor or a dict, list or tuple of "
        "tensors:\n    dual_path(torch.as_tensor(...))"
    )
