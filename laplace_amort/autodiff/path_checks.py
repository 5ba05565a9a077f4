"""Which of the two copies of a parameter a mode was computed from: the autograd graph, followed back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from laplace_amort.autodiff.graph import Edge, ancestors_of, edges_above
from laplace_amort.autodiff.paths import CURVATURE, MEAN, DualPath, is_dual_edge, map_leaves
from laplace_amort.errors import PathError, PathLeakError, PathMissingWarning

__all__ = ["check_paths"]


def check_paths(dual: DualPath, mode: Any, log_prob: Tensor | None = None) -> None:
    r"""Follow the autograd graph and refuse a :math:`\hat y` that was computed from the wrong copy.

    Call it once in a hand-written guide, after :math:`\hat y` is known; it reads the graph and computes nothing. It
    sees the graph of eager autograd only: code inside ``torch.compile`` or ``torch.func.vmap`` is opaque to it. Where
    gradients are disabled, as in ``SVI.evaluate_loss`` and ``Predictive``, there is nothing to check and it returns.

    :param DualPath dual: what :func:`dual_path` returned.
    :param mode: :math:`\hat y`, a tensor or a nested dict, list or tuple of them.
    :param Tensor log_prob: optionally the scalar log joint density that the Hessian is taken of, evaluated at
        ``dual.curvature`` and ``mode``; then a third route from the raw parameter into it is found as well.
    :raises PathLeakError: if ``mode`` descends from the curvature copy, or ``log_prob`` from the raw parameter past
        both copies.
    :raises PathError: if there is no graph to follow although gradients are enabled.
    :raises TypeError: if ``dual`` is not a :class:`DualPath`, or ``mode`` holds something that is not a tensor.

    A mode that does not reach the mean copy at all gives a :class:`~laplace_amort.PathMissingWarning`: the
    ELBO gradient would silently lack :math:`\partial\hat y/\partial\hat\theta`.

    Example::

        >>> import torch
        >>> from laplace_amort import dual_path
        >>> dual = dual_path(torch.zeros(2, requires_grad=True))
        >>> check_paths(dual, dual.mean.exp())
        >>> check_paths(dual, dual.curvature.exp())
        Traceback (most recent call last):
            ...
        laplace_amort.errors.PathLeakError: mode (shape (2,)) descends from the curvature output of dual_path, so the
        Hessian would count the dependence of the mode on the parameter. Compute it from the mean output instead:
            y_hat = mode(dual.mean)
    """
    if not isinstance(dual, DualPath):
        raise TypeError(f"check_paths needs the DualPath that dual_path() returned, got {type(dual).__name__}")
    if not torch.is_grad_enabled():
        return
    mean_edges = _edges(dual.mean, "dual.mean", MEAN)
    curvature_edges = _edges(dual.curvature, "dual.curvature", CURVATURE)
    reached = False
    for where, leaf in _leaves(mode, "mode"):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where} is a {type(leaf).__name__}; check_paths needs tensors")
        ancestors = ancestors_of(leaf)
        if ancestors & curvature_edges:
            raise PathLeakError(
                f"{where} (shape {tuple(leaf.shape)}) descends from the curvature output of dual_path, so the\n"
                "Hessian would count the dependence of the mode on the parameter. "
                "Compute it from the mean output instead:\n    y_hat = mode(dual.mean)"
            )
        reached = reached or bool(ancestors & mean_edges)
    if not reached:
        warnings.warn(
            "the mode does not reach the mean output of dual_path: the ELBO gradient will lack the term through the "
            "mode. Was it detached, or computed under no_grad? Compute it as\n    y_hat = mode(dual.mean)",
            PathMissingWarning,
            stacklevel=2,
        )
    if log_prob is not None:
        _check_no_third_route(mean_edges | curvature_edges, log_prob)


def _check_no_third_route(copies: set[Edge], log_prob: Tensor) -> None:
    # What feeds the dual node is the raw parameter; reaching it other than through a copy is a third route.
    sources = {edge for node, _ in copies for edge in node.next_functions if edge[0] is not None}
    past_copies = ancestors_of(log_prob, stop=copies.__contains__)
    # So is reaching what the raw parameter was computed from: a constrained parameter that is read twice has only its
    # leaf in common. Other dual paths, say of another slice of the same leaf, are let through.
    past_every_path = ancestors_of(log_prob, stop=lambda edge: edge in copies or is_dual_edge(edge))
    if past_copies & sources or past_every_path & edges_above(sources, stop=is_dual_edge):
        raise PathLeakError(
            "log_prob depends on the raw parameter past both outputs of dual_path, so the Hessian would miss that\n"
            "dependence. Pass the parameter in as an argument, and call it with the curvature output:\n"
            "    log_joint(dual.curvature, y_hat)"
        )


def _edges(copies: Any, where: str, output_nr: int) -> set[Edge]:
    """The graph edges that leave the dual node for these copies, also after in-place operations on them."""
    edges = set()
    for name, leaf in _leaves(copies, where):
        if leaf.grad_fn is None:
            raise PathError(
                f"there is no graph to follow: {name} has no grad_fn. Call dual_path on a tensor that requires a "
                "gradient, with gradients enabled:\n    dual_path(theta.requires_grad_())"
            )
        own = {edge for edge in ancestors_of(leaf, stop=is_dual_edge) if is_dual_edge(edge)}
        edges |= {edge for edge in own if edge[1] == output_nr} or {(leaf.grad_fn, leaf.output_nr)}
    return edges


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    map_leaves(lambda leaf, name: found.append((name, leaf)), value, where)
    return iter(found)
