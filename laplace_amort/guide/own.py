"""A guide with parameters of its own: Pyro's store has none of them, and two guides in one session never meet."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pyro
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.heads import JointCurvature, MarginalCurvature
from laplace_amort.guide.storing import NoContext
from laplace_amort.linalg import Boost, ModifiedCholesky, NoRepair, SoftAbs
from laplace_amort.units import FreeMode, NewtonMode

__all__ = ["KNOWN_SETTINGS", "PLAIN_SETTINGS", "own_guide"]

# Settings of guides that consist of numbers and of each other: what a file can hold. Of ``ClosedFormMode`` it cannot.
PLAIN_SETTINGS = (NewtonMode, JointCurvature, MarginalCurvature, SoftAbs, ModifiedCholesky, NoRepair)
# And those that are modules, with what they are made of before they have parameters.
KNOWN_SETTINGS: dict[type, tuple[Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], Any]]] = {
    FreeMode: (lambda mode: {}, lambda fields: FreeMode()),
    Boost: (lambda boost: {"strength": boost.initial_strength, "base": boost.base}, lambda fields: Boost(**fields)),
}


class _OwnLaplaceFamily(AutoLaplaceFamily):
    """An :class:`AutoLaplaceFamily` that reads its parameters from itself, where others read them from Pyro's store.

    In a call it tells Pyro of them all the same, so that ``SVI`` finds what to move, under the names that they always
    have. A handler that would put other values in their place (``poutine.lift``) has no effect.
    """

    _clash = "Its model has changed. A new fit makes a new guide:\n    fit(model, *args)"

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        super().__init__(model, **options)
        vars(self)["_pyro_context"] = NoContext()  # that of its strategies too, which come later
        self._pyro_name = AutoLaplaceFamily.__name__  # of sites and parameters

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site of the model; returns constrained values by site."""
        values = super().forward(*args, **kwargs)
        for name, leaf, constraint in _parameters(self):
            _declare(name, leaf, constraint)
        return values

    def _get_name(self) -> str:
        return AutoLaplaceFamily.__name__  # as it is printed


def own_guide(model: Callable[..., Any], **options: Any) -> AutoLaplaceFamily:
    """Return a guide for a model, whose parameters are its own: Pyro's store has none of them.

    Guides so made do not share parameters, whatever their names and the shapes of their models, so that there is
    nothing to clear between one fit and the next. Parameters of the model itself stay in Pyro's store.

    :param model: a Pyro model.
    :param options: those of :class:`AutoLaplaceFamily`.
    :raises ModelError: as :class:`AutoLaplaceFamily`.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> known, guide = len(pyro.get_param_store()), own_guide(model)
        >>> sorted(guide(torch.tensor([1., 3.])))
        ['mu', 'y']
        >>> len(pyro.get_param_store()) - known
        0
    """
    return _OwnLaplaceFamily(model, **options)


def _parameters(guide: AutoLaplaceFamily) -> list[tuple[str, Tensor, Any]]:
    """List names, leaves and constraints of all parameters of a guide, as Pyro names them."""
    found: list[tuple[str, Tensor, Any]] = []
    for prefix, module in guide.named_modules(prefix=guide._pyro_name):
        declared = getattr(module, "_pyro_params", {})
        for name, leaf in module.named_parameters(recurse=False):
            plain = name.removesuffix("_unconstrained")
            constraint, _ = declared.get(plain, (constraints.real, None))
            found.append((f"{prefix}.{plain if plain in declared else name}", leaf, constraint))
    return found


def _declare(name: str, leaf: Tensor, constraint: Any) -> None:
    """Tell handlers of Pyro's, such as the one by which SVI finds parameters, of one that is not in the store."""
    value: Any = transform_to(constraint)(leaf)
    value.unconstrained = weakref.ref(leaf)
    tell: Any = effectful(type="param")(lambda *args, **kwargs: value)
    tell(name, constraint=constraint, name=name)
    if isinstance(leaf, nn.Parameter):  # options of optimizers by name, pyro.optim.Adam(lambda name: {...}), ask for it
        pyro.get_param_store()._param_to_name[leaf] = name
