"""The rivals by name. Each is a function from a task to a dictionary of result columns; see ``outcome.py``.

Nothing of a rival is imported before it is loaded, so that one that is not installed is in no other's way, and none
uses another's memory. To add one, write a module with such a function and put an entry here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from outcome import NotInstalledError
from tasks import KINDS, Task

ALL = tuple(KINDS)
DENSE = 1000  # more units than this: gigabytes and minutes for one dense matrix of all latents
NO_LIMIT = 10**9


@dataclass(frozen=True)
class Rival:
    """Where a rival is, and what it is asked to do.

    :param str module: of this folder.
    :param str function: of the module, called with the task and ``arguments``.
    :param arguments: further ones, by name.
    :param tasks: those it can do.
    :param int max_units: the largest size it is asked to do.
    :param str reason: why not larger ones.
    """

    module: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    tasks: tuple[str, ...] = ALL
    max_units: int = NO_LIMIT
    reason: str = ""

    def load(self) -> Callable[[Task], dict[str, Any]]:
        """Import it.

        :raises NotInstalledError: if a package is missing.
        """
        try:
            function = getattr(importlib.import_module(self.module), self.function)
        except ModuleNotFoundError as error:
            raise NotInstalledError(str(error.name)) from error
        return lambda task: function(task, **self.arguments)

    def left_out(self, task: str, units: int) -> str | None:
        """Why it is not asked to do a task at a size; ``None`` if it is."""
        if task not in self.tasks:
            return f"left out: not for {task}"
        return None if units <= self.max_units else f"left out: {units} units are too many, {self.reason}"


def _guides(tool: str, limits: Mapping[str, tuple[int, str]]) -> dict[str, Rival]:
    """The automatic guides of Pyro or NumPyro."""
    return {
        f"{tool}-{name}": Rival(f"{tool}_rivals", "fit_guide", {"name": name}, max_units=limit, reason=reason)
        for name, (limit, reason) in limits.items()
    }


_DENSE = (DENSE, "dense in all latents")
_GUIDES = {
    "AutoNormal": (NO_LIMIT, ""),
    "AutoMultivariateNormal": _DENSE,
    "AutoLowRankMultivariateNormal": (10_000, "the default rank is the root of the number of latents"),
}
_GLMM = ("poisson", "bernoulli")
_GROUPED = ("poisson", "bernoulli", "radon")

RIVALS: dict[str, Rival] = {
    **_guides("pyro", _GUIDES),
    **_guides("pyro", {"AutoGaussian": _DENSE, "AutoGaussian-funsor": (DENSE, "slow")}),
    "pyro-AutoLaplaceApproximation": Rival("pyro_rivals", "fit_laplace", max_units=DENSE, reason=_DENSE[1]),
    **_guides("numpyro", _GUIDES),
    "numpyro-AutoLaplaceApproximation": Rival("numpyro_rivals", "fit_laplace", max_units=DENSE, reason=_DENSE[1]),
    "numpyro-NUTS": Rival("numpyro_rivals", "fit_nuts", max_units=DENSE, reason="slow"),
    "TMB": Rival("r_rivals", "fit_tmb"),
    "lme4": Rival("r_rivals", "fit_lme4", {"package": "lme4", "points": 1}, _GROUPED),
    "lme4-nAGQ9": Rival("r_rivals", "fit_lme4", {"package": "lme4", "points": 9}, _GLMM),
    "glmmTMB": Rival("r_rivals", "fit_lme4", {"package": "glmmTMB", "points": 1}, _GLMM),
    "laplace-amort MarginalLaplace": Rival("ours", "fit_marginal_laplace"),
    "laplace-amort MarginalQuadrature": Rival("ours", "fit_quadrature", tasks=_GLMM),
    "laplace-amort ELBO": Rival("ours", "fit_elbo", {"head": "joint"}),
    "laplace-amort ELBO, marginal head": Rival("ours", "fit_elbo", {"head": "marginal"}),
}
