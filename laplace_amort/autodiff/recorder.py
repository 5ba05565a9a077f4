"""The writing down of operations: every one that a function does to its arguments, as a graph without Python."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from laplace_amort.autodiff.constants import Seen
from laplace_amort.autodiff.dependence import is_validating
from laplace_amort.autodiff.operations import Operations
from laplace_amort.autodiff.simplify import simplified
from laplace_amort.errors import RecordingError

__all__ = ["InPlaceError", "Recorder", "nan_unless"]

_aten = torch.ops.aten


class InPlaceError(RecordingError):
    """The log joint writes to a tensor in place."""


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.expand_as(to).to(to)


def _slice_scatter(
    to: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    first, last, step = slice(start, end, step).indices(to.shape[dim])
    return torch.slice_scatter(to, source, dim, first, last, step)


def _select_scatter(to: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    """As a slice of one: torch's own has wrong gradients where only the source is mapped."""
    first = index % to.shape[dim]
    return torch.slice_scatter(to, source.unsqueeze(dim), dim, first, first + 1)


def _index_put(to: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """Put values by index; a mask of all leading dimensions chooses, as what it selects has no fixed shape."""
    mask = indices[0]
    if len(indices) == 1 and mask is not None and mask.dtype == torch.bool and values.dim() == 0 and not accumulate:
        return torch.where(mask.reshape(mask.shape + (1,) * (to.dim() - mask.dim())), values.to(to), to)
    found: Tensor = _aten.index_put.default(
        to, indices, values, accumulate
    )  # that of Python takes no None, for a colon
    return found


# What torch cannot differentiate, cannot map (slices without an end), maps wrongly, or does only in the memory layout
# that it was in before the algebra; and what does the same.
_INSTEAD: dict[Any, Callable[..., Any]] = {
    _aten.copy.default: _copy,
    _aten.select_scatter.default: _select_scatter,
    _aten.slice_scatter.default: _slice_scatter,
    _aten.index_put.default: _index_put,
    _aten.view.default: _aten.reshape.default,
}


class Recorder(TorchDispatchMode):
    """Write down every operation that depends on an argument or on a parameter; carry out all."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.root = fx.Graph(), dict[str, Tensor]()
        self.arguments = [argument.detach().clone() for argument in arguments]
        self.nodes: dict[int, fx.Node] = {}
        self.constants: set[int] = set()
        self.claims: list[fx.Node] = []  # what holds where the model does not raise
        self.constants_made: dict[int, weakref.ref[Tensor]] = {}
        self.constants_found: dict[int, Seen] = {}  # that were there before
        self.kept: list[Tensor] = []  # as an id is good only while its tensor lives
        for number, argument in enumerate(self.arguments):
            self._name(argument, self.graph.placeholder(f"argument{number}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; by default torch loads its compiler all the same, which takes most of a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is done is at hand, whatever arithmetic it was asked for in
            return self._write_down(func, args, kwargs or {})

    def _write_down(self, func: Any, args: Any, kwargs: Any) -> Any:
        parts = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        if not any(map(self._is_variable, parts)):
            for part in parts:
                self._find(part)
            result = func(*args, **kwargs)
            self._make(result)
            return result
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        node_args, node_kwargs = tree_map_only(Tensor, self._node_of, (args, kwargs))
        result = func(*args, **kwargs)
        if func is _aten._linalg_check_errors.default:  # raises unless all codes of a factorization are zero
            self.claims.append(self.graph.call_function(_aten.eq.Scalar, (node_args[0], 0)))
        elif func is _aten._local_scalar_dense.default and result is True and is_validating():
            self.claims.append(node_args[0])
        elif tree_any(lambda part: isinstance(part, Tensor), result):
            self._name(result, self.graph.call_function(_INSTEAD.get(func, func), node_args, node_kwargs))
        else:
            raise RecordingError(f"the model takes the value of a latent out of torch ({func}): to branch on it?")
        return result

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write down an operation in place as what it leaves there."""
        instead = _out_of_place(func)
        # A change of shape alone, such as the ``squeeze_`` in torch's own products, writes to no memory.
        if instead is None or not (torch.Tag.inplace_view in func.tags or self._is_own(args)):
            raise InPlaceError(f"the model writes to a tensor in place ({func}), where it depends on latents")
        if not self._is_variable(args[0]):  # a constant until now, whose value is about to change
            self.nodes[id(args[0])] = self._node_of(args[0].clone())
        node_args, node_kwargs = tree_map_only(Tensor, self._node_of, (args, kwargs))
        result = func(*args, **kwargs)
        self.constants.discard(id(result))
        self._name(result, self.graph.call_function(_INSTEAD.get(instead, instead), node_args, node_kwargs))
        return result

    def _is_own(self, args: Any) -> bool:
        """Whether what is written to was made here, in the same dtype, and no other tensor sees its memory.

        Of views of one memory torch's functionalization keeps track.
        """
        written, *others = (part for part in args if isinstance(part, Tensor))
        made = [tensor for reference in self.constants_made.values() if (tensor := reference()) is not None]
        if written.requires_grad or not any(one is written for one in (*self.kept, *made)):
            return False
        memory = written.untyped_storage()._cdata
        alone = all(one is written or one.untyped_storage()._cdata != memory for one in (*self.kept, *made))
        return alone and all(other.dtype == written.dtype for other in others if other.is_floating_point())

    def finish(self, result: Tensor) -> tuple[Operations, int, list[Seen]]:
        """Return what was recorded, for a result that is one of the tensors seen.

        Besides: the bytes of the results of all operations, and the constants that were there before and still are.
        """
        node = self._node_of(result)
        for claim in self.claims:
            node = self.graph.call_function(nan_unless, (node, claim))
            node.meta.update(shape=result.shape, dtype=result.dtype)
        self.graph.output(node)
        _merge_equal(self.graph)
        graph, num_bytes = simplified(self.graph)
        _merge_equal(graph)
        there = [seen for seen in self.constants_found.values() if seen.reference() is not None]
        return Operations(self.root, graph), num_bytes, there

    def _is_variable(self, part: Any) -> bool:
        known = id(part) in self.nodes and id(part) not in self.constants
        return isinstance(part, Tensor) and (known or part.requires_grad)

    def _make(self, result: Any) -> None:
        """Note constants that were made in the run."""
        made = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
        self.constants_made.update((id(part), weakref.ref(part)) for part in made)

    def _read(self, constant: Tensor) -> fx.Node:
        """A node that reads a constant or a parameter."""
        name = f"_constant{len(self.root)}"
        self.root[name] = constant
        return self.graph.get_attr(name)

    def _find(self, constant: Tensor) -> None:
        """Note a constant that was there before, as it is when it is met first."""
        made, found = self.constants_made.get(id(constant)), self.constants_found.get(id(constant))
        if not ((made is not None and made() is constant) or (found is not None and found.reference() is constant)):
            self.constants_found[id(constant)] = Seen.of(constant)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; a constant or a parameter has one that reads it."""
        if id(tensor) not in self.nodes:
            if not tensor.requires_grad:
                self._find(tensor)
            self._name(tensor, self._read(tensor))
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


def _out_of_place(func: Any) -> Any:
    """The operation that gives back what another leaves in place; None if there is no such."""
    name, overload = func.__name__.split(".")
    return getattr(getattr(_aten, name[:-1], None), overload, None) if name.endswith("_") else None


def nan_unless(result: Tensor, claim: Tensor) -> Tensor:
    """Return a result, NaN unless a claim holds everywhere: as a product, so that gradients are NaN as well."""
    return result * torch.where(claim.all(), 1.0, torch.nan).to(result)


def _merge_equal(graph: fx.Graph) -> None:
    """Keep one of all operations that do the same to the same."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            same = first.setdefault(str((node.target, node.args, node.kwargs)), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
