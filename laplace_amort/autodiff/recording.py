r"""A log joint recorded once as a list of tensor operations, to be evaluated many times.

A run of a Pyro model is mostly Python: handlers, distributions, checks. For small data that takes longer than the
arithmetic. So a fit records the operations of one run and repeats these; whatever depends on the data alone is computed
while recording, what is computed twice is kept once, and :mod:`~laplace_amort.autodiff.simplify` does the algebra.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only

from laplace_amort.autodiff.points import nearby
from laplace_amort.autodiff.simplify import simplified
from laplace_amort.errors import LaplaceAmortError, RecordingError
from laplace_amort.types import Density

__all__ = ["Recording", "record"]


# Value and gradients may differ by this power of the rounding error: sums in another order, but no other function.
_SHARE = 0.6
# Points at which a recording is compared with what it was recorded from: shares of a normal deviate from where it was.
_COMPARED = (0.05, 0.5)


class Recording:
    """What :func:`record` returns; called like the log joint that it was recorded from.

    Differentiable to any order, also in parameters of the model, whose values at the time of a call count. It holds no
    Python that could branch, so ``torch.func.vmap`` maps over it.

    :param fx.GraphModule graph: the operations.
    :param int num_bytes: memory that the results of all operations of one evaluation take.
    """

    def __init__(self, graph: fx.GraphModule, num_bytes: int) -> None:
        self.graph, self.num_bytes = graph, num_bytes
        self._forward: Any = graph.forward

    def __call__(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate at globals ``(d,)`` and units ``(N, k)``; returns a scalar, or what else was recorded."""
        result: Tensor = self._forward(global_, local)
        return result

    def __len__(self) -> int:
        """The number of operations."""
        return sum(node.op == "call_function" for node in self.graph.graph.nodes)

    def parts(self) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        """Return the function whose results are what ``torch.cat`` joined last, without a copy of them.

        :raises RecordingError: if what was recorded is no concatenation.
        """
        graph: Any = fx.Graph()
        joined: Any = graph.graph_copy(self.graph.graph, {})
        failures = []
        while joined.target is _nan_where_failed:
            joined, failure = joined.args
            failures.append(failure)
        if joined.target is not torch.ops.aten.cat.default:
            raise RecordingError("what was recorded is no concatenation, and has no parts")
        parts = list(joined.args[0])
        for failure in failures:
            parts = [graph.call_function(_nan_where_failed, (part, failure)) for part in parts]
        graph.output(tuple(parts))
        graph.eliminate_dead_code()
        function: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = fx.GraphModule(self.graph, graph).forward
        return function

    def check(self, log_joint: Density, global_: Tensor, local: Tensor) -> None:
        """Compare value and gradients with those of the log joint itself, at one point.

        :raises RecordingError: if they differ by more than rounding errors.
        """
        # Data in float64 make a value in float64 of latents in float32, with the rounding errors of these.
        rounding = max(torch.finfo(argument.dtype).eps for argument in (global_, local))
        for what, recorded, live in zip(
            ("value", "gradient in the globals", "gradient in the units"),
            _value_and_gradients(self, global_, local),
            _value_and_gradients(log_joint, global_, local),
            strict=True,
        ):
            finite = live[live.isfinite()]
            size = 1 + finite.abs().max() if finite.numel() else 1
            same = (recorded - live).abs() <= max(rounding, torch.finfo(live.dtype).eps) ** _SHARE * size
            if not (same | ~(live.isfinite() | recorded.isfinite())).all():
                raise RecordingError(
                    f"the {what} of the recorded model differs from that of the model by "
                    f"{float((recorded - live).abs().max()):.3g}. Does it use no_grad, or state that changes?"
                )


def record(log_joint: Density, global_: Tensor, local: Tensor) -> Recording:
    r"""Record the operations of one evaluation, and check that they are those of any other.

    Do not use it for a log joint that depends on anything else that changes, such as data in place: data are constants
    of the recording. Parameters, tensors that require a gradient, are not.

    :param log_joint: of globals ``(d,)`` and units ``(N, k)``; returns a scalar, or any tensor.
    :param Tensor global_: where to record, ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :raises RecordingError: if the log joint is seen to branch on the value of an argument (``.tolist()`` and NumPy are
        not seen), writes to tensors in place, or if at two other points its value or gradients are not those of the
        recording; the message says which.

    Example::

        >>> import torch
        >>> data = torch.tensor([[1.], [3.]])
        >>> recording = record(lambda t, y: -(t**2).sum() - ((y - t) ** 2 * data.exp().log()).sum(),
        ...                    torch.zeros(1), torch.zeros(2, 1))
        >>> recording(torch.ones(1), torch.zeros(2, 1))
        tensor(-5.)
        >>> len(recording)
        8
    """
    try:
        return _recorded_and_checked(log_joint, global_, local)
    except LaplaceAmortError:
        raise
    except RuntimeError as error:  # of torch: a factorization that fails, an operation that does not map
        raise RecordingError(
            f"the model, or what was recorded of it, fails near the point where it is recorded: {error}"
        ) from error


def _recorded_and_checked(log_joint: Density, global_: Tensor, local: Tensor) -> Recording:
    try:
        recording = _recorded(log_joint, global_, local)
    except _InPlace:  # as torch itself does in some densities
        recording = _recorded(torch.func.functionalize(log_joint, remove="mutations"), global_, local)
    points = [(nearby(global_, share, 1), nearby(local, share, 2)) for share in _COMPARED]
    for point in points:
        recording.check(log_joint, *point)
    with torch.no_grad():  # shapes that depend on values do not map
        torch.func.vmap(recording)(*(torch.stack(parts) for parts in zip(*points, strict=True)))
    return recording


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.expand_as(to).to(to)


def _slice_scatter(
    to: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    last = to.shape[dim]
    return torch.slice_scatter(to, source, dim, start, last if end is None else min(end, last), step)


# What torch cannot differentiate, cannot map (slices without an end), or does only in the memory layout that it was in
# before the algebra; and what does the same.
_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.slice_scatter.default: _slice_scatter,
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
}


class _InPlace(RecordingError):
    """The log joint writes to a tensor in place."""


def _recorded(log_joint: Density, global_: Tensor, local: Tensor) -> Recording:
    recorder = _Recorder((global_, local))
    with torch.no_grad(), recorder:
        result = log_joint(*recorder.arguments)
    return recorder.finish(result)


class _Recorder(TorchDispatchMode):
    """Write down every operation that depends on an argument or on a parameter; carry out all."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.root = fx.Graph(), nn.Module()
        self.arguments = [argument.detach().clone() for argument in arguments]
        self.nodes: dict[int, fx.Node] = {}
        self.constants: set[int] = set()
        self.failures: list[fx.Node] = []  # codes of factorizations, which are zero where these succeeded
        self.kept: list[Tensor] = []  # as an id is good only while its tensor lives
        for number, argument in enumerate(self.arguments):
            self._name(argument, self.graph.placeholder(f"argument{number}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; by default torch loads its compiler all the same, which takes most of a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not tree_any(self._is_variable, (args, kwargs)):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            raise _InPlace(f"the model writes to a tensor in place ({func}), where it depends on latents")
        node_args, node_kwargs = tree_map_only(Tensor, self._node_of, (args, kwargs))
        if func is torch.ops.aten._linalg_check_errors.default:  # raises; a recording is NaN instead
            self.failures.append(node_args[0])
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not tree_any(lambda part: isinstance(part, Tensor), result):
            raise RecordingError(f"the model takes the value of a latent out of torch ({func}): to branch on it?")
        node = self.graph.call_function(_INSTEAD.get(func, func), node_args, node_kwargs)
        self._name(result, node)
        return result

    def finish(self, result: Tensor) -> Recording:
        """Return what was recorded, for a result that is one of the tensors seen."""
        node = self._node_of(result)
        for failure in self.failures:
            node = self.graph.call_function(_nan_where_failed, (node, failure))
            node.meta.update(shape=result.shape, dtype=result.dtype)
        self.graph.output(node)
        _merge_equal(self.graph)
        graph, num_bytes = simplified(self.graph)
        _merge_equal(graph)
        return Recording(fx.GraphModule(self.root, graph), num_bytes)

    def _is_variable(self, part: Any) -> bool:
        known = id(part) in self.nodes and id(part) not in self.constants
        return isinstance(part, Tensor) and (known or part.requires_grad)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; a constant or a parameter has one that reads it."""
        if id(tensor) not in self.nodes:
            name = f"_constant{len(self.kept)}"
            self.root.register_buffer(name, tensor, persistent=False)
            self._name(tensor, self.graph.get_attr(name))
            if not tensor.requires_grad:
                self.constants.add(id(tensor))
        return self.nodes[id(tensor)]

    def _name(self, result: Any, node: fx.Node) -> None:
        """Remember which node a result is of, or its items."""
        if isinstance(result, Tensor):
            node.meta.update(shape=result.shape, dtype=result.dtype)
            self.nodes[id(result)] = node
            self.kept.append(result)
        elif isinstance(result, list | tuple):
            for index, part in enumerate(result):
                self._name(part, self.graph.call_function(operator.getitem, (node, index)))


def _nan_where_failed(result: Tensor, code: Tensor) -> Tensor:
    """A product, so that gradients are NaN as well."""
    return result * torch.where((code == 0).all(), 1.0, torch.nan).to(result)


def _merge_equal(graph: fx.Graph) -> None:
    """Keep one of all operations that do the same to the same."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            same = first.setdefault(str((node.target, node.args, node.kwargs)), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def _value_and_gradients(log_joint: Density, global_: Tensor, local: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        copies = [value.detach().clone().requires_grad_() for value in (global_, local)]
        value = log_joint(*copies)
        if not value.requires_grad:
            return [value, *(torch.zeros_like(copy) for copy in copies)]
        return [value.detach(), *torch.autograd.grad(value.sum(), copies, materialize_grads=True)]
