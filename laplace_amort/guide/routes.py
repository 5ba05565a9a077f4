r"""Options A and B: hide the dependence of the mode on the parameter, then bring the missing gradient back.

Option C, :func:`~laplace_amort.dual_path`, needs neither. These two are for code that already has their form, and as
independent oracles for C. Each wraps one of Pyro's ELBOs and is passed to an unpatched ``SVI`` in its place. In the
guide, ``hide`` cuts the graph between the parameter and :math:`\hat y`; the cut end, a leaf, collects what the
parameter does not get,

.. math:: \frac{d\,\mathrm{loss}}{d\hat\theta}
          = \frac{\partial\,\mathrm{loss}}{\partial\hat\theta}\bigg|_{\hat y}
          + \Big(\frac{\partial\hat y}{\partial\hat\theta}\Big)^{\!\top} \frac{\partial\,\mathrm{loss}}{\partial\hat y},

whose last term is the gradient of the leaf.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from laplace_amort.errors import PathError

__all__ = ["ExplicitGradient", "ExtraLoss", "HiddenDependence"]


class HiddenDependence(ELBO):
    """What options A and B share: an ELBO that remembers which values were hidden while it ran the guide.

    :param ELBO elbo: one of Pyro's ELBOs; it is copied, and the copy keeps its graphs until the step is over.
    :raises TypeError: if ``elbo`` is not an ELBO.
    """

    elbo: Any  # Pyro's base class does not declare `loss` and `loss_and_grads`

    def __init__(self, elbo: ELBO) -> None:
        if not isinstance(elbo, ELBO):
            raise TypeError(f"expected one of Pyro's ELBO objects, such as Trace_ELBO(), got {elbo!r}")
        super().__init__(**{name: getattr(elbo, name) for name in ("num_particles", "max_plate_nesting")})
        self.elbo = copy.copy(elbo)
        # The hidden values are pulled back after the ELBO's own backward, through graphs that it would free.
        self.elbo.retain_graph = True
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._recording = False

    def hide(self, value: Tensor) -> Tensor:
        r"""In the guide: return a leaf with this value, to compute :math:`\hat y` from.

        :param Tensor value: a value from ``pyro.param``, of any shape.
        :return: the same value without its graph.
        :raises PathError: if the value does not belong to a parameter.
        """
        _leaf_of(value)
        leaf = value.detach().clone().requires_grad_()
        if self._recording:
            self._hidden.append((value, leaf))
        return leaf

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of the wrapped ELBO; nothing is missing from a value."""
        return self.elbo.loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped ELBO and its backward, then add what the hidden values held back to ``.grad``."""
        self._hidden, self._recording = [], True
        try:
            loss = self.elbo.loss_and_grads(model, guide, *args, **kwargs)
            for value, leaf in self._hidden:
                if leaf.grad is not None:
                    self._restore(value, leaf.grad)
        finally:
            self._hidden, self._recording = [], False
        return loss

    @abstractmethod
    def _restore(self, value: Tensor, missing: Tensor) -> None:
        """Bring the gradient ``missing`` with respect to ``value`` into ``.grad`` of its parameter."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)


class ExplicitGradient(HiddenDependence):
    r"""Option A: work out the missing gradient apart and add it to ``.grad`` by hand.

    Prefer :func:`~laplace_amort.dual_path` in new code.

    :param ELBO elbo: one of Pyro's ELBOs.

    Example: the loss below is ``theta**2 * y`` with ``y = theta**3`` hidden; its gradient is ``5 theta**4``::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> pyro.clear_param_store()
        >>> route = ExplicitGradient(Trace_ELBO())
        >>> def guide():
        ...     theta = pyro.param("theta", torch.tensor(2.))
        ...     y = route.hide(theta) ** 3
        ...     pyro.factor("minus_loss", theta ** 2 * y, has_rsample=True)
        >>> loss = route.loss_and_grads(lambda: None, guide)
        >>> pyro.param("theta").grad
        tensor(80.)

    With SVI: ``SVI(model, guide, optim, loss=route)``.
    """

    def _restore(self, value: Tensor, missing: Tensor) -> None:
        leaf = _leaf_of(value)
        if value is not leaf:  # through the constraint of the parameter
            (missing,) = torch.autograd.grad(value, leaf, missing)
        leaf.grad = missing.clone() if leaf.grad is None else leaf.grad + missing


class ExtraLoss(HiddenDependence):
    r"""Option B: run ``extra_loss.backward()`` on a loss whose gradient is the missing one.

    It lands in ``.grad`` and stays there because SVI zeroes gradients *after* the optimizer's step, not before the
    backward. Prefer :func:`~laplace_amort.dual_path` in new code.

    :param ELBO elbo: one of Pyro's ELBOs.

    Example::

        >>> import pyro, torch
        >>> from pyro.infer import Trace_ELBO
        >>> pyro.clear_param_store()
        >>> route = ExtraLoss(Trace_ELBO())
        >>> def guide():
        ...     theta = pyro.param("theta", torch.tensor(2.))
        ...     pyro.factor("minus_loss", theta ** 2 * route.hide(theta) ** 3, has_rsample=True)
        >>> loss = route.loss_and_grads(lambda: None, guide)
        >>> pyro.param("theta").grad
        tensor(80.)
    """

    def _restore(self, value: Tensor, missing: Tensor) -> None:
        extra_loss = (missing.detach() * value).sum()
        extra_loss.backward()


def _leaf_of(value: Tensor) -> Tensor:
    """The unconstrained leaf behind the value of a ``pyro.param``."""
    leaf = getattr(value, "_pyro_unconstrained_param", None)  # where a plate took a subsample of the parameter
    if leaf is None:
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
    if not (leaf.is_leaf and leaf.requires_grad):
        raise PathError(
            "hide() needs the value of a parameter, with gradients enabled, not something computed from it. Hide "
            "first, compute then:\n    hidden = route.hide(pyro.param('theta', ...))"
        )
    return leaf
