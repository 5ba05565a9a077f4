"""The log joint density of an existing Pyro model, as a function of its unconstrained latents.

This is the first room that knows Pyro: sites, plates, supports, scales and subsample indices. The rooms below it know
tensors only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_mean
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.transforms import Transform

from laplace_amort.autodiff import Arithmetic
from laplace_amort.errors import ModelError
from laplace_amort.model.guide_sites import refuse_subsampled, sample_images
from laplace_amort.model.handlers import Feed, Indices, Uncondition, subsampled_plates
from laplace_amort.model.imputed import is_imputed, observed_part, whole_of
from laplace_amort.model.missing import as_missing_as
from laplace_amort.model.packing import check_names, listed, pack, unpack
from laplace_amort.model.runs import ModelRuns, evaluate
from laplace_amort.model.sites import (
    feasible,
    find_sites,
    plates_of,
    refuse_boundary,
    scaled_sites,
    subsample_scale_of,
    transform_of,
)

__all__ = ["LogJoint"]


class LogJoint(ModelRuns):
    r"""The log joint density :math:`\log p(x(u), z) + \log|\partial x/\partial u|` of a Pyro model, in unconstrained u.

    The model is run as it is: scales, masks, ``pyro.factor`` and model-side ``pyro.param`` act, and the run is
    invisible to enclosing handlers (the SVI trace, the plate of vectorized particles). Where a site lies in a
    subsampled plate, the log-Jacobian is scaled with the plate as the density is; a mask or a ``poutine.scale`` leaves
    it alone, because it changes the density and not the coordinates. Pyro's own automatic guides agree.

    What ``obs_mask`` hides of a site is no latent, unless something else depends on it: its density integrates to one.
    Values under a mask are not looked at, whatever they are.

    Do not use it for a model with discrete latents: sum them out first.

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
        super().__init__(model, args, kwargs, indices)
        handler = Indices(self.indices, strict=False)
        trace = self._run_first(handler)
        if self._keep_what_matters(trace):
            trace = self._run_at_zero(handler)
        self._first_run = trace
        self.imputed = tuple(name for name, node in trace.nodes.items() if is_imputed(node))
        self.sites = find_sites(trace)
        self.size = sum(site.shape.numel() for site in self.sites.values())
        self.subsampled_plates = subsampled_plates(trace, handler.given)
        frames = [frame for node in trace.nodes.values() for frame in node.get("cond_indep_stack", ())]
        self.max_plate_nesting = max((-frame.dim for frame in frames if frame.dim is not None), default=0)

    def given(self, *args: Any, **kwargs: Any) -> Self:
        """Return the same for other arguments of the same sizes, without looking for its sites again."""
        other = super().given(*args, **kwargs)
        # Bounds of supports may come with the arguments: they are looked at in each run.
        changing = {name: replace(site, transform=None, bounds=()) for name, site in self.sites.items() if site.bounds}
        other.sites = {**self.sites, **changing}
        return other

    def with_supports(self) -> Self:
        """Return the same with the supports as they are at these arguments, by a run that is made once."""
        other = copy.copy(self)
        with self.arithmetic:
            other.sites = find_sites(self._first())
        return other

    def under(self, arithmetic: Arithmetic) -> LogJoint:
        """Return the same with all runs, transforms and densities in another arithmetic."""
        other = copy.copy(self)
        other.arithmetic = arithmetic
        return other.with_supports()

    @property
    def scaled(self) -> list[str]:
        """Names of the sites that count with a weight (``poutine.scale``) beside that of a minibatch."""
        return scaled_sites(self._run_at_zero(Indices(self.indices, strict=True)))

    def __repr__(self) -> str:
        return f"LogJoint of {self.size} unconstrained elements: {listed(self.sites)}"

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

    def evaluate(self, unconstrained: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the log joint density at unconstrained values of every site; like a call, without packing."""
        total, *others = (values.sum() for _, _, values in self.terms(unconstrained))
        return sum(others, total)

    def terms(self, unconstrained: Mapping[str, Tensor]) -> list[tuple[str, tuple[Any, ...], Tensor]]:
        """Evaluate the terms that the log joint density is the sum of, at unconstrained values of every site.

        :param unconstrained: by site.
        :return: for each site that has a density, and for each log-Jacobian: the name of the site, the frames of its
            vectorized plates, and a term for each element of its batch shape, scales and masks applied.
        """
        feed = Feed(unconstrained, self.sites, self.kept)
        with self.arithmetic:
            trace = self._run_whole(feed)
            evaluate(trace)
        nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and "log_prob" in node]
        found = [(node["name"], plates_of(node), node["log_prob"]) for node in nodes]
        for name, log_jacobian in feed.log_jacobians.items():
            plates = plates_of(trace.nodes[name])
            found.append((name, plates, subsample_scale_of(plates) * log_jacobian))
        return found

    def draw_data(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draw all observed sites from the model, and latents that are not given on the way.

        It draws by torch's generator. Scales and masks do not change what is drawn.

        :param values: constrained values of some latent sites, such as the globals.
        :return: by site.
        :raises ModelError: if the data are, or are part of, a ``pyro.factor``, which nothing can be drawn from.
        """
        other = copy.copy(self)
        other.model = poutine.condition(Uncondition()(self.model), data=dict(values))
        with torch.no_grad(), pyro.validation_enabled(False):
            drawn: Any = other._run(Messenger())
        observed = {name: node for name, node in drawn.nodes.items() if node.get("infer", {}).get("was_observed")}
        for name, node in observed.items():
            if isinstance(node["fn"], dist.Unit):
                raise ModelError(f"site '{name}' is a pyro.factor, which no data can be drawn from")
        return {name: as_missing_as(node["infer"]["obs"], node) for name, node in observed.items()}

    def simulated(self, values: Mapping[str, Tensor]) -> LogJoint:
        """Return the log joint of the same model for data that are drawn from it; see :meth:`draw_data`."""
        return self.with_data(self.draw_data(values))

    def with_data(self, data: Mapping[str, Tensor]) -> LogJoint:
        """Return the log joint of the same model for other values of its observed sites."""
        other = copy.copy(self)
        other.model = poutine.condition(Uncondition()(self.model), data=dict(data))
        return other

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Concatenate unconstrained values of all sites into a vector ``(D,)``, in the order of the sites."""
        return pack(self.sites, values)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Split a packed ``(*, D)`` into unconstrained values per site.

        Leading dimensions are those of enclosing plates, such as Pyro's vectorized particles ``(P, 1)``; they broadcast
        against the batch shape of each site, so that a site of shape ``(N,)`` comes out as ``(P, N)``.
        """
        return unpack(self.sites, packed)

    def constrain(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the constrained value of every site, for a packed ``(*, D)``; batched as by :meth:`unpack`."""
        return self.to_constrained(self.unpack(packed))

    def to_constrained(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the constrained value of every site from its unconstrained one."""
        with self.arithmetic:
            transforms = self._transforms(Feed(unconstrained, self.sites))
            values = {name: transform(unconstrained[name]) for name, transform in transforms.items()}
            return {
                name: self._with_seen(name, value) if name in self.kept else value for name, value in values.items()
            }

    def _with_seen(self, name: str, value: Tensor) -> Tensor:
        """Put what was observed in the place of what stands for it in a latent that ``obs_mask`` made."""
        node = self._first().nodes[observed_part(name)]
        seen = node["mask"].reshape(node["mask"].shape + (1,) * node["fn"].event_dim)
        return torch.where(seen, node["value"].to(value), value)

    @property
    def partly_observed(self) -> list[str]:
        """Names of the sites of which ``obs_mask`` hides a part."""
        return [whole_of(name) for name in (*self.imputed, *self.kept)]

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the packed vector ``(D,)`` of unconstrained values, for constrained values of every site."""
        return self.pack(self.to_unconstrained(values))

    def to_unconstrained(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unconstrained value of every site from its constrained one.

        :raises ModelError: if a value lies outside the support of its site, or on its boundary.
        """
        check_names(self.sites, values)
        with self.arithmetic:
            transforms = self._transforms(poutine.condition(data=dict(values)))
            unconstrained = {name: transform.inv(values[name]) for name, transform in transforms.items()}
        for name, value in unconstrained.items():
            refuse_boundary(name, values[name], value)
        return unconstrained

    def initial(self, init_loc_fn: Callable[..., Any] = init_to_mean) -> Tensor:
        """Return a packed start ``(D,)``, by one of Pyro's ``init_to_*`` strategies.

        The default is the prior mean, given the means of the sites before it, because Pyro's ``init_to_median`` takes
        the median of 15 draws: with a vague prior, somewhere else each time and far from anything. Where a mean does
        not exist, it is that median all the same.
        """
        return self.pack(self.unconstrained_in(self.prototype(init_loc_fn)))

    def unconstrained_in(self, trace: Any) -> dict[str, Tensor]:
        """Return the unconstrained value of every site in a trace of the model, as :meth:`prototype` returns it."""
        nodes = {name: trace.nodes[name] for name in self.sites}
        with self.arithmetic:
            return {name: transform_of(node).inv(node["value"]).detach() for name, node in nodes.items()}

    def prototype(self, init_loc_fn: Callable[..., Any] = init_to_mean) -> Any:
        """Return a trace of the model at the start that :meth:`initial` gives."""
        return self._run_whole(InitMessenger(feasible(init_loc_fn)))

    def trace_at(self, unconstrained: Mapping[str, Tensor]) -> Any:
        """Return a trace of the model at unconstrained values of every site."""
        with self.arithmetic:
            return self._run_whole(Feed(unconstrained, self.sites))

    def log_jacobian(self, packed: Tensor) -> Tensor:
        r"""Return :math:`\log|\partial x/\partial u|` at a packed ``(D,)``, a scalar; without subsampling factors."""
        unconstrained, total = self.unpack(packed), packed.new_zeros(())
        for name, transform in self._transforms(Feed(unconstrained, self.sites)).items():
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
        at = Feed(unconstrained, self.sites)
        nodes = self._run_whole(at).nodes if self.imputed or any(site.weighted for site in self.sites.values()) else {}
        return sample_images(self.sites, self._transforms(at), unconstrained, plates, nodes)

    def _transforms(self, at: Messenger) -> dict[str, Transform]:
        """The transforms of all sites; of a support that depends on other latents, a run under a handler tells."""
        transforms = {name: site.transform for name, site in self.sites.items() if site.transform is not None}
        if len(transforms) == len(self.sites):
            return transforms
        nodes = self._run_whole(at).nodes
        return {name: transform_of(nodes[name]) for name in self.sites}

    def _run_whole(self, handler: Messenger) -> Any:
        """Trace the model, and refuse a run that left out latent sites."""
        trace = self._run(handler)
        changed = sorted(set(self.sites) - set(trace.nodes))
        if changed:
            raise ModelError(f"the latent sites of the model changed between runs: {changed}; they must be fixed")
        return trace
