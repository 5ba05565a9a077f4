"""A model that is not recorded, run for many points at once.

There are two ways. ``torch.func.vmap`` maps over a run of the model: Python runs once, and every operation of torch
knows of the points. It does not map over what is written to in place; and it refuses a model whose Python branches on a
latent, which would branch for all points together. The other way is that of Pyro's vectorized particles, with a
dimension of points to the left of all plates. Many models take that as they are; one that indexes or multiplies from
the left, as ``y[unit]`` or ``x @ beta``, does not.

Whichever it is, a comparison tells whether it is right: at a few points, values of all terms and their derivatives must
be those of runs one by one. There are as many points as no dimension of the model has elements, so that none is taken
for another by its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from torch import Tensor

from laplace_amort.autodiff import nearby, watched
from laplace_amort.errors import LaplaceAmortError, RecordingError

__all__ = ["LogJointAtOnce", "ManyPoints", "MappedRuns", "PointsOnTheLeft", "many_points"]

# Points at which runs are compared, at least, and the shares of a normal deviate that they are away from the first.
_LEAST, _AWAY = 3, (0.05, 0.5)
# Values and derivatives may differ by this power of the rounding error, relative to the largest.
_SHARE = 0.6

_Terms = list[tuple[str, tuple[Any, ...], Tensor]]


class ManyPoints(Protocol):
    """How a model takes many points at once."""

    @property
    def num_bytes(self) -> int:
        """Memory that the results of all operations take at one point."""

    def terms(self, model: Any, globals_: Tensor, locals_: Tensor) -> _Terms:
        """Return the terms of a model at globals ``(S, d)`` and units ``(S, N, k)``, by site, each ``(S, *shape)``."""


@dataclass(frozen=True)
class MappedRuns:
    """Map over runs of the model by ``torch.func.vmap``.

    :param int num_bytes: memory that the results of all operations take at one point.
    """

    num_bytes: int = 0

    def terms(self, model: Any, globals_: Tensor, locals_: Tensor) -> _Terms:
        """See :class:`ManyPoints`."""
        sites: list[tuple[str, tuple[Any, ...]]] = []

        def run(global_: Tensor, local: Tensor) -> list[Tensor]:
            found = model.terms(global_, local)
            sites[:] = [(name, plates) for name, plates, _ in found]
            return [values for _, _, values in found]

        mapped: Any = torch.func.vmap(run)
        return [(*site, values) for site, values in zip(sites, mapped(globals_, locals_), strict=True)]


@dataclass(frozen=True)
class PointsOnTheLeft:
    """Run the model with a dimension of points to the left of all plates.

    :param int room: dimensions of the model, to the left of which there is room for that of the points.
    :param tuple shapes: of the terms of each site at one point, in the order of the sites.
    :param int num_bytes: memory that the results of all operations take at one point.
    """

    room: int
    shapes: tuple[torch.Size, ...]
    num_bytes: int = 0

    def terms(self, model: Any, globals_: Tensor, locals_: Tensor) -> _Terms:
        """See :class:`ManyPoints`.

        :raises RecordingError: if they have another shape than at one point, beside the points.
        """
        leading = globals_.reshape(len(globals_), *(1,) * self.room, globals_.shape[-1])
        with pyro.validation_enabled(False):
            found = model.density.terms(model.layout.to_sites(leading, locals_))
        rows = self._rows((values for _, _, values in found), len(globals_))
        return [(name, plates, values) for (name, plates, _), values in zip(found, rows, strict=True)]

    def _rows(self, terms: Iterable[Tensor], num_points: int) -> Iterator[Tensor]:
        for values, shape in zip(terms, self.shapes, strict=True):
            found = (1,) * (self.room + 1 - values.dim()) + values.shape
            wanted = (1,) * (self.room - len(shape)) + shape
            if found[1:] != wanted or found[0] not in (1, num_points):
                raise RecordingError(
                    f"terms of shape {tuple(shape)} come in shape {tuple(values.shape)} for {num_points} points"
                )
            yield values.reshape(found[0], *shape).expand(num_points, *shape)


class LogJointAtOnce:
    """The log joint of a model that takes many points at once.

    :param UnitModel model: the model.
    :param ManyPoints how: how it takes them.
    """

    def __init__(self, model: Any, how: ManyPoints) -> None:
        self.model, self.how, self.num_bytes = model, how, how.num_bytes

    def __call__(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate at globals ``(d,)`` and units ``(N, k)``; returns a scalar."""
        return self.model.log_joint(global_, local)

    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate at globals ``(S, d)`` and units ``(S, N, k)``, as ``(S,)``."""
        found = self.model.density_terms_at(self.how, globals_, locals_)
        total, *others = (values.reshape(len(globals_), -1).sum(1) for _, _, values in found)
        return sum(others, total)


class _Trial(NamedTuple):
    """A model, and points at which ways to take many of them are tried.

    :param UnitModel model: not recorded.
    :param Tensor globals_: ``(S, d)``.
    :param Tensor locals_: ``(S, N, k)``.
    """

    model: Any
    globals_: Tensor
    locals_: Tensor

    def num_bytes(self, how: ManyPoints) -> int:
        """Return the memory that a way takes at one point, if it is right.

        :raises RecordingError: if it is not, with the reason.
        """
        try:
            run = watched(lambda *points: how.terms(self.model, *points), self.globals_, self.locals_)
            if run.looked:
                raise RecordingError(f"its Python would look at a latent of all points together ({run.looked})")
            _compare(self.model, how, self.globals_, self.locals_)
        except RecordingError:
            raise
        except Exception as error:  # whatever shapes that do not fit may raise
            # What the model's own messages say is of runs at one point; here it is torch who knows.
            cause = error.__cause__ if isinstance(error, LaplaceAmortError) and error.__cause__ else error
            raise RecordingError(str(cause).partition("\n")[0] or type(cause).__name__) from error
        return run.num_bytes // len(self.globals_)


def many_points(model: Any, global_: Tensor, local: Tensor) -> ManyPoints:
    """Return how a model takes many points at once.

    :param UnitModel model: not recorded.
    :param Tensor global_: near which runs are compared, ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :raises RecordingError: if it does not take them, with the reason.
    """
    single = [values for _, _, values in model.terms(global_, local)]
    trial = _Trial(model, *_nearby_points(global_, local, _number_unlike(_sizes_of_all(model, single))))
    try:
        return MappedRuns(trial.num_bytes(MappedRuns()))
    except RecordingError as error:
        mapped = error
    room = max([model.density.max_plate_nesting, *(values.dim() for values in single)])
    on_the_left = PointsOnTheLeft(room, tuple(values.shape for values in single))
    try:
        return PointsOnTheLeft(room, on_the_left.shapes, trial.num_bytes(on_the_left))
    except RecordingError as error:
        raise RecordingError(f"{error} ({_first_sentence(mapped)})") from error


def _first_sentence(error: RecordingError) -> str:
    return str(error).partition(". ")[0]


def _number_unlike(sizes: set[int]) -> int:
    """A number of points that is the size of nothing else."""
    return next(number for number in range(_LEAST, _LEAST + len(sizes) + 1) if number not in sizes)


def _sizes_of_all(model: Any, terms: list[Tensor]) -> set[int]:
    """The sizes of all dimensions of a model that are seen from outside."""
    sites = model.density.sites.values()
    layout = model.layout
    of_sites = {size for shape in (*(site.shape for site in sites), *(v.shape for v in terms)) for size in shape}
    return {layout.global_dim, layout.local_dim, layout.num_units, *of_sites, *_sizes_of((model.args, model.kwargs))}


def _nearby_points(global_: Tensor, local: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Points of which no two are alike."""
    shares = [_AWAY[i % len(_AWAY)] for i in range(number)]
    globals_ = [nearby(global_, share, 2 * i) for i, share in enumerate(shares)]
    locals_ = [nearby(local, share, 2 * i + 1) for i, share in enumerate(shares)]
    return torch.stack(globals_), torch.stack(locals_)


def _sizes_of(value: Any) -> Iterator[int]:
    """The sizes of all dimensions of data, however they are packed."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        yield from shape
    elif isinstance(value, Mapping):
        yield from _sizes_of(list(value.values()))
    elif isinstance(value, list | tuple):
        yield len(value)
        for item in value:
            yield from _sizes_of(item)
    elif isinstance(value, int):
        yield value


def _compare(model: Any, how: ManyPoints, globals_: Tensor, locals_: Tensor) -> None:
    """Compare all terms, and derivatives of a weighted sum of them, with those of runs one by one.

    :raises RecordingError: if they differ by more than rounding errors.
    """
    leaves = list(model.density.parameters().values())
    together = _rows_and_gradients(lambda *points: _joined(model, how, *points), globals_, locals_, leaves)
    parts = [
        _rows_and_gradients(lambda g, y: _joined(model, how, g, y), globals_[i : i + 1], locals_[i : i + 1], leaves)
        for i in range(len(globals_))
    ]
    apart = [torch.cat(column) for column in zip(*(part[:3] for part in parts), strict=True)]
    apart += [torch.stack(column).sum(0) for column in zip(*(part[3:] for part in parts), strict=True)]
    names = [
        "values",
        "gradients in the globals",
        "gradients in the units",
        *(["gradients in parameters"] * len(leaves)),
    ]
    for name, found, right in zip(names, together, apart, strict=True):
        finite = right[right.isfinite()]
        size = 1 + finite.abs().max() if finite.numel() else 1
        same = (found - right).abs() <= torch.finfo(right.dtype).eps ** _SHARE * size
        if not (same | ~(found.isfinite() | right.isfinite())).all():
            raise RecordingError(
                f"the {name} of several points at once differ from those of one at a time by "
                f"{float((found - right).abs().max()):.3g}"
            )


def _joined(model: Any, how: ManyPoints, globals_: Tensor, locals_: Tensor) -> Tensor:
    """All terms, ``(S, n)``; of one point by a run as it always is."""
    found = [values for _, _, values in model.density_terms_at(how, globals_, locals_)]
    return torch.cat([values.reshape(len(globals_), -1) for values in found], dim=1)


def _rows_and_gradients(function: Any, globals_: Tensor, locals_: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        points = [globals_.detach().requires_grad_(), locals_.detach().requires_grad_()]
        rows = function(*points)
        generator = torch.Generator().manual_seed(0)
        weights = (0.5 + torch.rand(rows.shape[1], generator=generator, dtype=torch.float64)).to(rows)
        gradients = torch.autograd.grad((rows * weights).sum(), [*points, *leaves], materialize_grads=True)
    return [rows.detach(), *(part.detach() for part in gradients)]
