r"""A log joint recorded once as a list of tensor operations, to be evaluated many times.

A run of a Pyro model is mostly Python: handlers, distributions, checks. For small data that takes longer than the
arithmetic. So a fit records the operations of one run and repeats these; whatever depends on the data alone is computed
while recording, what is computed twice is kept once, and :mod:`~laplace_amort.autodiff.simplify` does the algebra.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from laplace_amort.autodiff.constants import Seen
from laplace_amort.autodiff.operations import Operations
from laplace_amort.autodiff.points import nearby
from laplace_amort.autodiff.recorder import InPlaceError, Recorder, nan_unless
from laplace_amort.errors import LaplaceAmortError, RecordingError
from laplace_amort.types import Density

__all__ = ["Recording", "record"]

_aten: Any = torch.ops.aten


# Value and gradients may differ by this power of the rounding error: sums in another order, but no other function.
_SHARE = 0.6
# Points at which a recording is compared with what it was recorded from: shares of a normal deviate from where it was.
_COMPARED = (0.05, 0.5)


class DerivativesOf(Protocol):
    """What gives the derivatives of a log joint without passes back."""

    def gradient(self, global_: Tensor, local: Tensor) -> Tensor:
        """Return the gradient in the units, ``(N, k)``."""

    def look(self, global_: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient in the units ``(N, k)`` and the tails ``(N, k, k)``."""

    def blocks(self, global_: Tensor, local: Tensor) -> Any:
        """Return the blocks of the information, which may be NaN or infinite."""


class Recording:
    """What :func:`record` returns; called like the log joint that it was recorded from.

    Differentiable to any order, also in parameters of the model, whose values at the time of a call count. It holds no
    Python that could branch, so ``torch.func.vmap`` maps over it.

    :param Operations operations: what is carried out.
    :param int num_bytes: memory that the results of all operations of one evaluation take.
    :param constants: tensors that were there before, and are constants of the recording or went into these.

    Attribute: ``information``, a recording of its derivatives, where there is one; see
    ``record_information``.
    """

    information: DerivativesOf | None = None

    def __init__(self, operations: Operations, num_bytes: int, constants: Sequence[Seen] = ()) -> None:
        self.operations, self.num_bytes, self.constants = operations, num_bytes, constants

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was seen of tensors of this process."""
        return {**self.__dict__, "constants": ()}

    def __call__(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate at globals ``(d,)`` and units ``(N, k)``; returns a scalar, or what else was recorded."""
        result: Tensor = self.operations.function(global_, local)
        return result

    def __len__(self) -> int:
        """The number of operations."""
        return len(self.operations)

    def parts(self) -> Operations:
        """Return the function whose results are what ``torch.cat`` joined last, without a copy of them.

        :raises RecordingError: if what was recorded is no concatenation.
        """
        graph, parts = self._with_parts()
        graph.output(tuple(parts))
        graph.eliminate_dead_code()
        return Operations(self.operations.constants, graph)

    def sum_of_parts(self) -> Recording:
        """Return the recording of the sum of all that ``torch.cat`` joined last, without a copy of it.

        :raises RecordingError: if what was recorded is no concatenation.
        """
        graph, parts = self._with_parts()
        total, *others = [graph.call_function(_aten.sum.default, (part,)) for part in parts]
        for other in others:
            total = graph.call_function(_aten.add.Tensor, (total, other))
        graph.output(total)
        graph.eliminate_dead_code()
        num_bytes = sum(int(node.meta.get("bytes", 0)) for node in graph.nodes)
        return Recording(Operations(self.operations.constants, graph), num_bytes, self.constants)

    def _with_parts(self) -> tuple[fx.Graph, list[fx.Node]]:
        """A copy of the graph, without its output, and the nodes of what is joined last."""
        graph: Any = fx.Graph()
        joined: Any = graph.graph_copy(self.operations.graph, {})
        claims = []
        while joined.target is nan_unless:
            joined, claim = joined.args
            claims.append(claim)
        if joined.target is not _aten.cat.default:
            raise RecordingError("what was recorded is no concatenation, and has no parts")
        parts = list(joined.args[0])
        for claim in claims:
            parts = [graph.call_function(nan_unless, (part, claim)) for part in parts]
        return graph, parts

    def check(self, log_joint: Density, global_: Tensor, local: Tensor) -> None:
        """Compare value and gradients with those of the log joint itself, at one point.

        :raises RecordingError: if they differ by more than rounding errors.
        """
        for what, difference in _differences(
            _value_and_gradients(self, global_, local), _value_and_gradients(log_joint, global_, local)
        ):
            raise RecordingError(
                f"the {what} of the recorded model differs from that of the model by {difference:.3g}. Does it use "
                "no_grad, or state that changes?"
            )

    def check_mapped(self, points: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Compare value and gradients at many points at once with those at each: torch maps some operations wrongly.

        :param points: globals ``(d,)`` and units ``(N, k)``.
        :raises RecordingError: if they differ by more than rounding errors.
        """
        globals_, locals_ = (torch.stack(parts) for parts in zip(*points, strict=True))
        each = [torch.stack(parts) for parts in zip(*(_value_and_gradients(self, *p) for p in points), strict=True)]
        for what, difference in _differences(_value_and_gradients(torch.func.vmap(self), globals_, locals_), each):
            raise RecordingError(
                f"the {what} of the recorded model at several points at once differs from that at each of them by "
                f"{difference:.3g}: torch.func.vmap is wrong for one of its operations"
            )


def record(log_joint: Density, global_: Tensor, local: Tensor) -> Recording:
    r"""Record the operations of one evaluation, and check that they are those of any other.

    Do not use it for a log joint that depends on anything else that changes, such as data in place: data are constants
    of the recording. Parameters, tensors that require a gradient, are not. Where the log joint raises since a
    factorization fails, or since a distribution refuses its parameters or a value, the recording is NaN.

    :param log_joint: of globals ``(d,)`` and units ``(N, k)``; returns a scalar, or any tensor.
    :param Tensor global_: where to record, ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :raises RecordingError: if the log joint is seen to branch on the value of an argument (``.tolist()`` and NumPy are
        not seen), has shapes that follow from such values, or if at two other points its value or gradients are not
        those of the recording; the message says which.

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
    except (RuntimeError, ValueError) as error:  # of torch: a factorization that fails, an operation that does not map
        raise RecordingError(
            f"the model, or what was recorded of it, fails near the point where it is recorded: {error}"
        ) from error


def _recorded_and_checked(log_joint: Density, global_: Tensor, local: Tensor) -> Recording:
    try:
        recording = _recorded(log_joint, global_, local)
    except InPlaceError:  # through views, as torch itself does in some densities
        recording = _recorded(torch.func.functionalize(log_joint, remove="mutations"), global_, local)
    points = [(nearby(global_, share, 1), nearby(local, share, 2)) for share in _COMPARED]
    for point in points:
        recording.check(log_joint, *point)
    recording.check_mapped(points)  # also that it maps at all: shapes that depend on values do not
    return recording


def _recorded(log_joint: Density, global_: Tensor, local: Tensor) -> Recording:
    recorder = Recorder((global_, local))
    with torch.no_grad(), recorder:
        result = log_joint(*recorder.arguments)
    return Recording(*recorder.finish(result))


def _value_and_gradients(log_joint: Density, global_: Tensor, local: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        copies = [value.detach().clone().requires_grad_() for value in (global_, local)]
        value = log_joint(*copies)
        if not value.requires_grad:
            return [value, *(torch.zeros_like(copy) for copy in copies)]
        return [value.detach(), *torch.autograd.grad(value.sum(), copies, materialize_grads=True)]


def _differences(found: Sequence[Tensor], right: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
    """Yield which of value and gradients differ by more than rounding errors, and by how much."""
    # Data in float64 make a value in float64 of latents in float32, with the rounding errors of these.
    rounding = max(torch.finfo(part.dtype).eps for part in right)
    names = "value", "gradient in the globals", "gradient in the units"
    for what, one, other in zip(names, found, right, strict=True):
        finite = other[other.isfinite()]
        size = 1 + finite.abs().max() if finite.numel() else 1
        same = (one - other).abs() <= rounding**_SHARE * size
        if not (same | ~(other.isfinite() | one.isfinite())).all():
            yield what, float((one - other).abs().max())
