"""Value and gradient of a log joint at many draws, in chunks that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from laplace_amort.recording import LogJoint, Recording

__all__ = ["DrawPulls", "draw_pulls"]

# Bytes that intermediate results of one chunk may take. More is no faster: memory is what large data wait for.
_CHUNK_BYTES = 2**28


class Recordable(Protocol):
    """A model of units that may have been recorded."""

    recording: Recording | None

    def log_joint(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate the log joint, a scalar."""


class DrawPulls(NamedTuple):
    """A log joint at ``S`` draws, without a graph.

    :param Tensor values: ``(S,)``.
    :param Tensor in_global: gradients in the globals, ``(S, d)``; empty if none were wanted, like the others.
    :param Tensor in_local: gradients in the units, ``(S, N, k)``.
    :param list in_parameters: gradients of the sum in parameters of the model.
    """

    values: Tensor
    in_global: Tensor
    in_local: Tensor
    in_parameters: list[Tensor]


def draw_pulls(model: Recordable, global_: Tensor, local: Tensor, parameters: Sequence[Tensor] | None) -> DrawPulls:
    """Evaluate a log joint at draws; a recorded one for many at once, any other draw by draw.

    :param model: has the log joint.
    :param Tensor global_: ``(S, d)``.
    :param Tensor local: ``(S, N, k)``.
    :param parameters: leaves of the model to differentiate in as well; None for values without any gradient.
    """
    recording = model.recording
    chunk = 1 if recording is None else max(1, _CHUNK_BYTES // max(recording.num_bytes, 1))
    function = _one_by_one(model.log_joint) if recording is None else torch.func.vmap(recording)
    parts = [_pulls(function, *some, parameters) for some in zip(global_.split(chunk), local.split(chunk), strict=True)]
    values, in_global, in_local = (torch.cat(list(part)) for part in list(zip(*parts, strict=True))[:3])
    columns = zip(*(part.in_parameters for part in parts), strict=True)
    return DrawPulls(values, in_global, in_local, [torch.stack(column).sum(0) for column in columns])


def _one_by_one(log_joint: LogJoint) -> LogJoint:
    def function(global_: Tensor, local: Tensor) -> Tensor:
        return torch.stack([log_joint(g, y) for g, y in zip(global_, local, strict=True)])

    return function


def _pulls(function: LogJoint, global_: Tensor, local: Tensor, parameters: Sequence[Tensor] | None) -> DrawPulls:
    if parameters is None:
        with torch.no_grad():
            return DrawPulls(function(global_, local), global_[:0].detach(), local[:0].detach(), [])
    with torch.enable_grad():
        values_of = [global_.detach().requires_grad_(), local.detach().requires_grad_(), *parameters]
        values = function(*values_of[:2])
        found = torch.autograd.grad(values.sum(), values_of, allow_unused=True)
    filled = [torch.zeros_like(v) if g is None else g for v, g in zip(values_of, found, strict=True)]
    return DrawPulls(values.detach(), filled[0], filled[1], filled[2:])
