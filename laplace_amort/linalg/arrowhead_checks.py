"""What is no arrowhead: blocks that do not fit together, or that are not positive definite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laplace_amort.errors import NotPositiveDefiniteError

__all__ = ["check_shapes", "describe_schur_complement", "describe_tail", "raise_if_any"]


def check_shapes(head: Tensor, border: Tensor, tail: Tensor) -> None:
    """Refuse blocks that do not fit together."""
    if border.dim() >= 3:
        *batch, n, k, d = border.shape
        if head.shape == (*batch, d, d) and tail.shape == (*batch, n, k, k):
            return
    raise ValueError(
        f"head {tuple(head.shape)}, border {tuple(border.shape)} and tail {tuple(tail.shape)} do not fit together: for "
        "d globals and N units of dimension k they are (*, d, d), (*, N, k, d) and (*, N, k, k), with one batch shape *"
    )


def describe_tail(index: list[int], failures: str) -> str:
    """Say which tail fails, and how to repair tails."""
    batch = f" of arrowhead {index[:-1]}" if index[:-1] else ""
    return (
        f"the tail of unit {index[-1]}{batch} {failures}. Is its mode no maximum at these globals? To repair tails, "
        "smoothly:\n"
        "    tail, report = SoftAbs()(tail)"
    )


def describe_schur_complement(index: list[int], failures: str) -> str:
    """Say which Schur complement fails, and how to repair it."""
    batch = f" of arrowhead {index}" if index else ""
    return (
        f"the Schur complement{batch} {failures}, so the globals have no covariance. Is this point far from the mode, "
        "or a scale among the globals? To repair it, smoothly:\n"
        "    schur, report = SoftAbs()(arrowhead.schur_complement)\n"
        "    arrowhead = arrowhead.with_schur(schur)"
    )


def raise_if_any(failed: Tensor, matrix: Tensor, describe: Callable[[list[int], str], str]) -> None:
    """Refuse blocks that have no factor, and name the worst: not finite, or else of the smallest eigenvalue."""
    if not failed.any():
        return
    indices, members = failed.nonzero(), matrix.detach()[failed]
    finite = members.isfinite().all(-1).all(-1)
    if finite.all():
        smallest = torch.linalg.eigvalsh(members)[:, 0]
        worst = int(smallest.argmin())
        failures = (
            f"is not positive definite: its smallest eigenvalue is {float(smallest[worst]):.4g} "
            f"({len(members)} of {failed.numel()} are not)"
        )
    else:
        worst = int(finite.to(torch.uint8).argmin())
        failures = f"is not finite ({int((~finite).sum())} of {failed.numel()} are not)"
    raise NotPositiveDefiniteError(describe(indices[worst].tolist(), failures))
