"""The log joint density of an existing Pyro model, as a function of its unconstrained latents.

This is the one room that traces Pyro models. It knows sites, plates, supports, scales and subsample indices; the rooms
below it know tensors only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible, init_to_median
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from laplace_amort.errors import ModelError

__all__ = ["LatentSite", "LogJoint"]


@dataclass(frozen=True)
class LatentSite:
    """One latent sample site of a model, and its place in the packed vector.

    :param str name: name of the site.
    :param torch.Size shape: of the unconstrained value, dimensions of plates included.
    :param int event_dim: rightmost dimensions of ``shape`` that belong to one draw.
    :param int start: offset of the first element in the packed vector.
    :param tuple plates: the frames of the vectorized plates around the site, outermost last.
    :param transform: from unconstrained to constrained; ``None`` where the support depends on other latents.
    :param int constrained_event_dim: rightmost dimensions of the constrained value that belong to one draw.
    """

    name: str
    shape: torch.Size
    event_dim: int
    start: int
    plates: tuple[Any, ...]
    transform: Transform | None
    constrained_event_dim: int

    @property
    def slice(self) -> slice:
        """Where the site lies in the packed vector."""
        return slice(self.start, self.start + self.shape.numel())

    @property
    def subsample_scale(self) -> float:
        """Product of ``N / B`` over the subsampled plates around the site."""
        return _subsample_scale(self.plates)


class LogJoint:
    r"""The log joint density :math:`\log p(x(u), z) + \log|\partial x/\partial u|` of a Pyro model, in unconstrained u.

    The model is run as it is: scales, masks, ``pyro.factor`` and model-side ``pyro.param`` act, and the run is
    invisible to enclosing handlers (the SVI trace, the plate of vectorized particles). Where a site lies in a
    subsampled plate, the log-Jacobian is scaled with the plate as the density is; a mask or a ``poutine.scale`` leaves
    it alone, because it changes the density and not the coordinates. Pyro's own automatic guides agree.

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
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.indices: dict[str, Tensor] = {}
        # Any feasible point shows the sites; a draw from a vague prior might overflow the likelihood.
        trace = self._run(InitMessenger(init_to_feasible), setup=True)
        self.sites = _find_sites(trace)
        self.size = sum(site.shape.numel() for site in self.sites.values())

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.name} {tuple(site.shape)}" for site in self.sites.values())
        return f"LogJoint of {self.size} unconstrained elements: {sites}"

    def given(self, *args: Any, **kwargs: Any) -> LogJoint:
        """Return the same log joint for other arguments of the model, without looking for its sites again."""
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
        by_name = len(values) == 1 and isinstance(values[0], Mapping)
        packed = self.pack(values[0]) if by_name else torch.cat([value.reshape(-1) for value in values])
        feed = _Feed(self.unpack(packed))
        trace = self._run(feed)
        if set(feed.log_jacobians) != set(self.sites):
            changed = sorted(set(feed.log_jacobians) ^ set(self.sites))
            raise ModelError(f"the latent sites of the model changed between runs: {changed}; they must be fixed")
        total: Any = trace.log_prob_sum()
        for name, log_jacobian in feed.log_jacobians.items():
            total = total + _subsample_scale(_plates(trace.nodes[name])) * log_jacobian.sum()
        return total

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Concatenate unconstrained values of all sites into a vector ``(D,)``, in the order of the sites."""
        missing = [name for name in self.sites if name not in values]
        unknown = [name for name in values if name not in self.sites]
        if missing or unknown:
            raise ModelError(f"expected a value for each of {list(self.sites)}; missing {missing}, unknown {unknown}")
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
        for name, site in self.sites.items():
            shape = torch.broadcast_shapes(site.shape, packed.shape[:-1] + (1,) * site.event_dim)
            values[name] = packed[..., site.slice].reshape(shape)
        return values

    def constrain(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the constrained value of every site, for a packed ``(*, D)``; batched as by :meth:`unpack`."""
        unconstrained = self.unpack(packed)
        return {name: transform(unconstrained[name]) for name, transform in self._transforms(unconstrained).items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the packed vector ``(D,)`` of unconstrained values, for constrained values of every site."""
        trace = self._run(poutine.condition(data=dict(values)))
        return self.pack({name: _transform(trace.nodes[name]).inv(values[name]) for name in self.sites})

    def initial(self, init_loc_fn: Callable[..., Any] = init_to_median) -> Tensor:
        """Return a packed start ``(D,)``, by one of Pyro's ``init_to_*`` strategies (the prior median by default)."""
        trace = self._run(InitMessenger(init_loc_fn))
        return self.pack({n: _transform(trace.nodes[n]).inv(trace.nodes[n]["value"]) for n in self.sites}).detach()

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

        For :func:`~laplace_amort.subsample_information`.
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
        values = {}
        for name, site in self.sites.items():
            value = transforms[name](unconstrained[name])
            with _Plates(site, opened):
                pyro.sample(name, dist.Delta(value, event_dim=site.constrained_event_dim))
                if transforms[name] is not _IDENTITY and am_i_wrapped():  # bare calls have no density to keep
                    log_jacobian = _log_jacobian(
                        transforms[name], unconstrained[name], value, site.constrained_event_dim
                    )
                    pyro.factor(f"{name}_log_jacobian", -log_jacobian, has_rsample=True)
            values[name] = value
        return values

    def _transforms(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Transform]:
        known = {name: site.transform for name, site in self.sites.items() if site.transform is not None}
        if len(known) == len(self.sites):
            return known
        # A support that depends on other latents, such as Uniform(0, theta), is known only once they are.
        feed = _Feed(unconstrained)
        self._run(feed)
        return {name: known.get(name, feed.transforms[name]) for name in self.sites}

    def _run(self, handler: Messenger, setup: bool = False) -> poutine.Trace:
        """Trace one run of the model under ``handler``, hidden from every handler outside."""
        with poutine.block(), _Indices(self.indices, strict=not setup), handler:
            return poutine.trace(self.model).get_trace(*self.args, **self.kwargs)


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
        transform, value = _transform(msg), self.unconstrained[name]
        constrained = transform(value)
        if constrained.shape[constrained.dim() - len(msg["fn"].shape()) :] != msg["fn"].shape():
            raise ModelError(
                f"site '{name}' has shape {tuple(msg['fn'].shape())} in this run, but the value given has shape "
                f"{tuple(constrained.shape)}: did the arguments of the model change size? Make a new LogJoint for them."
            )
        msg["value"] = constrained
        self.transforms[name] = transform
        self.log_jacobians[name] = _log_jacobian(transform, value, constrained, msg["fn"].event_dim)


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

    def __enter__(self) -> None:
        for plate in self.plates:
            plate.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for plate in reversed(self.plates):
            plate.__exit__(*exc)


_IDENTITY = biject_to(constraints.real)


def _find_sites(trace: poutine.Trace) -> dict[str, LatentSite]:
    sites: dict[str, LatentSite] = {}
    start = 0
    node: Any
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or node["is_observed"] or site_is_subsample(node):
            continue
        _refuse_unless_continuous(node)
        transform = _transform(node)
        constrained = node["fn"].shape()
        shape = torch.Size(transform.inverse_shape(constrained))
        sites[name] = LatentSite(
            name=name,
            shape=shape,
            event_dim=node["fn"].event_dim + len(shape) - len(constrained),
            start=start,
            plates=_plates(node),
            transform=transform if _is_fixed(node["fn"].support) else None,
            constrained_event_dim=node["fn"].event_dim,
        )
        start += shape.numel()
    if not sites:
        raise ModelError("the model has no latent sample site: every one is observed, so there is nothing to infer")
    return sites


def _refuse_unless_continuous(node: Any) -> None:
    if node["fn"].has_enumerate_support or node["fn"].support.is_discrete:
        raise ModelError(
            f"latent site '{node['name']}' is discrete ({type(node['fn']).__name__}), and a Hessian needs continuous "
            "latents. Sum it out of the model, for instance with dist.MixtureSameFamily, or observe it:\n"
            f"    pyro.sample('{node['name']}', ..., obs=value)"
        )
    for frame in node["cond_indep_stack"]:
        if not frame.vectorized and frame.full_size is not None and frame.size != frame.full_size:
            raise ModelError(
                f"latent site '{node['name']}' lies in the sequential, subsampled plate '{frame.name}'; vectorize it:\n"
                f"    with pyro.plate('{frame.name}', {frame.full_size}, subsample_size={frame.size}) as indices: ..."
            )


def _transform(node: Any) -> Transform:
    """The bijection from unconstrained space onto the support of a site; the identity is always the same object."""
    support = node["fn"].support
    base = support
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    if base is constraints.real:
        return _IDENTITY
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ModelError(
            f"the support {support} of latent site '{node['name']}' ({type(node['fn']).__name__}) has no bijection "
            "from unconstrained space. Write the site in other coordinates, for instance with pyro.infer.reparam."
        ) from error


def _is_fixed(support: Any) -> bool:
    """Whether a support holds no tensors, so that it cannot depend on other latents."""
    attributes = vars(support).values()
    if any(isinstance(value, Tensor) for value in attributes):
        return False
    nested = [value for value in attributes if isinstance(value, constraints.Constraint)]
    return all(_is_fixed(value) for value in nested)


def _log_jacobian(transform: Transform, value: Tensor, constrained: Tensor, event_dim: int) -> Tensor:
    """log |dx/du| per batch element: shape of the constrained value less its event dimensions."""
    log_jacobian = transform.log_abs_det_jacobian(value, constrained)
    surplus = log_jacobian.dim() - (constrained.dim() - event_dim)
    return log_jacobian.sum(tuple(range(-surplus, 0))) if surplus else log_jacobian


def _plates(node: Any) -> tuple[Any, ...]:
    return tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)


def _subsample_scale(plates: Iterable[Any]) -> float:
    scale = 1.0
    for frame in plates:
        scale *= frame.full_size / frame.size
    return scale
