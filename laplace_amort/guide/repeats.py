"""Calls of a guide that repeat each other: the model is recorded, and not run in Python in each of them.

A recording is made for good in a fit, where data and model are known to stay. In the steps of an SVI nobody says so:
it is used as long as nothing of a call is seen to differ, and compared with the model now and then for what cannot be
seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from laplace_amort.autodiff import record_information
from laplace_amort.errors import LaplaceAmortError, RecordingError
from laplace_amort.model import Fingerprint, UnitModel

__all__ = ["Repeats"]

# Calls in a row that are the same before the model is recorded, which takes as long as some ten runs of it.
_PATIENCE = 3
# After so many uses a recording is compared with the model: at powers of two, then each time.
_EVERY = 50


class Repeats:
    """What is known of the calls of a guide so far, and the model as a recording once they repeat each other.

    Attribute: ``not_recorded``, why the model is run in every call; empty while it need not be.
    """

    def __init__(self) -> None:
        self.not_recorded = ""
        self._gave_up = False
        self._patience = _PATIENCE
        self._forget()

    def _forget(self) -> None:
        self._last: Fingerprint | None = None
        self._count = 0  # of calls in a row that were the same
        self._recorded: UnitModel | None = None
        self._parameters: dict[str, Any] = {}
        self._uses = 0

    def find(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loc: Tensor,
        start: Callable[[UnitModel, Tensor], Tensor],
    ) -> UnitModel | None:
        """Return the model of a call as a recording, if there is one that may be used; take note of the call.

        :param model: a Pyro model.
        :param args: positional arguments of the model.
        :param kwargs: its keyword arguments.
        :param Tensor loc: where the globals stand, ``(d,)``.
        :param start: returns units ``(N, k)`` at which a recording may be compared with the model.
        """
        if self._gave_up:
            return None
        now = Fingerprint(model, (args, loc.dtype, loc.device), kwargs)
        if self._last is None or not self._last.matches(now) or not self._is_current():
            if self._recorded is not None:
                self._patience *= 2  # what changes again and again is not worth a recording each time
            self._forget()
            self._last = now
        self._count += 1
        if self._recorded is not None:
            self._uses += 1
            if _is_due(self._uses):
                self._compare(self._recorded, loc, start(self._recorded, loc))
        return self._recorded

    def take(self, unit_model: UnitModel, loc: Tensor, local: Tensor) -> None:
        """Record the model of a call that was not recorded, if there were enough like it.

        :param UnitModel unit_model: the model.
        :param Tensor loc: where to record, ``(d,)``.
        :param Tensor local: ``(N, k)``.
        """
        if self._gave_up or self._last is None or not self._last.complete or self._count < self._patience:
            return
        try:
            with torch.random.fork_rng(devices=[]):
                recorded = unit_model.recorded(loc, local)
        except Exception as error:  # of any kind: a model that runs is not to fail because it cannot be recorded
            self.not_recorded = str(error)
            self._patience *= 4  # it may have been the place
            return
        if recorded.recording is not None:
            with contextlib.suppress(RecordingError):  # passes back do the same
                recorded.recording.information = record_information(recorded.recording, loc, local)
        self._recorded, self.not_recorded = recorded, ""
        read = {id(leaf) for leaf in recorded.recorded_leaves()}
        self._parameters = {name: leaf for name, leaf in _store().items() if id(leaf) in read}

    def _compare(self, recorded: UnitModel, loc: Tensor, local: Tensor) -> None:
        """Compare the recording with the model; where they differ, do without for good."""
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                recorded.compare(loc, local)
        except LaplaceAmortError as error:
            self._forget()
            self._gave_up, self.not_recorded = True, str(error)

    def _is_current(self) -> bool:
        """Whether tensors that the recording was made of, and parameters that it reads, are those of now."""
        if self._recorded is None or self._recorded.recording is None:
            return True
        same = all(_store().get(name) is leaf for name, leaf in self._parameters.items())
        return same and all(seen.unchanged for seen in self._recorded.recording.constants)


def _is_due(uses: int) -> bool:
    """Whether a recording is to be compared with the model, at this use of it."""
    return uses % _EVERY == 0 or (uses < _EVERY and uses & (uses - 1) == 0)


def _store() -> dict[str, Tensor]:
    """The leaves of the parameters that Pyro keeps, by name."""
    leaves: dict[str, Tensor] = pyro.get_param_store()._params
    return leaves
