"""Runs of a Pyro model: the one file that traces models."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from laplace_amort.autodiff import Arithmetic, AsWritten, nearby
from laplace_amort.model import messages
from laplace_amort.model.arguments import arrays_in, as_given, as_tensors, named, refuse_no_numbers
from laplace_amort.model.densities import smooth
from laplace_amort.model.handlers import Indices, no_open_plates, ran_at
from laplace_amort.model.impossible import refuse_impossible_data
from laplace_amort.model.imputed import (
    Imputation,
    alternatives,
    first_difference,
    is_imputed,
    observed_part,
    refuse_discrete,
)
from laplace_amort.model.missing import completed, is_data
from laplace_amort.model.sites import init_to_zero, transform_of

__all__ = ["ModelRuns", "evaluate"]

Door = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]

# How far from zero it is seen what a term depends on, and what a model may raise there.
_AWAY = 0.5, 1.5
_NUMERICAL = RuntimeError, ValueError, IndexError, ArithmeticError


def evaluate(trace: Any) -> None:
    """Compute the log densities of all sites of a trace, of what is missing none.

    :param trace: of a run of a model; its data are completed, and its distributions made smooth.
    :raises ModelError: naming a site whose data have a dtype that its density cannot take.
    """
    for node in trace.nodes.values():
        if node["type"] == "sample":
            if node["is_observed"] and is_data(node):
                node["value"] = completed(node)
            node["fn"] = smooth(node["fn"])
    with messages.explained(lambda error: messages.of_density(error, trace)):
        trace.compute_log_prob(lambda name, node: not is_imputed(node))


class ModelRuns:
    """A Pyro model at given arguments, to be run: hidden from every handler outside, such as the SVI trace.

    :param model: a Pyro model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param indices: subsample indices by plate name; a plate that is not among them is not to draw any.

    Attributes: ``arithmetic``, in which it is run; and ``kept``, the parts of sites unobserved by ``obs_mask`` that are
    latents, because something depends on them; ``door``, what its arguments pass through, which makes tensors of arrays
    where it does not run with these.
    """

    arithmetic: Arithmetic = AsWritten()

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], indices: Mapping[str, Tensor]
    ) -> None:
        self.model, self.args, self.kwargs, self.indices = model, args, kwargs, dict(indices)
        self._first_run: Any = None
        self.kept = frozenset[str]()
        self.door: Door = as_given

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was seen of a run, from copies too: their arguments may be others."""
        return {**self.__dict__, "_first_run": None}

    def given(self, *args: Any, **kwargs: Any) -> Self:
        """Return the same for other arguments of the same sizes, without looking for its sites again."""
        other = copy.copy(self)
        other.args, other.kwargs = self.door(args, kwargs)
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
        refuse_impossible_data(trace, self._run_beside, named(self.model, self.args, self.kwargs))
        needed = {observed_part(name) for name in self.kept}
        for node in messages.observed(trace):  # most need not be kept any longer
            if node["name"] not in needed:
                trace.remove_node(node["name"])

    def parameters(self) -> dict[str, Tensor]:
        """Return the model's own parameters (``pyro.param``, weights of modules) by name: the unconstrained leaves.

        They are those of one run, which is made once.
        """
        params = {name: node["value"] for name, node in self._first().nodes.items() if node["type"] == "param"}
        leaves = {name: value.unconstrained() for name, value in params.items()}
        return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def parameter_shape(self, name: str) -> torch.Size:
        """Return the shape of a parameter of the model, constrained."""
        shape: torch.Size = self._first().nodes[name]["value"].shape
        return shape

    def _run_first(self, indices: Indices) -> Any:
        """Trace the model at zero, with tensors for arrays where it does not run with these, or observes them.

        :raises ModelError: if it does not run with tensors either, and has arguments of which there are none.
        """
        if not any(arrays_in([self.args, self.kwargs])):
            return self._run_at_zero(indices)
        with contextlib.suppress(Exception):  # whatever a model raises that is written for tensors
            trace = self._run_at_zero(indices)
            if all(isinstance(node["value"], Tensor) for node in messages.observed(trace)):
                return trace
        arguments = named(self.model, self.args, self.kwargs)
        self.door = as_tensors
        self.args, self.kwargs = self.door(self.args, self.kwargs)
        try:
            return self._run_at_zero(indices)
        except Exception:
            refuse_no_numbers(arguments)
            raise

    def _keep_what_matters(self, trace: Any) -> bool:
        """Keep as latents what ``obs_mask`` hides where something depends on it; by evidence, in other runs.

        :param trace: of a run without.
        :return: whether there is any.
        :raises ModelError: if it is discrete.
        """
        left_out = {name: node for name, node in trace.nodes.items() if is_imputed(node)}
        while found := {name: on for name in left_out if (on := self._dependent_on(left_out[name]))}:
            for name, dependent in found.items():
                refuse_discrete(left_out.pop(name), dependent)
            self.kept = self.kept.union(found)  # on which others that were left out may depend
        return bool(self.kept)

    def _dependent_on(self, node: Any) -> str | None:
        """Return the name of a site whose density changes with the value of one that was left out; None if none does.

        It is looked for away from zero, where a coefficient would hide that something depends on its covariate.
        """
        before: dict[str, Tensor] | None = None
        for seed, share in enumerate(_AWAY):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                values = list(alternatives(node["fn"]))
            try:
                before = self._terms_beside(share, seed, {})
            except _NUMERICAL:  # no place to look from
                continue
            for value in values:
                try:
                    now = self._terms_beside(share, seed, {node["name"]: value})
                except _NUMERICAL:
                    return "the model"
                if dependent := first_difference(before, now):
                    return dependent
        return None if before is not None else "the model"

    def _run_beside(self, share: float = _AWAY[0], seed: int = 0, imputed: Imputation | None = None) -> Any:
        """Trace the model at a fixed random point beside zero; the latents have a graph."""

        def init(site: Any) -> Tensor:
            transform = transform_of(site)
            value: Tensor = transform(nearby(transform.inv(init_to_zero(site)), share, seed))
            return value.detach().requires_grad_()

        with torch.random.fork_rng(devices=[]), torch.enable_grad(), pyro.validation_enabled(False):
            torch.manual_seed(seed)  # of a plate that subsamples
            return self._run(InitMessenger(init), Indices(self.indices, strict=False), imputed)

    def _terms_beside(self, share: float, seed: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the log joint beside zero, with these values of what was left out."""
        trace = self._run_beside(share, seed, Imputation(self.kept, values))
        with self.arithmetic, torch.no_grad(), pyro.validation_enabled(False):
            evaluate(trace)
        return {name: node["log_prob"] for name, node in trace.nodes.items() if "log_prob" in node}

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

    def _run(self, handler: Messenger, indices: Indices | None = None, imputed: Imputation | None = None) -> Any:
        """Trace one run of the model under ``handler``, hidden from every handler outside."""
        imputed = Imputation(self.kept) if imputed is None else imputed
        indices = Indices(self.indices, strict=True) if indices is None else indices
        args, kwargs = self.arithmetic.of((self.args, self.kwargs))
        with no_open_plates(), poutine.block(), self.arithmetic, indices, handler, imputed:
            tracer, call = poutine.trace(self.model), (self.model, args, kwargs)
            with messages.explained(lambda error: messages.of_run(error, tracer.trace, *call)):
                return tracer.get_trace(*args, **kwargs)
