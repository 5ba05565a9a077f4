"""Conditionals of the units that were found once: weights, moments and draws of one posterior ask for the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laplace_amort.units import Conditionals

__all__ = ["KnownConditionals", "distinct_rows"]

# Numbers that are kept at most: a quarter of a gigabyte in double precision.
_MOST = 2**25
# Globals for each coefficient of a regression.
_EACH = 3


class KnownConditionals:
    """What is known of the units at globals that were asked for before.

    Do not share one between models, nor between searches of different tolerance: it knows nothing but the globals.

    Example::

        >>> asked = []
        >>> def find(globals_):
        ...     asked.append(len(globals_))
        ...     return Conditionals(globals_.unsqueeze(1), globals_[:, None, None], torch.ones(len(globals_), 1) > 0)
        >>> known = KnownConditionals()
        >>> there = known.at(torch.tensor([[1.], [2.]]), find)
        >>> known.at(torch.tensor([[2.], [2.], [3.]]), find).mode.flatten(), asked
        (tensor([2., 2., 3.]), [2, 1])
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._globals: list[Tensor] = []
        self._found: Conditionals | None = None
        self._regression: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is found again."""
        return KnownConditionals().__dict__

    def copy(self) -> KnownConditionals:
        """Return another that knows the same, and learns by itself."""
        other = KnownConditionals()
        other._rows, other._globals, other._found = dict(self._rows), list(self._globals), self._found
        return other

    def at(self, globals_: Tensor, find: Callable[[Tensor], Conditionals]) -> Conditionals:
        """Return the conditionals at globals ``(S, d)``, and look only for those that are new.

        :param Tensor globals_: ``(S, d)``.
        :param find: what finds them at globals ``(M, d)``.
        """
        keys = [row.tobytes() for row in globals_.detach().cpu().numpy()]
        new = {key: place for place, key in enumerate(keys) if key not in self._rows}
        if not new:
            return self._take([self._rows[key] for key in keys])
        asked = globals_[list(new.values())]
        found = find(asked)
        if self._has_room(found):
            self._keep(list(new), asked, found)
            return self._take([self._rows[key] for key in keys])
        if len(new) == len(keys):
            return found
        return find(globals_)

    def predicted(self, globals_: Tensor, otherwise: Tensor) -> Tensor:
        """Guess modes from those that are known, by a regression on the globals and their squares.

        :param Tensor globals_: ``(S, d)``.
        :param Tensor otherwise: the guess ``(S, N, k)`` where the globals lie outside of those that are known, or these
            are few.
        """
        known = None if self._found is None else self._found.found.all(-1)
        if self._found is None or known is None or int(known.sum()) < _EACH * (1 + 2 * globals_.shape[1]):
            return otherwise
        seen = torch.cat(self._globals)
        center, scale = seen.mean(0), seen.std(0).clamp(min=torch.finfo(seen.dtype).tiny)
        z = (seen - center) / scale
        if self._regression is None:
            modes = self._found.mode[known].flatten(1)
            self._regression = torch.linalg.lstsq(_features(z[known]), modes, driver="gelsd").solution
        new = (globals_ - center) / scale
        inside = ((new >= z.amin(0)) & (new <= z.amax(0))).all(-1)
        guess = (_features(new) @ self._regression).reshape(otherwise.shape)
        return torch.where(inside[:, None, None], guess, otherwise)

    def _has_room(self, found: Conditionals) -> bool:
        each = sum(part[0].numel() for part in found) if len(found.mode) else 0
        return (len(self._rows) + len(found.mode)) * each <= _MOST

    def _keep(self, keys: list[bytes], globals_: Tensor, found: Conditionals) -> None:
        self._globals.append(globals_)
        self._regression = None
        self._rows.update(zip(keys, range(len(self._rows), len(self._rows) + len(keys)), strict=True))
        old = self._found
        self._found = found if old is None else Conditionals(*map(torch.cat, zip(old, found, strict=True)))

    def _take(self, rows: list[int]) -> Conditionals:
        assert self._found is not None
        if rows == list(range(len(self._found.mode))):
            return self._found
        index = torch.tensor(rows, dtype=torch.long, device=self._found.mode.device)
        return Conditionals(*(part.index_select(0, index) for part in self._found))


def _features(z: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(z[:, :1]), z, z**2], 1)


def distinct_rows(globals_: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that differ, and which of them each row is.

    :param Tensor globals_: ``(S, d)``.
    """
    if not globals_.shape[1]:  # of which torch makes no rows
        return globals_[:1], torch.zeros(len(globals_), dtype=torch.long, device=globals_.device)
    distinct, inverse = torch.unique(globals_, dim=0, return_inverse=True)
    return distinct, inverse
