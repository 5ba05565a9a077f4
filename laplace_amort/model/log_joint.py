"""The log joint density of an existing Pyro model, as a function of its unconstrained latents.

This is the one room that traces Pyro models. It knows sites, plates, supports, scales and subsample indices; the rooms
below it know tensors only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_mean
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.transforms import Transform

from laplace_amort.errors import ModelError
from laplace_amort.model import messages as model_errors
from laplace_amort.model.first_run import FirstRun
from laplace_amort.model.handlers import (
    Feed,
    Indices,
    no_open_plates,
    sample_image,
    subsampled_plates,
    weight_context,
)
from laplace_amort.model.packing import Packing
from laplace_amort.model.sites import (
    IDENTITY,
    LatentSite,
    feasible,
    find_sites,
    init_to_zero,
    plates_of,
    refuse_boundary,
    refuse_subsampled,
    subsample_scale_of,
    transform_of,
)

__all__ = ["LatentSite", "LogJoint"]


class LogJoint:
    r"""The log joint density :math:`\log p(x(u), z) + \log|\partial x/\partial u|` of a Pyro model, in unconstrained u.

    The model is run as it is: scales, masks, ``pyro.factor`` and model-side ``pyro.param`` act, and the run is
    invisible to enclosing handlers (the SVI trace, the plate of vectorized particles). Where a site lies in a
    subsampled plate, the log-Jacobian is scaled with the plate as the density is; a mask or a ``poutine.scale`` leaves
    it alone, because it changes the density and not the coordinates. Pyro's own automatic guides agree.

    Do not use it for a model with discrete latents: sum them out first. Nor where ``obs_mask`` makes latents of
    observations: those that were observed have no density in ``name_unobserved``, and so no curvature.

    :param model: a Pyro model, with continuous latents only and the same latent sites in every run.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :raises ModelError: if a latent is discrete or its support cannot be unconstrained, or if there is no latent.

    The latents are packed in the order in which the model samples them; ``print(log_joint)`` shows it. Calling it takes
    either one mapping from site name to unconstrained value, or tensors that, flattened and concatenated, make up the
    packed vector of ``D`` elements; it returns a scalar. So it fits :func:`~laplace_amort.observed_information`:
    ``observed_information(log_joint, theta, y)``.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(z):
        ...     tau = pyro.sample("tau", dist.Exponential(1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(0., tau))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> log_joint = LogJoint(model, torch.tensor([1., -1.]))
        >>> print(log_joint)
        LogJoint of 3 unconstrained elements: tau (), y (2,)
        >>> log_joint(torch.zeros(()), torch.ones(2))           # tau = exp(0), y = (1, 1)
        tensor(-7.6758)
        >>> log_joint.constrain(torch.zeros(3))
        {'tau': tensor(1.), 'y': tensor([0., 0.])}
    """

    def __init__(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._set_up(model, args, kwargs, {})

    @classmethod
    def at_indices(
        cls, indices: Mapping[str, Tensor], model: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> LogJoint:
        """Like the constructor, with subsample indices, by plate name, fed from the start."""
        log_joint = cls.__new__(cls)
        log_joint._set_up(model, args, kwargs, indices)
        return log_joint

    def _set_up(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], indices: Mapping[str, Tensor]
    ) -> None:
        self.model, self.args, self.kwargs, self.indices = model, args, kwargs, dict(indices)
        handler = Indices(self.indices, strict=False)
        trace = self._run_at_zero(handler)
        self.sites = find_sites(trace)
        self._packing = Packing(self.sites)
        self.size = self._packing.size
        self.subsampled_plates = subsampled_plates(trace, handler.given)
        frames = [frame for node in trace.nodes.values() for frame in node.get("cond_indep_stack", ())]
        self.max_plate_nesting = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
        self._first_run = FirstRun(trace)

    def __repr__(self) -> str:
        return f"LogJoint of {self.size} unconstrained elements: {self._packing}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was seen of a run, from copies too: their arguments may be others."""
        return {**self.__dict__, "_first_run": None}

    def given(self, *args: Any, **kwargs: Any) -> LogJoint:
        """Return the same log joint for other arguments of the same sizes, without looking for its sites again."""
        other = copy.copy(self)
        other.args, other.kwargs = args, kwargs
        return other

    def with_indices(self, **indices: Tensor) -> LogJoint:
        """Return the same log joint with the given subsample indices, one ``(B,)`` tensor per plate name.

        A guide that subsamples opens the plate itself and hands its indices on, so that the guide, this inner run and
        SVI's own run of the model see the same units: ``log_joint.with_indices(units=plate.indices)``.
        """
        other = copy.copy(self)
        other.indices = {**self.indices, **indices}
        if self._first_run is not None and self._first_run.had(indices):
            other._first_run = self._first_run
        return other

    def __call__(self, *values: Any) -> Tensor:
        """Evaluate the log joint density; see the class for ``values``. Returns a scalar."""
        if len(values) == 1 and isinstance(values[0], Mapping):
            packed = self.pack(values[0])
        elif values and all(isinstance(value, Tensor) for value in values):
            packed = torch.cat([value.reshape(-1) for value in values])
        else:
            kinds = [type(value).__name__ for value in values]
            raise TypeError(f"a LogJoint takes one mapping from site name to tensor, or tensors; got {kinds}")
        return self.evaluate(self.unpack(packed))

    def check_data(self) -> None:
        """Refuse data that are impossible wherever the latents are, or NaN.

        :raises ModelError: naming site, index and value.
        """
        self._first().check_data()

    def suspicious_data(self) -> str:
        """Say which observed value lies outside the support of its distribution; nothing if none is seen to.

        Where the log joint is minus infinity, this may tell why. It is a suspicion, and :meth:`check_data` is certain:
        here, a support may depend on a latent, and is that of a single run.
        """
        return model_errors.outside_support(self._run_at_zero())

    def evaluate(self, unconstrained: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the log joint density at unconstrained values of every site; like a call, without packing."""
        trace, log_jacobians = self._run_at(unconstrained)
        try:
            total: Any = trace.log_prob_sum()
        except RuntimeError as error:
            explained = model_errors.of_density(error, trace)
            if explained is None:
                raise
            raise explained from error
        for name, log_jacobian in log_jacobians.items():
            total = total + subsample_scale_of(plates_of(trace.nodes[name])) * log_jacobian.sum()
        return total

    def terms(self, unconstrained: Mapping[str, Tensor]) -> list[tuple[str, tuple[Any, ...], Tensor]]:
        """Evaluate the terms that the log joint density is the sum of, at unconstrained values of every site.

        :param unconstrained: by site.
        :return: for each site that has a density, and for each log-Jacobian: the name of the site, the frames of its
            vectorized plates, and a term for each element of its batch shape, scales and masks applied.
        """
        trace, log_jacobians = self._run_at(unconstrained)
        trace.compute_log_prob()
        nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and "log_prob" in node]
        densities = [(node["name"], plates_of(node), node["log_prob"]) for node in nodes]
        jacobians = []
        for name, log_jacobian in log_jacobians.items():
            plates = plates_of(trace.nodes[name])
            jacobians.append((name, plates, subsample_scale_of(plates) * log_jacobian))
        return densities + jacobians

    def _run_at(self, unconstrained: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Trace the model there; returns the log-Jacobians of the sites whose coordinates are others as well."""
        trace, feed = self._fed(unconstrained)
        others = {name: part for name, part in feed.log_jacobians.items() if feed.transforms[name] is not IDENTITY}
        return trace, others

    def simulated(self, values: Mapping[str, Tensor]) -> LogJoint:
        """Return the log joint of the same model for data that are drawn from it, and latents that are not given too.

        It draws by torch's generator. Scales and masks do not change what is drawn.

        :param values: constrained values of some latent sites, such as the globals.
        :raises ModelError: if the data are, or are part of, a ``pyro.factor``, which nothing can be drawn from.
        """
        other, free = copy.copy(self), poutine.uncondition(self.model)
        other.model = poutine.condition(free, data=dict(values))
        with torch.no_grad(), pyro.validation_enabled(False):
            drawn: Any = other._run(Messenger())
        observed = {name: node for name, node in drawn.nodes.items() if node.get("infer", {}).get("was_observed")}
        for name, node in observed.items():
            if isinstance(node["fn"], dist.Unit):
                raise ModelError(f"site '{name}' is a pyro.factor, which no data can be drawn from")
        other.model = poutine.condition(free, data={name: node["value"] for name, node in observed.items()})
        return other

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Concatenate unconstrained values of all sites into a vector ``(D,)``, in the order of the sites."""
        return self._packing.pack(values)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Split a packed ``(*, D)`` into unconstrained values per site.

        Leading dimensions are those of enclosing plates, such as Pyro's vectorized particles ``(P, 1)``; they broadcast
        against the batch shape of each site, so that a site of shape ``(N,)`` comes out as ``(P, N)``.
        """
        return self._packing.unpack(packed)

    def constrain(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the constrained value of every site, for a packed ``(*, D)``; batched as by :meth:`unpack`."""
        return self.to_constrained(self.unpack(packed))

    def to_constrained(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the constrained value of every site from its unconstrained one."""
        return {name: transform(unconstrained[name]) for name, transform in self._transforms(unconstrained).items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the packed vector ``(D,)`` of unconstrained values, for constrained values of every site."""
        return self.pack(self.to_unconstrained(values))

    def to_unconstrained(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unconstrained value of every site from its constrained one.

        :raises ModelError: if a value lies outside the support of its site, or on its boundary.
        """
        self._packing.check_names(values)
        transforms = self._fixed_transforms()
        if len(transforms) < len(self.sites):
            trace = self._run_whole(poutine.condition(data=dict(values)))
            transforms = {name: transform_of(trace.nodes[name]) for name in self.sites}
        unconstrained = {name: transforms[name].inv(values[name]) for name in self.sites}
        for name, value in unconstrained.items():
            refuse_boundary(name, values[name], value)
        return unconstrained

    def initial(self, init_loc_fn: Callable[..., Any] = init_to_mean) -> Tensor:
        """Return a packed start ``(D,)``, by one of Pyro's ``init_to_*`` strategies.

        The default is the prior mean, given the means of the sites before it, because Pyro's ``init_to_median`` takes
        the median of 15 draws: with a vague prior, somewhere else each time and far from anything. Where a mean does
        not exist, it is that median all the same.
        """
        return self.packed_in(self.prototype(init_loc_fn))

    def packed_in(self, trace: Any) -> Tensor:
        """Return the packed ``(D,)`` at which a trace of the model was made, as :meth:`prototype` returns it."""
        return self.pack({n: transform_of(trace.nodes[n]).inv(trace.nodes[n]["value"]) for n in self.sites}).detach()

    def prototype(self, init_loc_fn: Callable[..., Any] = init_to_mean) -> Any:
        """Return a trace of the model at the start that :meth:`initial` gives."""
        return self._run_whole(InitMessenger(feasible(init_loc_fn)))

    def parameters(self) -> dict[str, Tensor]:
        """Return the model's own parameters (``pyro.param``, weights of modules) by name: the unconstrained leaves.

        They are those of one run, which is made once.
        """
        return self._first().parameters()

    def log_jacobian(self, packed: Tensor) -> Tensor:
        r"""Return :math:`\log|\partial x/\partial u|` at a packed ``(D,)``, a scalar; without subsampling factors."""
        unconstrained = self.unpack(packed)
        total = packed.new_zeros(())
        for name, transform in self._transforms(unconstrained).items():
            value = unconstrained[name]
            total = total + transform.log_abs_det_jacobian(value, transform(value)).sum()
        return total

    def subsample_scale(self) -> Tensor:
        """Return the subsampling factor ``N / B`` of every packed element, ``(D,)``; all 1 without subsampling.

        Both sizes are those found when this log joint was made. For :func:`~laplace_amort.subsample_information`.
        """
        return torch.cat([torch.full((site.shape.numel(),), site.subsample_scale) for site in self.sites.values()])

    def sample_sites(self, packed: Tensor, plates: Iterable[pyro.plate] = ()) -> dict[str, Tensor]:
        r"""In a guide: make every latent site of the model a deterministic function of one packed draw.

        Each site becomes a ``Delta`` inside the plates that the model has around it. The log-Jacobian of a constrained
        site is a ``pyro.factor`` beside it and not the ``log_density`` of the ``Delta``, because Pyro's
        ``TraceMeanField_ELBO`` drops the latter.

        Not for a subsampled plate: Pyro scales the density of each unit by ``N / B``, and the density of one joint draw
        cannot be scaled by unit. There, sample the globals first and the units in a site of their own inside the plate.

        :param Tensor packed: a draw ``(*, D)``, sampled in the guide at a site with ``infer={"is_auxiliary": True}``.
        :param plates: plates of the model that the guide made itself; the others are made here.
        :return: constrained values per site.
        :raises ModelError: if a site lies in a subsampled plate.
        """
        for site in self.sites.values():
            refuse_subsampled(site)
        return self.sample_values(self.unpack(packed), plates)

    def sample_values(
        self, unconstrained: Mapping[str, Tensor], plates: Iterable[pyro.plate] = ()
    ) -> dict[str, Tensor]:
        """In a guide: like :meth:`sample_sites`, from unconstrained values of every site.

        Where a plate is subsampled, the guide must have made it, and the values must be those of its indices.

        :param unconstrained: values by site, each of the shape of the site, with dimensions of enclosing plates on the
            left.
        :param plates: plates of the model that the guide made itself; the others are made here.
        :return: constrained values per site.
        """
        opened = {plate.name: plate for plate in plates}
        transforms = self._transforms(unconstrained)
        weights = self._weights(unconstrained)
        values = {}
        for name, site in self.sites.items():
            # Weights are nothing to a Delta, but TraceMeanField_ELBO scales and masks the model's density by them.
            values[name] = sample_image(site, transforms[name], unconstrained[name], weights[name], opened)
        return values

    def _fixed_transforms(self) -> dict[str, Transform]:
        """The transforms of the sites whose support depends on no other latent."""
        return {name: site.transform for name, site in self.sites.items() if site.transform is not None}

    def _transforms(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Transform]:
        known = self._fixed_transforms()
        if len(known) == len(self.sites):
            return known
        # A support that depends on other latents, such as Uniform(0, theta), is known only once they are.
        transforms = self._fed(unconstrained)[1].transforms
        return {name: known.get(name, transforms[name]) for name in self.sites}

    def _weights(self, unconstrained: Mapping[str, Tensor]) -> dict[str, AbstractContextManager[Any]]:
        """The ``poutine.scale`` and ``poutine.mask`` that the model has around each site, to enter once."""
        if not any(site.weighted for site in self.sites.values()):
            return {name: nullcontext() for name in self.sites}
        nodes = self._fed(unconstrained)[0].nodes
        # The plates that the guide opens bring their own share of the scale.
        return {
            name: weight_context(nodes[name]["scale"] / subsample_scale_of(plates_of(nodes[name])), nodes[name]["mask"])
            for name in self.sites
        }

    def _first(self) -> FirstRun:
        """Return what a run for these arguments shows: that of set-up, or another if they are others."""
        if self._first_run is None:
            self._first_run = FirstRun(self._run_at_zero())
        return self._first_run

    def _run_at_zero(self, indices: Indices | None = None) -> Any:
        """Trace the model at a point that is always feasible; a draw from a vague prior might overflow the likelihood.

        What is drawn on the way must not change the draws of a guide that makes its LogJoint in every call.
        """
        with torch.random.fork_rng(devices=[]):
            return self._run(InitMessenger(init_to_zero), indices)

    def _fed(self, unconstrained: Mapping[str, Tensor]) -> tuple[Any, Feed]:
        """Trace the model at unconstrained values; returns transforms and log-Jacobians as well."""
        feed = Feed(unconstrained, self.sites)
        return self._run_whole(feed), feed

    def _run_whole(self, handler: Messenger) -> Any:
        """Trace the model, and refuse a run that left out latent sites."""
        trace: Any = self._run(handler)
        self._packing.refuse_change(name for name in self.sites if name in trace.nodes)
        return trace

    def _run(self, handler: Messenger, indices: Indices | None = None) -> poutine.Trace:
        """Trace one run of the model under ``handler``, hidden from every handler outside."""
        indices = Indices(self.indices, strict=True) if indices is None else indices
        with no_open_plates(), poutine.block(), indices, handler:
            tracer = poutine.trace(self.model)
            try:
                return tracer.get_trace(*self.args, **self.kwargs)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                arguments = model_errors.arguments_of(self.model, self.args, self.kwargs)
                explained = model_errors.of_run(error, tracer.trace, arguments)
                if explained is None:
                    raise
                raise explained from error
