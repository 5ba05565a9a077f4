"""Gradient and information of a recorded log joint as recordings themselves, without passes back.

A pass back through a graph that was made for it, and another through that of the first, are mostly bookkeeping for
small data. What the passes compute is the same from call to call: here it is recorded once, for what is called in
every step of an SVI. A fit, of few evaluations, would not win back what that takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from laplace_amort.autodiff.information import ArrowheadBlocks, first_derivatives
from laplace_amort.autodiff.operations import Operations
from laplace_amort.autodiff.points import fixed_normal, nearby
from laplace_amort.autodiff.recorder import Recorder
from laplace_amort.autodiff.recording import Recording
from laplace_amort.errors import LaplaceAmortError, RecordingError

__all__ = ["RecordedInformation", "record_information"]

_aten: Any = torch.ops.aten

# Of these nothing but the shape of an argument counts.
_OF_SHAPE = (_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default)
# Passes at most, of which each adds its operations to the recording.
_PASSES = 12
# As in other recordings: where it is compared, and how much it may be off.
_COMPARED, _SHARE = (0.05, 0.5), 0.6


class RecordedInformation:
    """Gradient in the units, tails, head and border of the information, each differentiable in both arguments.

    :param Operations operations: the four, in this order.
    :param tuple sizes: d, N and k.
    """

    def __init__(self, operations: Operations, sizes: tuple[int, int, int]) -> None:
        self.sizes = sizes
        self._gradient, self._look, self._blocks = (_part(operations, *wanted) for wanted in ((0,), (0, 1), (2, 3, 1)))

    def gradient(self, global_: Tensor, local: Tensor) -> Tensor:
        """Return the gradient in the units, ``(N, k)``."""
        (found,) = self._gradient(global_, local)
        return found.reshape(local.shape)

    def look(self, global_: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in the units ``(N, k)`` and the tails ``(N, k, k)``."""
        gradient, tail = self._look(global_, local)
        return gradient.reshape(local.shape), tail.reshape(*local.shape, -1)

    def blocks(self, global_: Tensor, local: Tensor) -> ArrowheadBlocks:
        """Return the blocks of the information, which may be NaN or infinite."""
        (d, num_units, k), (head, border, tail) = self.sizes, self._blocks(global_, local)
        return ArrowheadBlocks(head.reshape(d, d), border.reshape(num_units, k, d), tail.reshape(num_units, k, k))


def record_information(recording: Recording, global_: Tensor, local: Tensor) -> RecordedInformation:
    """Record the derivatives of a recorded log joint, and compare them with those by passes back at two other points.

    :param Recording recording: of a scalar.
    :param Tensor global_: where to record, ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :raises RecordingError: if there are many passes, if an operation does not record, or if anything differs.
    """
    sizes = (len(global_), *local.shape)
    if sizes[0] + sizes[2] > _PASSES or not sizes[0]:
        raise RecordingError(f"{sizes[0] + sizes[2]} passes are more than are recorded, or there are no globals")
    try:
        recorder = _DerivativeRecorder((global_, local))
        with torch.no_grad(), recorder:
            joined = _derivatives(_Interpreter(recording.operations.module(), recorder), *recorder.arguments)
        found = RecordedInformation(recorder.finish(joined)[0], sizes)
        for share in _COMPARED:
            _check(found, recording, nearby(global_, share, 1), nearby(local, share, 2))
    except LaplaceAmortError:
        raise
    except RuntimeError as error:  # of torch
        raise RecordingError(f"the derivatives of the model do not record: {error}") from error
    return found


class _DerivativeRecorder(Recorder):
    """Write down passes back along with what they pass through.

    Torch detaches a result that it has saved, and gives it its place in the graph again: that is no operation. Where
    the log joint detaches, it is.
    """

    explicit = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.detach.default and not self.explicit and self._is_variable(args[0]):
            result = func(*args)
            self._name(result, self._node_of(args[0]))
            return result
        if func in _OF_SHAPE:
            result = func(*args, **(kwargs or {}))
            self._make(result)
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _read(self, constant: Tensor) -> fx.Node:
        """Read a constant whose elements are all the same, such as a seed, as one number."""
        if constant.requires_grad or not constant.numel() or not constant.is_floating_point():
            return super()._read(constant)
        first = constant.detach().reshape(-1)[0]
        if not bool((constant == first).all()):
            return super()._read(constant)
        node = super()._read(first.clone())
        node.meta.update(uniform=float(first))
        return node


class _Interpreter(fx.Interpreter):
    """Carries out recorded operations, and tells a recorder where one is to detach."""

    def __init__(self, module: fx.GraphModule, recorder: _DerivativeRecorder) -> None:
        super().__init__(module)
        self.recorder = recorder

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Carry out one."""
        self.recorder.explicit = target is _aten.detach.default
        try:
            return super().call_function(target, args, kwargs)
        finally:
            self.recorder.explicit = False


def _derivatives(log_joint: _Interpreter, global_: Tensor, local: Tensor) -> Tensor:
    """Gradient in the units, tails, head and border, each flat, one after the other."""
    with torch.enable_grad():
        theta, y = global_.detach().requires_grad_(), local.detach().requires_grad_()
        in_global, in_local = _pulled(log_joint.run(theta, y), None, theta, y)
        heads, borders = zip(*(_pulled(in_global, seed, theta, y) for seed in _seeds(theta)), strict=True)
        # The same seed for every unit.
        rows = [_pulled(in_local, seed.expand_as(y), y)[0].unbind(-1) for seed in _seeds(y[0])]
        k = y.shape[1]
        # As in `local_curvature`: exactly symmetric.
        tail = torch.stack([rows[max(i, j)][min(i, j)] for i in range(k) for j in range(k)], -1)
        head = torch.stack(heads)
        parts = [in_local, tail, (head + head.mT) / 2, torch.stack(borders, -1)]
        return torch.cat([part.reshape(-1) for part in parts])


def _seeds(like: Tensor) -> list[Tensor]:
    return list(-torch.eye(like.numel(), dtype=like.dtype, device=like.device))


def _pulled(output: Tensor, seed: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
    if not output.requires_grad:
        return tuple(map(torch.zeros_like, values))
    return torch.autograd.grad(
        output, values, seed, create_graph=True, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _part(operations: Operations, *wanted: int) -> Operations:
    """Some of the parts that were joined, and what they are made of."""
    graph: Any = fx.Graph()
    joined: Any = graph.graph_copy(operations.graph, {})
    graph.output(tuple(joined.args[0][number] for number in wanted))
    graph.eliminate_dead_code()
    return Operations(operations.constants, graph)


def _check(found: RecordedInformation, recording: Recording, global_: Tensor, local: Tensor) -> None:
    """Compare values and first derivatives with those by passes back."""
    results = []
    for made in (lambda *at: _recorded(found, *at), lambda *at: _passed(recording, *at)):
        at = [value.detach().clone().requires_grad_() for value in (global_, local)]
        with torch.enable_grad():
            parts = made(*at)
            # A weighted sum, so that its gradient is of each.
            total = torch.stack([(part * fixed_normal(part, 3)).sum() for part in parts]).sum()
            slopes = torch.autograd.grad(total, at, allow_unused=True, materialize_grads=True)
        results.append([part.detach() for part in (*parts, *slopes)])
    for one, other in zip(*results, strict=True):
        finite = other[other.isfinite()]
        size = 1 + finite.abs().max() if finite.numel() else 1
        near = (one - other).abs() <= torch.finfo(other.dtype).eps ** _SHARE * size
        if not (near | ~(one.isfinite() | other.isfinite())).all():
            raise RecordingError("the recorded derivatives are not those of the recorded model")


def _recorded(found: RecordedInformation, global_: Tensor, local: Tensor) -> list[Tensor]:
    return [*found.look(global_, local), found.gradient(global_, local), *found.blocks(global_, local)]


def _passed(recording: Recording, global_: Tensor, local: Tensor) -> list[Tensor]:
    slopes = first_derivatives(recording, global_, local)
    blocks = slopes.blocks()
    return [slopes.in_local, blocks.tail, slopes.in_local, *blocks]
