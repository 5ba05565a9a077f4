"""A model that is not recorded, run for many points at once: with a dimension of points to the left of all plates.

So Pyro vectorizes particles. Many models take that dimension as they are; one that indexes or multiplies from the
left, as ``y[unit]`` or ``x @ beta``, does not. Which it is, a comparison tells: at a few points, values of all terms
and their derivatives must be those of runs one by one. There are as many points as no dimension of the model has
elements, so that none is taken for another by its size. A model whose Python branches on a latent is run one by one: it
would branch for all points together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_amort.autodiff import nearby, watched
from laplace_amort.errors import LaplaceAmortError, RecordingError
from laplace_amort.model.layout import UnitLayout

__all__ = ["PointsOnTheLeft", "points_on_the_left"]

# Points at which runs are compared, at least, and the shares of a normal deviate that they are away from the first.
_LEAST, _AWAY = 3, (0.05, 0.5)
# Values and derivatives may differ by this power of the rounding error, relative to the largest.
_SHARE = 0.6


@dataclass(frozen=True)
class PointsOnTheLeft:
    """How a model takes many points.

    :param int room: dimensions of the model, to the left of which there is room for that of the points.
    :param tuple shapes: of the terms of each site at one point, in the order of the sites.
    :param int num_bytes: memory that the results of all operations take at one point.
    """

    room: int
    shapes: tuple[torch.Size, ...]
    num_bytes: int

    def sites(self, layout: UnitLayout, globals_: Tensor, locals_: Tensor) -> dict[str, Tensor]:
        """Return unconstrained values by site, for globals ``(S, d)`` and units ``(S, N, k)``."""
        return layout.to_sites(globals_.reshape(len(globals_), *(1,) * self.room, globals_.shape[-1]), locals_)

    def rows(self, terms: Iterable[Tensor], num_points: int) -> Iterator[Tensor]:
        """Yield the terms of each site in a shape ``(S, *shape)``.

        :raises RecordingError: if they have another shape than at one point, beside the points.
        """
        for values, shape in zip(terms, self.shapes, strict=True):
            found = (1,) * (self.room + 1 - values.dim()) + values.shape
            wanted = (1,) * (self.room - len(shape)) + shape
            if found[1:] != wanted or found[0] not in (1, num_points):
                raise RecordingError(f"terms of shape {tuple(shape)} come in shape {tuple(values.shape)}")
            yield values.reshape(found[0], *shape).expand(num_points, *shape)


def points_on_the_left(model: Any, global_: Tensor, local: Tensor) -> PointsOnTheLeft:
    """Return how a model takes many points at once.

    :param UnitModel model: not recorded.
    :param Tensor global_: near which runs are compared, ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :raises RecordingError: if it does not take them, with the reason.
    """
    sizes = {*global_.shape, *local.shape, *_sizes_of((model.args, model.kwargs))}
    single = [values for _, _, values in model.terms(global_, local)]
    sizes.update(size for values in single for size in values.shape)
    sizes.update(size for site in model.density.sites.values() for size in site.shape)
    number = next(number for number in range(_LEAST, _LEAST + len(sizes) + 1) if number not in sizes)
    room = max([model.density.max_plate_nesting, *(values.dim() for values in single)])
    how = PointsOnTheLeft(room, tuple(values.shape for values in single), 0)
    globals_, locals_ = _nearby_points(global_, local, number)
    try:
        run = watched(lambda *point: [v for _, _, v in model.density_terms_at(how, *point)], globals_, locals_)
        if run.looked:
            raise RecordingError(f"its Python looks at the value of a latent ({run.looked}), for all points together")
        _compare(model, how, globals_, locals_)
    except LaplaceAmortError:
        raise
    except Exception as error:  # whatever shapes that do not fit may raise
        raise RecordingError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return PointsOnTheLeft(room, how.shapes, run.num_bytes // number)


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


def _compare(model: Any, how: PointsOnTheLeft, globals_: Tensor, locals_: Tensor) -> None:
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


def _joined(model: Any, how: PointsOnTheLeft, globals_: Tensor, locals_: Tensor) -> Tensor:
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
