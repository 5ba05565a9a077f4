"""The log joint density of an existing Pyro model, as a function of its unconstrained latents.

This is the one room that traces Pyro models. It knows sites, plates, supports, scales and subsample indices; the rooms
below it know tensors only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_mean
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, am_i_wrapped
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import Transform

from laplace_amort.errors import ModelError
from laplace_amort.sites import (
    IDENTITY,
    LatentSite,
    find_sites,
    init_to_zero,
    log_abs_det,
    plates_of,
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
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.indices: dict[str, Tensor] = {}
        # Any feasible point shows the sites; a draw from a vague prior might overflow the likelihood. What it draws on
        # the way must not change the draws of a guide that makes its LogJoint in every call.
        with torch.random.fork_rng(devices=[]):
            trace = self._run(InitMessenger(init_to_zero), setup=True)
        self.sites = find_sites(trace)
        self.size = sum(site.shape.numel() for site in self.sites.values())

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.name} {tuple(site.shape)}" for site in self.sites.values())
        return f"LogJoint of {self.size} unconstrained elements: {sites}"

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
        feed = _Feed(self.unpack(packed))
        trace = self._run(feed)
        if set(feed.log_jacobians) != set(self.sites):
            changed = sorted(set(feed.log_jacobians) ^ set(self.sites))
            raise ModelError(f"the latent sites of the model changed between runs: {changed}; they must be fixed")
        total: Any = trace.log_prob_sum()
        for name, log_jacobian in feed.log_jacobians.items():
            total = total + subsample_scale_of(plates_of(trace.nodes[name])) * log_jacobian.sum()
        return total

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Concatenate unconstrained values of all sites into a vector ``(D,)``, in the order of the sites."""
        self._check_names(values)
        for name, site in self.sites.items():
            if values[name].shape != site.shape:
                raise ModelError(
                    f"site '{name}' has unconstrained shape {tuple(site.shape)}, got {tuple(values[name].shape)}"
                )
        return torch.cat([values[name].reshape(-1) for name in self.sites])

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Split a packed ``(*, D)`` into unconstrained values per site.

        Leading dimensions are those of enclosing plates, such as Pyro's vectorized particles ``(P, 1)``; they broadcast
        against the batch shape of each site, so that a site of shape ``(N,)`` comes out as ``(P, N)``.
        """
        if packed.shape[-1:] != (self.size,):
            raise ModelError(
                f"expected {self.size} unconstrained elements in the order "
                f"{', '.join(f'{s.name} {tuple(s.shape)}' for s in self.sites.values())}; got shape "
                f"{tuple(packed.shape)}"
            )
        values = {}
        leading = packed.shape[:-1]
        for name, site in self.sites.items():
            plates = len(site.shape) - site.event_dim
            if any(size != 1 for size in leading[max(len(leading) - plates, 0) :]):
                raise ModelError(
                    f"leading shape {tuple(leading)} of the packed values overlaps the batch shape "
                    f"{tuple(site.shape[:plates])} of site '{name}'. Make room for it:\n"
                    f"    packed.reshape({tuple(leading)} + (1,) * {plates} + (-1,))"
                )
            shape = torch.broadcast_shapes(site.shape, leading + (1,) * site.event_dim)
            values[name] = packed[..., site.slice].reshape(shape)
        return values

    def constrain(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the constrained value of every site, for a packed ``(*, D)``; batched as by :meth:`unpack`."""
        unconstrained = self.unpack(packed)
        return {name: transform(unconstrained[name]) for name, transform in self._transforms(unconstrained).items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the packed vector ``(D,)`` of unconstrained values, for constrained values of every site."""
        self._check_names(values)
        trace: Any = self._run(poutine.condition(data=dict(values)))
        unconstrained = {name: transform_of(trace.nodes[name]).inv(values[name]) for name in self.sites}
        for name, value in unconstrained.items():
            if not value.isfinite().all():
                support = trace.nodes[name]["fn"].support
                raise ModelError(f"the value of site '{name}' lies outside its support {support}, or on its boundary")
        return self.pack(unconstrained)

    def initial(self, init_loc_fn: Callable[..., Any] = init_to_mean) -> Tensor:
        """Return a packed start ``(D,)``, by one of Pyro's ``init_to_*`` strategies.

        The default is the prior mean, given the means of the sites before it, because Pyro's ``init_to_median`` takes
        the median of 15 draws: with a vague prior, somewhere else each time and far from anything. Where a mean does
        not exist, it is that median all the same.
        """

        def init(site: Any) -> Tensor:
            try:
                return init_loc_fn(site)
            except NotImplementedError:  # nothing to sample from: an improper prior
                return init_to_zero(site)

        trace = self._run(InitMessenger(init))
        return self.pack({n: transform_of(trace.nodes[n]).inv(trace.nodes[n]["value"]) for n in self.sites}).detach()

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
        opened = {plate.name: plate for plate in plates}
        unconstrained = self.unpack(packed)
        transforms = self._transforms(unconstrained)
        weights = self._weights(unconstrained)
        values = {}
        for name, site in self.sites.items():
            value = transforms[name](unconstrained[name])
            with _Plates(site, opened):
                # Weights are nothing to a Delta, but TraceMeanField_ELBO scales and masks the model's density by them.
                with weights[name]:
                    pyro.sample(name, dist.Delta(value, event_dim=site.constrained_event_dim))
                if transforms[name] is not IDENTITY and am_i_wrapped():  # bare calls have no density to keep
                    log_jacobian = log_abs_det(transforms[name], unconstrained[name], value, site.constrained_event_dim)
                    pyro.factor(f"{name}_log_jacobian", -log_jacobian, has_rsample=True)
            values[name] = value
        return values

    def _check_names(self, values: Mapping[str, Tensor]) -> None:
        missing = [name for name in self.sites if name not in values]
        unknown = [name for name in values if name not in self.sites]
        if missing or unknown:
            raise ModelError(f"expected a value for each of {list(self.sites)}; missing {missing}, unknown {unknown}")

    def _transforms(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Transform]:
        known = {name: site.transform for name, site in self.sites.items() if site.transform is not None}
        if len(known) == len(self.sites):
            return known
        # A support that depends on other latents, such as Uniform(0, theta), is known only once they are.
        feed = _Feed(unconstrained)
        self._run(feed)
        return {name: known.get(name, feed.transforms[name]) for name in self.sites}

    def _weights(self, unconstrained: Mapping[str, Tensor]) -> dict[str, AbstractContextManager[Any]]:
        """The ``poutine.scale`` and ``poutine.mask`` that the model has around each site, to enter once."""
        if not any(site.weighted for site in self.sites.values()):
            return {name: nullcontext() for name in self.sites}
        nodes: Any = self._run(_Feed(unconstrained)).nodes
        return {name: _weight(nodes[name]["scale"], nodes[name]["mask"]) for name in self.sites}

    def _run(self, handler: Messenger, setup: bool = False) -> poutine.Trace:
        """Trace one run of the model under ``handler``, hidden from every handler outside."""
        with _no_open_plates(), poutine.block(), _Indices(self.indices, strict=not setup), handler:
            return poutine.trace(self.model).get_trace(*self.args, **self.kwargs)


@contextmanager
def _weight(scale: Any, mask: Any) -> Iterator[None]:
    with poutine.scale(scale=scale), poutine.mask(mask=True if mask is None else mask):
        yield


class _Feed(Messenger):
    """Give every latent site the constrained image of its unconstrained value."""

    def __init__(self, unconstrained: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.unconstrained = unconstrained
        self.transforms: dict[str, Transform] = {}
        self.log_jacobians: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        name = msg["name"]
        if name not in self.unconstrained:
            raise ModelError(f"the model sampled site '{name}', which it had not at set-up; its sites must be fixed")
        transform, value = transform_of(msg), self.unconstrained[name]
        constrained = transform(value)
        if constrained.shape[constrained.dim() - len(msg["fn"].shape()) :] != msg["fn"].shape():
            raise ModelError(
                f"site '{name}' has shape {tuple(msg['fn'].shape())} in this run, but the value given has shape "
                f"{tuple(constrained.shape)}: did the arguments of the model change size? Make a new LogJoint for them."
            )
        msg["value"] = constrained
        self.transforms[name] = transform
        self.log_jacobians[name] = log_abs_det(transform, value, constrained, msg["fn"].event_dim)


class _Indices(Messenger):
    """Feed subsample indices; refuse a run that would draw its own."""

    def __init__(self, indices: Mapping[str, Tensor], strict: bool) -> None:
        super().__init__()
        self.indices = indices
        self.strict = strict

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) or msg["value"] is not None:
            return
        name, size, wanted = msg["name"], msg["fn"].size, msg["fn"].subsample_size
        if name in self.indices:
            msg["value"] = self.indices[name]
        elif self.strict and wanted is not None and wanted < size:
            raise ModelError(
                f"plate '{name}' subsamples {wanted} of {size}, and this inner run of the model would draw other units "
                f"than the guide. Open the plate in the guide and hand its indices on:\n"
                f"    plate = pyro.plate('{name}', {size}, subsample_size={wanted}, dim=...)\n"
                f"    log_joint.with_indices({name}=plate.indices)"
            )


class _Plates:
    """The vectorized plates around a site, opened in a guide; each is made once and reused."""

    def __init__(self, site: LatentSite, opened: dict[str, Any]) -> None:
        for frame in site.plates:
            if frame.size != frame.full_size:
                raise ModelError(
                    f"site '{site.name}' lies in plate '{frame.name}', which subsamples {frame.size} of "
                    f"{frame.full_size}; the density of a joint draw cannot be scaled by unit. Sample the globals "
                    f"first, then the units inside the plate:\n"
                    f"    with pyro.plate('{frame.name}', {frame.full_size}, subsample_size={frame.size}):\n"
                    f"        pyro.sample('{site.name}', dist.Normal(loc_given_globals, scale))"
                )
        for frame in site.plates:
            if frame.name not in opened:
                opened[frame.name] = pyro.plate(frame.name, frame.full_size, dim=frame.dim)
        self.plates = [opened[frame.name] for frame in site.plates]
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:  # close those already open if a later one fails
            for plate in self.plates:
                stack.enter_context(plate)
            self.stack = stack.pop_all()

    def __exit__(self, *exc: Any) -> None:
        self.stack.__exit__(*exc)


@contextmanager
def _no_open_plates() -> Iterator[None]:
    """Let plates inside number their dimensions, and use their names, as if none were open outside."""
    outside, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = outside
