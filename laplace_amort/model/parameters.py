"""Parameters of a model, ``pyro.param`` and weights of modules: what to type to make latents of them."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from torch import nn
from torch.distributions import biject_to

from laplace_amort.model.runs import ModelRuns

__all__ = ["prior_for_parameter"]

_BOUNDS = "lower_bound", "upper_bound"


def prior_for_parameter(runs: ModelRuns, name: str) -> str:
    """Return the lines that give a parameter of a model a prior, with the support and the shape that it has.

    :param ModelRuns runs: the model.
    :param str name: of the parameter, as in Pyro's store.
    :return: the lines, each with a line break; none for a support that no latent can have.
    """
    shape = tuple(runs.parameter_shape(name))
    support = pyro.get_param_store()._constraints.get(name, constraints.real)
    return f"{_line(runs, name, support, shape)}\n" if _has_coordinates(support) else ""


def _has_coordinates(support: Any) -> bool:
    try:
        biject_to(support)
    except NotImplementedError:
        return False
    return True


def _line(runs: ModelRuns, name: str, support: Any, shape: tuple[int, ...]) -> str:
    if "$$$" in name:  # of pyro.module(name, module)
        module, _, path = name.partition("$$$")
        return (
            f"    pyro.nn.module.to_pyro_module_({module})   # once, and no pyro.module('{module}', ...) in the model\n"
            f"    {module}.{path} = PyroSample({_proper(support, shape)})"
        )
    if isinstance(runs.model, nn.Module):
        return f"    model.{name} = PyroSample({_proper(support, shape)})"
    if "." in name:
        return f"    {name} = PyroSample({_proper(support, shape)})"
    return f"    {name} = pyro.sample('{name}', dist.ImproperUniform({_source(support)}, (), {shape}))"


def _proper(support: Any, shape: tuple[int, ...]) -> str:
    """A prior that has most of its mass where weights of modules are."""
    base = {"constraints.real": "dist.Normal(0., 1.)", "constraints.positive": "dist.LogNormal(0., 1.)"}
    prior = base.get(_source(support))
    if prior is None:
        return f"dist.ImproperUniform({_source(support)}, (), {shape})"
    return f"{prior}.expand({list(shape)}).to_event({len(shape)})" if shape else prior


def _source(support: Any) -> str:
    """What to type for a constraint."""
    if isinstance(support, constraints.independent):
        return f"constraints.independent({_source(support.base_constraint)}, {support.reinterpreted_batch_ndims})"
    bounds = [_number(getattr(support, bound)) for bound in _BOUNDS if hasattr(support, bound)]
    if bounds == ["0.0"] and isinstance(support, type(constraints.positive)):
        return "constraints.positive"
    for name, value in vars(constraints).items():
        if bounds and isinstance(value, type) and type(support) is value and not name.startswith("_"):
            return f"constraints.{name}({', '.join(bounds)})"
        if (
            not bounds
            and isinstance(value, torch.distributions.constraints.Constraint)
            and type(value) is type(support)
        ):
            return f"constraints.{name}"
    return f"constraints.real   # in place of {support}"


def _number(bound: Any) -> str:
    value = torch.as_tensor(bound)
    return str(float(value)) if value.numel() == 1 else f"torch.tensor({value.tolist()})"
