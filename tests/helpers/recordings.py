"""What tests of recorded log joints share: two points, derivatives to fourth order, the operations of a recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from helpers.models import normals
from helpers.strategies import standard_normal
from laplace_amort.autodiff.recording import Recording

POINT = standard_normal(2, seed=0), standard_normal(2, 3, seed=1)
ELSEWHERE = POINT[0] + 0.3, POINT[1] - 0.2


def derivatives(
    log_joint: Callable[..., Tensor], point: Sequence[Tensor], order: int = 4, leaves: Sequence[Tensor] = ()
) -> Tensor:
    """Value and derivatives along random directions, up to an order; then gradients of value and slope in leaves."""
    inputs = [part.detach().clone().requires_grad_() for part in point]
    found = [log_joint(*inputs)]
    for step in range(order):
        found.append(torch.zeros_like(found[0]))
        if found[-2].requires_grad:
            gradients = torch.autograd.grad(found[-2], inputs, create_graph=True, materialize_grads=True)
            pairs = enumerate(zip(gradients, inputs, strict=True))
            found[-1] = sum((g * normals(*x.shape, seed=10 + 2 * step + i).to(x)).sum() for i, (g, x) in pairs)
    in_leaves = [
        part.reshape(-1)
        for result in found[: 2 if leaves else 0]
        for part in torch.autograd.grad(result, leaves, retain_graph=True, materialize_grads=True)
    ]
    return torch.cat([torch.stack(found), *in_leaves]).detach()


def operations(recording: Recording) -> list[str]:
    """Their names, in the order in which they are done."""
    nodes = [node for node in recording.operations.graph.nodes if node.op == "call_function"]
    return [str(node.target).removeprefix("aten.").partition(".")[0] for node in nodes]
