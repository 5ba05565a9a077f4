r"""Algebra on recorded operations: the same function, in fewer and smaller operations.

A density is written for any parameters, and what a model passes is often simpler: an exponential as a rate, or one
scale for all units. Derivatives of third and fourth order pay for that many times over. Four things are changed:

- what gives a tensor the shape that it has, or another shape for the next to change again, is left out;
- a tensor that was expanded is used unexpanded by all that works element by element, and expanded after it if need be;
- :math:`z \log e^x = z x`, :math:`x^2 = x \cdot x`, a division of many numbers by few is a multiplication by their
  reciprocals, and what adds zero or multiplies by one does nothing;
- the density of a Bernoulli variable, ten operations of torch's where it is mapped over points, is three;
- where torch writes a smooth density with a kink, in Binomial, it is written without.

Results are the same but for rounding errors; :func:`~laplace_amort.autodiff.recording.record` compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, fx

__all__ = ["RULES", "simplified"]

_aten: Any = torch.ops.aten

_UNARY = ["abs", "cos", "digamma", "erf", "exp", "expm1", "lgamma", "log", "log1p", "neg", "reciprocal", "rsqrt"]
_UNARY += ["sigmoid", "sin", "sqrt", "tanh"]
_POINTWISE = {getattr(_aten, name).default for name in _UNARY} | {
    _aten.add.Tensor,
    _aten.add.Scalar,
    _aten.sub.Tensor,
    _aten.sub.Scalar,
    _aten.rsub.Scalar,
    _aten.mul.Tensor,
    _aten.mul.Scalar,
    _aten.div.Tensor,
    _aten.div.Scalar,
    _aten.pow.Tensor_Scalar,
    _aten.pow.Tensor_Tensor,
    _aten.xlogy.Tensor,
    _aten.binary_cross_entropy_with_logits.default,
}
# Past this, log(1 + e^x) is x to the last digit.
_SOFTPLUS_IS_LINEAR = 40.0
# Numbers that change nothing: support transforms are full of them.
_NEUTRAL = {_aten.add.Tensor: 0, _aten.sub.Tensor: 0, _aten.mul.Tensor: 1, _aten.div.Tensor: 1}
# What does nothing to the numbers themselves.
_SAME = {_aten.alias.default, _aten.lift_fresh_copy.default, _aten.expand.default}
_RESHAPE = _aten.reshape.default
# What makes zeros of zeros.
_OF_ZEROS = {_RESHAPE, _aten.slice.Tensor, _aten.select.int, _aten.sum.default, _aten.sum.dim_IntList}
_OF_ZEROS |= {_aten.slice_backward.default, _aten.select_backward.default, _aten.squeeze.dim, _aten.unsqueeze.default}
_OF_ZEROS |= {_aten.permute.default, _aten.transpose.int}


class _Value(NamedTuple):
    """A node of the new graph; it may be smaller than what it stands for, and is expanded to that when needed.

    :param fx.Node node: in the new graph.
    :param torch.Size shape: of the node.
    :param fx.Node old: what it stands for; has the full shape and the dtype in ``meta``.
    """

    node: fx.Node
    shape: torch.Size
    old: fx.Node


def simplified(graph: fx.Graph) -> tuple[fx.Graph, int]:
    """Return a graph that does the same, and the bytes that all its results take.

    :param fx.Graph graph: every node that is a tensor has its ``shape`` and ``dtype`` in ``meta``.
    """
    work = _Simplifier()
    for node in graph.nodes:
        work.take(node)
    work.graph.eliminate_dead_code()
    return work.graph, sum(int(node.meta.get("bytes", 0)) for node in work.graph.nodes)


class _Simplifier:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.values: dict[fx.Node, _Value] = {}

    def take(self, old: fx.Node) -> None:
        """Put an old node into the new graph."""
        if (old.op == "call_function" and (old.target in _SAME or _is_idle(old))) or (
            old.op == "call_function" and old.target in _OF_ZEROS and self._number(old.args[0]) == 0
        ):
            self.values[old] = self._of(old.args[0])._replace(old=old)
        elif "uniform" in old.meta:  # read as one number, whatever its shape
            self.values[old] = _Value(self.graph.node_copy(old), torch.Size(), old)
        elif old.op == "call_function" and old.target in _POINTWISE and self._is_uniform(old):
            self.values[old] = self._pointwise(old)
        else:
            node = self.graph.node_copy(old, self._expanded)
            first: Any = node.args[0] if node.args else None
            if node.target is _RESHAPE and first.target is _RESHAPE:
                node.args = (first.args[0], node.args[1])
            shape = old.meta.get("shape", torch.Size())
            self.weigh(node, old, shape)
            self.values[old] = _Value(node, shape, old)

    def _pointwise(self, old: fx.Node) -> _Value:
        target, args = self._rewritten(old)
        if target is None:
            result: _Value = args[0]
            return result._replace(old=old)
        shape = torch.Size(numpy.broadcast_shapes(*(a.shape for a in args if isinstance(a, _Value))))
        nodes = tuple(a.node if isinstance(a, _Value) else a for a in args)
        node = self.graph.call_function(target, nodes, dict(old.kwargs))
        self.weigh(node, old, shape)
        return _Value(node, shape, old)

    def _rewritten(self, old: fx.Node) -> _Operation:
        """The operation and its arguments, by the first rule that applies."""
        args: list[Any] = [self._of(argument) if isinstance(argument, fx.Node) else argument for argument in old.args]
        found = (rule(self, old, args) for rule in RULES.values())
        return next((operation for operation in found if operation is not None), (old.target, args))

    def _number(self, argument: Any) -> float | None:
        """The number that all elements of an argument are, where that is known."""
        return _number(self.values[argument]) if isinstance(argument, fx.Node) else None

    def _of(self, argument: Any) -> _Value:
        return self.values[argument]

    def _expanded(self, argument: fx.Node) -> fx.Node:
        """The node of an argument in its full shape."""
        value, shape = self._of(argument), argument.meta.get("shape")
        if shape is None or value.shape == shape:
            return value.node
        return self.graph.call_function(_aten.expand.default, (value.node, list(shape)))

    def _is_uniform(self, old: fx.Node) -> bool:
        """Whether the result has the dtype of all arguments, so that their ranks do not matter for it."""
        dtypes = {argument.meta["dtype"] for argument in old.args if isinstance(argument, fx.Node)}
        return dtypes == {old.meta["dtype"]} and not old.kwargs.get("rounding_mode")

    def weigh(self, node: fx.Node, old: fx.Node, shape: torch.Size) -> None:
        """Note the bytes that a new node takes, which has the dtype of an old one."""
        is_view = node.op != "call_function" or _is_view(node.target)
        itemsize = getattr(old.meta.get("dtype"), "itemsize", 0)
        node.meta.update(bytes=0 if is_view else shape.numel() * itemsize, dtype=old.meta.get("dtype"))


def _number(value: _Value) -> float | None:
    """The number that all elements of a constant are, where a recorder has looked."""
    number: float | None = value.node.meta.get("uniform")
    return number


def _is_idle(old: fx.Node) -> bool:
    """Whether an operation gives its argument the shape that it has, or the order of axes."""
    if old.target is _aten.permute.default:
        axes: Any = old.args[1]
        return list(axes) == list(range(len(axes)))
    argument = old.args[0] if old.args else None
    same_shape = isinstance(argument, fx.Node) and argument.meta.get("shape") == old.meta.get("shape")
    return old.target is _RESHAPE and same_shape


def _smooth_kink(x: Tensor) -> Tensor:
    r"""Return :math:`\log(1 + e^{-|x|})` as :math:`\log(1 + e^x) - \max(x, 0)`.

    Torch's Binomial adds the maximum again, and differentiated apart both are wrong at zero, from the second derivative
    on: there, autograd takes the slope of an absolute value for zero. So the maximum cancels, and what is left is
    smooth.
    """
    return -torch.nn.functional.logsigmoid(-x) - (x.clamp(min=0) + x - x.clamp(max=0)) / 2


def _in_kinked_softplus(value: _Value) -> Any:
    """The node of x, of :math:`e^{-|x|}`."""
    node: Any = value.node
    for target in (_aten.exp.default, _aten.neg.default, _aten.abs.default):
        if not isinstance(node, fx.Node) or node.target is not target:
            return None
        node = node.args[0]
    return node


def _is_exp(value: Any) -> bool:
    """Whether it is the exponential of real numbers; that of whole or complex ones has another inverse."""
    if not isinstance(value, _Value) or value.node.target is not _aten.exp.default:
        return False
    argument: Any = value.node.args[0]
    return bool(getattr(argument.meta.get("dtype"), "is_floating_point", False))


def _exponent(value: _Value) -> _Value:
    """What an exponential was taken of; of the same shape."""
    argument: Any = value.node.args[0]
    return value._replace(node=argument)


def _is_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(returned.alias_info is not None for returned in schema.returns)


# ------------------------------------------------------------------------------------------------------------- rules

# The operation and its arguments; or None and the argument that is the result.
_Operation = tuple[Any, list[Any]]


def _smooth_softplus(work: _Simplifier, old: fx.Node, args: list[Any]) -> _Operation | None:
    x = _in_kinked_softplus(args[0]) if old.target is _aten.log1p.default else None
    return None if x is None else (_smooth_kink, [args[0]._replace(node=x)])


def _neutral(work: _Simplifier, old: fx.Node, args: list[Any]) -> _Operation | None:
    applies = old.target in _NEUTRAL and not isinstance(args[1], _Value) and args[1] == _NEUTRAL[old.target]
    return (None, args[:1]) if applies else None


def _known_number(work: _Simplifier, old: fx.Node, args: list[Any]) -> _Operation | None:
    """Zeros and ones among the arguments: what is left of the operation."""
    numbers = [_number(arg) if isinstance(arg, _Value) else None for arg in args]
    if all(number is None for number in numbers) or old.kwargs:
        return None
    if old.target in (_aten.mul.Tensor, _aten.neg.default, _aten.div.Tensor) and numbers[0] == 0:
        return None, args[:1]
    if old.target is _aten.mul.Tensor and numbers[0] is None:
        args, numbers = args[::-1], numbers[::-1]
    if old.target is _aten.mul.Tensor and numbers[0] in (0, 1):
        return None, args[:1] if numbers[0] == 0 else args[1:]
    if old.target is _aten.mul.Tensor and numbers[0] == -1:
        return _aten.neg.default, args[1:]
    if old.target is _aten.add.Tensor and 0 in numbers:
        return None, [args[1 - numbers.index(0)]]
    if old.target is _aten.sub.Tensor and 0 in numbers:
        return (_aten.neg.default, args[1:]) if numbers[0] == 0 else (None, args[:1])
    return None


def _xlogy_of_exp(work: _Simplifier, old: fx.Node, args: list[Any]) -> _Operation | None:
    applies = old.target is _aten.xlogy.Tensor and _is_exp(args[1])
    return (_aten.mul.Tensor, [args[0], _exponent(args[1])]) if applies else None


def _square(work: _Simplifier, old: fx.Node, args: list[Any]) -> _Operation | None:
    applies = old.target is _aten.pow.Tensor_Scalar and args[1] == 2
    return (_aten.mul.Tensor, [args[0], args[0]]) if applies else None


def _many_by_few(work: _Simplifier, old: fx.Node, args: list[Any]) -> _Operation | None:
    if old.target is not _aten.div.Tensor or not all(isinstance(a, _Value) for a in args):
        return None
    if args[1].shape.numel() >= old.meta["shape"].numel():
        return None
    node = work.graph.call_function(_aten.reciprocal.default, (args[1].node,))
    work.weigh(node, old, args[1].shape)
    return _aten.mul.Tensor, [args[0], args[1]._replace(node=node)]


def _bernoulli(work: _Simplifier, old: fx.Node, args: list[Any]) -> _Operation | None:
    r"""Write :math:`-\log p(y | x)` as :math:`\log(1 + e^x) - x y`."""
    if old.target is not _aten.binary_cross_entropy_with_logits.default or args[2:] != [None, None, 0]:
        return None
    x, y = args[:2]
    softplus = work.graph.call_function(_aten.softplus.default, (x.node, 1, _SOFTPLUS_IS_LINEAR))
    work.weigh(softplus, old, x.shape)
    shape = torch.Size(numpy.broadcast_shapes(x.shape, y.shape))
    product = work.graph.call_function(_aten.mul.Tensor, (x.node, y.node))
    work.weigh(product, old, shape)
    return _aten.sub.Tensor, [x._replace(node=softplus), x._replace(node=product, shape=shape)]


RULES: dict[str, Callable[[_Simplifier, fx.Node, list[Any]], _Operation | None]] = {
    "smooth softplus": _smooth_softplus,
    "known numbers": _known_number,
    "neutral numbers": _neutral,
    "xlogy of exp": _xlogy_of_exp,
    "square": _square,
    "many by few": _many_by_few,
    "Bernoulli": _bernoulli,
}
"""What is rewritten, by the first that applies; ``benchmarks/simplify_rules.py`` measures what each saves."""
