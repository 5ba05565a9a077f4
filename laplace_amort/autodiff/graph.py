"""The autograd graph above a tensor, as a set of edges. Reads the graph only; computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

__all__ = ["Edge", "ancestors_of", "edges_above"]

Edge = tuple[Any, int]  # (autograd node, number of the output that the edge leaves by)


def ancestors_of(tensor: Tensor, stop: Callable[[Edge], bool] = lambda edge: False) -> set[Edge]:
    """Return every edge of the graph above ``tensor``; edges where ``stop`` holds are included but not passed.

    :param Tensor tensor: of any shape; a tensor without ``grad_fn`` has no ancestors.
    :param stop: where not to go on.
    :return: set of edges.

    Example::

        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> sorted(node.name() for node, _ in ancestors_of((x * 2).exp()))
        ['ExpBackward0', 'MulBackward0', 'torch::autograd::AccumulateGrad']
    """
    return edges_above([] if tensor.grad_fn is None else [(tensor.grad_fn, tensor.output_nr)], stop)


def edges_above(edges: Iterable[Edge], stop: Callable[[Edge], bool] = lambda edge: False) -> set[Edge]:
    """Return the given edges and every edge above them; edges where ``stop`` holds are included but not passed."""
    seen: set[Edge] = set()
    stack = list(edges)
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if not stop(edge):
            stack.extend(parent for parent in edge[0].next_functions if parent[0] is not None)
    return seen
