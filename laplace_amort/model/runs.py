"""Runs of a Pyro model: the one file that traces models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from laplace_amort.autodiff import Arithmetic, AsWritten
from laplace_amort.model import messages
from laplace_amort.model.handlers import Indices, no_open_plates, ran_at
from laplace_amort.model.sites import init_to_zero

__all__ = ["ModelRuns"]


class ModelRuns:
    """A Pyro model at given arguments, to be run: hidden from every handler outside, such as the SVI trace.

    :param model: a Pyro model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param indices: subsample indices by plate name; a plate that is not among them is not to draw any.

    Attribute: ``arithmetic``, in which it is run.
    """

    arithmetic: Arithmetic = AsWritten()

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], indices: Mapping[str, Tensor]
    ) -> None:
        self.model, self.args, self.kwargs, self.indices = model, args, kwargs, dict(indices)
        self._first_run: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was seen of a run, from copies too: their arguments may be others."""
        return {**self.__dict__, "_first_run": None}

    def given(self, *args: Any, **kwargs: Any) -> Self:
        """Return the same for other arguments of the same sizes, without looking for its sites again."""
        other = copy.copy(self)
        other.args, other.kwargs = args, kwargs
        return other

    def with_indices(self, **indices: Tensor) -> Self:
        """Return the same with the given subsample indices, one ``(B,)`` tensor per plate name.

        A guide that subsamples opens the plate itself and hands its indices on, so that the guide, this inner run and
        SVI's own run of the model see the same units: ``log_joint.with_indices(units=plate.indices)``.
        """
        other = copy.copy(self)
        other.indices = {**self.indices, **indices}
        if self._first_run is not None and ran_at(self._first_run, indices):
            other._first_run = self._first_run
        return other

    def check_data(self) -> None:
        """Refuse data that are impossible wherever the latents are, or NaN.

        :raises ModelError: naming site, index and value.
        """
        trace = self._first()
        messages.refuse_impossible_data(trace)
        for node in messages.observed(trace):  # that need not be kept any longer
            trace.remove_node(node["name"])

    def parameters(self) -> dict[str, Tensor]:
        """Return the model's own parameters (``pyro.param``, weights of modules) by name: the unconstrained leaves.

        They are those of one run, which is made once.
        """
        params = {name: node["value"] for name, node in self._first().nodes.items() if node["type"] == "param"}
        leaves = {name: value.unconstrained() for name, value in params.items()}
        return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def _first(self) -> Any:
        """The trace of a run at these arguments, which is made once."""
        if self._first_run is None:
            self._first_run = self._run_at_zero(Indices(self.indices, strict=True))
        return self._first_run

    def _run_at_zero(self, indices: Indices) -> Any:
        """Trace the model at a point that is always feasible; a draw from a vague prior might overflow the likelihood.

        What is drawn on the way must not change the draws of a guide that makes its LogJoint in every call. The latents
        have a graph, by which it is seen what depends on them.
        """
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return self._run(InitMessenger(lambda site: init_to_zero(site).detach().requires_grad_()), indices)

    def _run(self, handler: Messenger, indices: Indices | None = None) -> Any:
        """Trace one run of the model under ``handler``, hidden from every handler outside."""
        indices = Indices(self.indices, strict=True) if indices is None else indices
        args, kwargs = self.arithmetic.of((self.args, self.kwargs))
        with no_open_plates(), poutine.block(), self.arithmetic, indices, handler:
            tracer, call = poutine.trace(self.model), (self.model, args, kwargs)
            with messages.explained(lambda error: messages.of_run(error, tracer.trace, *call)):
                return tracer.get_trace(*args, **kwargs)
