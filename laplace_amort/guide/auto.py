"""The amortized Laplace family as an automatic guide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import init_to_mean
from pyro.nn import PyroParam, pyro_method
from torch import Tensor

from laplace_amort.autodiff import check_structure, nearby, refuse_without_autograd
from laplace_amort.errors import InformationError, ModelError
from laplace_amort.guide.family import gaussian_of
from laplace_amort.guide.gaussian import LaplaceGaussian
from laplace_amort.guide.heads import Head, JointCurvature, MarginalCurvature
from laplace_amort.guide.repeats import Repeats
from laplace_amort.guide.storing import copied_with, follow_store, is_importable
from laplace_amort.guide.warm_start import WarmStart
from laplace_amort.linalg import Repair, SoftAbs
from laplace_amort.model import UnitLayout, UnitModel, UnitModels, all_plates
from laplace_amort.units import FreeMode, Mode, NewtonMode

__all__ = ["AutoLaplaceFamily"]

# How far from the start the structure of the model is checked.
_BESIDE = 0.1

_CLASH = (
    "Most often the parameters in Pyro's store are those of a guide of another model that was fitted before. Clear the "
    "store before a new guide is called first, or call it by another name:\n"
    "    pyro.clear_param_store()\n"
    "    class SecondGuide(AutoLaplaceFamily): ...   # the name of the class is that of the parameters\n"
    "If it is this guide whose model has changed, make a new one."
)


class AutoLaplaceFamily(AutoGuide):
    r"""The amortized Laplace family: a Gaussian guide whose only parameter is where the globals stand.

    .. math:: q(\theta, y) = N\big( (\hat\theta, \hat y(\hat\theta)),\; P(\hat\theta)^{-1} \big), \qquad
              P = -\nabla^2_{(\theta, y)} \log p(\theta, y, z) \text{ at the mean,}

    in unconstrained space, where :math:`\hat y(\theta)` is the mode of the units' latents given the globals. The
    Hessian takes :math:`\theta` and :math:`y` as independent; the gradient of the ELBO knows that they are not
    (:func:`~laplace_amort.dual_path`). Given the globals the units are independent, so :math:`P` is a block arrowhead,
    and everything costs :math:`O(N)` in the number of units.

    Do not use it for models with discrete latents (sum them out), for latents that are coupled between units
    (a time series: :class:`StructureError` tells), or without a plate of units (Pyro's ``AutoLaplaceApproximation``).
    And where a hierarchy's scale is to be inferred from units that each say little, the joint curvature is biased:
    pass ``head=MarginalCurvature()``.

    :param model: a Pyro model.
    :param mode: how the conditional mode of the units is found: :class:`~laplace_amort.NewtonMode`,
        :class:`~laplace_amort.ClosedFormMode`, or :class:`~laplace_amort.FreeMode`.
    :param head: the precision of the globals: :class:`~laplace_amort.JointCurvature` or
        :class:`~laplace_amort.MarginalCurvature`.
    :param str unit_plate: name of the unit plate; by default the outermost plate that holds latents, the largest of
        several. ``print(guide.layout)`` shows the choice.
    :param repair: what to do where a block of the precision is not positive definite.
    :param create_plates: a function of the model's arguments that returns plates, as in every ``AutoGuide``.
    :param init_loc_fn: one of Pyro's ``init_to_*``, for the start.
    :raises ModelError: in the first call, for a model that the guide cannot take; the message names site or plate and
        what to type instead.

    It is used like every ``AutoGuide``, with any ELBO. Besides, there are :meth:`median`, :meth:`quantiles`,
    :meth:`mean`, :meth:`sample_posterior` and, for the numbers themselves, :meth:`gaussian`; all take the arguments of
    the model. Latents in subsampled plates are allowed in the unit plate: the parameter is the same for any minibatch.

    Example: a Gaussian model, in which the family holds the posterior::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> guide, z = AutoLaplaceFamily(model), torch.tensor([1., 3.])
        >>> elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        >>> for step in range(100): loss = svi.step(z)
        >>> print(guide.layout)
        unit plate 'units': 2 units, dim -1
        global, 1 in all: mu ()
        local, 1 in each unit: y ()
        >>> print({name: value.round(decimals=1) for name, value in guide.median(z).items()})
        {'mu': tensor(1.), 'y': tensor([1., 2.])}

    References:

    [1] Kristensen et al. (2016), *TMB: Automatic Differentiation and Laplace Approximation*, Journal of Statistical
    Software 70(5), https://doi.org/10.18637/jss.v070.i05, for the arrowhead's part in marginal likelihood.
    """

    _clash = _CLASH  # what to do about a call of other sizes than the first

    def __init__(
        self,
        model: Callable[..., Any],
        mode: Mode = NewtonMode(),
        *,
        head: Head = JointCurvature(),
        unit_plate: str | None = None,
        repair: Repair = SoftAbs(),
        create_plates: Callable[..., Any] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_mean,
    ) -> None:
        if isinstance(mode, FreeMode) and isinstance(head, MarginalCurvature):
            raise ModelError(
                "MarginalCurvature is the curvature along the mode of the units, and the centers of FreeMode are no "
                "modes. Find them, or take the joint curvature:\n"
                "    AutoLaplaceFamily(model, NewtonMode(), head=MarginalCurvature())\n"
                "    AutoLaplaceFamily(model, FreeMode(), head=JointCurvature())"
            )
        super().__init__(model, create_plates=create_plates)
        # Templates, in tuples so that those with parameters are no submodules: set-up makes the strategies from them.
        self._mode, self._repair = (mode,), (repair,)
        self.head: Head = head
        self.unit_plate = unit_plate
        self.init_loc_fn = init_loc_fn
        self.layout: UnitLayout | None = None  # which sites are global, which local; known once the guide has run
        self._unit_models: UnitModels | None = None
        self._repeats = Repeats()

    def settings(self) -> dict[str, Any]:
        """Return what the guide was made with, by the names of its arguments; the start and plates are left out."""
        return {"mode": self._mode[0], "head": self.head, "repair": self._repair[0], "unit_plate": self.unit_plate}

    @pyro_method
    def gaussian_of(
        self, unit_model: UnitModel, *, mode: Mode | None = None, head: Head | None = None
    ) -> LaplaceGaussian:
        """Return the Gaussian that this guide is for a model that is at hand, differentiable in its parameter.

        :param UnitModel unit_model: as from :meth:`unit_model`.
        :param mode: another one than the guide's.
        :param head: another one than the guide's.
        """
        return gaussian_of(self, unit_model, mode or self.mode, head or self.head)

    @pyro_method
    def follow_store(self) -> None:
        """Read every parameter from Pyro's store, so that ``named_parameters()`` are those."""
        for module in self.modules():
            for name in getattr(module, "_pyro_params", ()):
                getattr(module, name)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site of the model; returns constrained values by site."""
        refuse_without_autograd()
        return self.gaussian_of(self._model_of_call(args, kwargs)).sample_sites(self._pyro_name, self.plates)

    @pyro_method
    def gaussian(self, *args: Any, **kwargs: Any) -> LaplaceGaussian:
        """Return the Gaussian that this guide is, differentiable in its parameter.

        Of a subsampled plate it has the units of one minibatch; ``gaussian.unit_model.units`` are their indices.
        """
        refuse_without_autograd()
        with pyro.poutine.block():
            return self.gaussian_of(self._model_of_call(args, kwargs))

    @pyro_method
    def unit_model(self, *args: Any, **kwargs: Any) -> UnitModel:
        """Return the model, for these arguments, as a function of globals and units; set up the guide if need be.

        Of a subsampled plate it has the units of one minibatch.
        """
        with pyro.poutine.block():
            return self._unit_model(args, kwargs)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the constrained image of the guide's mean, by site."""
        return self.gaussian(*args, **kwargs).median()

    @torch.no_grad()
    def mean(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the mean in constrained space, by site; see :meth:`LaplaceGaussian.mean`."""
        return self.gaussian(*args, **kwargs).mean()

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the constrained images of the marginal quantiles, ``(Q, *shape)`` by site."""
        return self.gaussian(*args, **kwargs).quantiles(quantiles)

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide; returns constrained values ``(num_samples, *shape)`` by site."""
        return self.gaussian(*args, **kwargs).sample(num_samples)

    def attach(self, model: Callable[..., Any]) -> None:
        """Give back its model to a guide that was saved without: a function that cannot be imported by name."""
        self._model = (model,)

    def _model_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnitModel:
        """Like :meth:`_unit_model`, but recorded once calls repeat each other, where all plates are whole."""
        if (
            self._unit_models is None
            or self.layout is None
            or self.create_plates is not None
            or self.master is not None
        ):
            return self._unit_model(args, kwargs)
        loc: Any = self.loc
        loc = loc.detach()
        recorded = self._repeats.find(self.model, args, kwargs, loc, self._guess)
        if recorded is not None:
            self._check_sizes(recorded.layout)  # the guide may have seen other units in between
            self.plates, self.layout = all_plates(recorded.density, {}), recorded.layout
            return recorded
        unit_model = self._unit_model(args, kwargs)
        if not unit_model.density.subsampled_plates:
            self._repeats.take(unit_model, loc, self._guess(unit_model, loc))
        return unit_model

    def _guess(self, unit_model: UnitModel, global_: Tensor) -> Tensor:
        """A first guess of the modes, ``(N, k)``."""
        return self._warm_start.at(unit_model.units, global_)

    def _unit_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnitModel:
        """Open the plates of this call and see the model through their indices; set up in the first call."""
        if self._unit_models is None:
            if self.model is None:
                raise ModelError(
                    "this guide was saved without its model, which cannot be imported by name. Give it back:\n"
                    "    guide.attach(model)"
                )
            self._unit_models = UnitModels(self.model, self.unit_plate)
        unit_model, self.plates = self._unit_models(args, kwargs, self._chosen_plates(args, kwargs))
        if self.prototype_trace is None:
            self._setup_prototype(unit_model)
        self._check_sizes(unit_model.layout)
        self.layout = unit_model.layout
        return unit_model

    def _chosen_plates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
        """The plates that are made elsewhere: by ``create_plates``, or by the list that this guide is part of."""
        if self.master is not None:
            if self.create_plates is not None:
                raise ModelError(
                    "this guide is part of an AutoGuideList, which makes the plates. Give create_plates to the list:\n"
                    "    AutoGuideList(model, create_plates=create_plates)"
                )
            return dict(self.master().plates)
        if self.create_plates is None:
            return {}
        plates = self.create_plates(*args, **kwargs)
        return {plate.name: plate for plate in ([plates] if isinstance(plates, pyro.plate) else plates)}

    def _setup_prototype(self, unit_model: UnitModel) -> None:
        """Start the parameter, prepare the strategies, and check that the model is one for this guide."""
        unit_model.density.check_data()
        with torch.no_grad():
            trace = unit_model.density.prototype(self.init_loc_fn)
        global_, local = unit_model.start_in(trace)
        for name in [name for name, node in trace.nodes.items() if self._prototype_hide_fn(node)]:
            trace.remove_node(name)  # latents only, as in every AutoGuide; the data of this call are not for keeping
        self.prototype_trace = trace
        layout = unit_model.layout
        unit_model.check_deterministic(global_, local)
        # Beside the start: at a point of symmetry the second derivative of a coupling may vanish.
        beside = nearby(global_, _BESIDE, 1), nearby(local, _BESIDE, 2)
        try:
            check_structure(unit_model.log_joint, *beside, names=layout.local_elements())
        except InformationError as error:
            raise _no_start(error, layout) from error
        if not hasattr(self, "loc"):
            size = layout.frame.full_size
            start = local if len(local) == size else local.mean(0).expand(size, -1).clone()
            self.loc = PyroParam(global_)  # unlike a plain Parameter, read from Pyro's store at every use
            self._warm_start = WarmStart(start, layout.global_dim)
            self.mode = follow_store(self._mode[0].prepare(start))
            self.head_repair = follow_store(self._repair[0].prepare(layout.global_dim, global_))
            self.tail_repair = follow_store(self._repair[0].prepare(layout.local_dim, local))

    def _check_sizes(self, layout: UnitLayout) -> None:
        num_units, local_dim = self._warm_start.intercept.shape
        if (layout.global_dim, layout.local_dim) != (len(self.loc), local_dim):
            raise ModelError(
                f"the guide was set up for {len(self.loc)} global elements and {local_dim} in each unit; "
                f"this call of the model has {layout.global_dim} and {layout.local_dim}:\n{layout}\n"
                f"{self._clash}"
            )
        if layout.frame.full_size != num_units:  # other units: the amortized modes follow
            if isinstance(self.mode, FreeMode):
                raise ModelError(
                    f"the guide was set up for {num_units} units, this call has {layout.frame.full_size}, and the "
                    "centers of FreeMode belong to the units of the set-up. Amortized ones follow:\n"
                    "    AutoLaplaceFamily(model, NewtonMode())"
                )
            self._warm_start = self._warm_start.resized(layout.frame.full_size)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the next call makes again, and a model that cannot be imported by name."""
        state: dict[str, Any] = dict(super(AutoGuide, self).__getstate__())  # not AutoGuide's, which drops the model
        state.update(master=None, prototype_trace=None, plates={}, _unit_models=None, _repeats=Repeats())
        if not is_importable(self.model):
            state["_model"] = (None,)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoLaplaceFamily:
        """Copy parameters and settings; the copy is a guide for the same model, unless that is copied along with it."""
        state = self.__getstate__()
        state["_model"] = (None,)
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(state, memo))
        other.attach(copied_with(self.model, memo))
        return other


def _no_start(error: InformationError, layout: UnitLayout) -> InformationError:
    """Say that it is the start where derivatives do not exist, and how to begin elsewhere."""
    site = next(iter(layout.global_sites or layout.local_sites))
    return InformationError(
        f"near the start, where latents are at the means of their priors, {error} Or is the start far from the data? "
        "Begin near them, for any of the sites:\n"
        f"    start = init_to_value(values={{'{site}': torch.tensor(1.)}})\n"
        "    guide = AutoLaplaceFamily(model, init_loc_fn=start)   # fit(model, *args, guide=guide)"
    )
