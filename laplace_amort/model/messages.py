"""What goes wrong in a user's model, in words that name the site and have the line to type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.errors import LaplaceAmortError, ModelError, RecordingError
from laplace_amort.model.arguments import named
from laplace_amort.model.imputed import is_imputed

__all__ = ["explained", "observed", "of_density", "of_run"]

# How torch says that an operation got tensors of two dtypes.
_DTYPES = re.compile(r"\bdtype|scalar type|can't be cast|bool tensor", re.IGNORECASE)
_OUTSIDE = re.compile(r"Shape mismatch inside plate\('(.+)'\) at site (\S+) dim -\d+, (\d+) vs (\d+)")
_SHAPES = re.compile(r"\n *Trace Shapes:")  # which Pyro appends, indented by the longest name of a site
_PARAMETER = re.compile(r"Expected parameter (\w+) .*of distribution (\w+).* the constraint (.+), but found")
_BEYOND = re.compile(r"index (-?\d+) is out of bounds for dimension \d+ with size (\d+)")
_ARRAY = re.compile(r"ndarray|'(Series|DataFrame)'")


@contextmanager
def explained(explain: Callable[[Exception], LaplaceAmortError | None]) -> Iterator[None]:
    """Put an explanation in place of an error that is raised inside, where there is one."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        explanation = explain(error)
        if explanation is None:
            raise
        raise explanation from error


def of_run(
    error: Exception, trace: Any, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ModelError | RecordingError | None:
    """Explain what a run of a model raised; None where its own message is the best.

    :param Exception error: of Pyro, torch or Python.
    :param trace: of the sites before it.
    :param model: that was run.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    """
    if isinstance(error, LaplaceAmortError):
        said, *shapes = _SHAPES.split(str(error))  # shapes name no more sites
        return type(error)(said) if shapes and isinstance(error, ModelError | RecordingError) else None
    line = str(error).split("\n")[0]
    if isinstance(error, IndexError | TypeError):
        return _of_lookup(error, line, trace)
    if parameter := _PARAMETER.search(line):
        return _of_parameter(parameter, trace, named(model, args, kwargs)) if "nan" in str(error) else None
    if mismatch := _OUTSIDE.search(line):
        return _of_size(mismatch, trace, named(model, args, kwargs))
    if isinstance(error, RuntimeError) and _DTYPES.search(line):
        after = _after(trace, with_dtype=True)
        return ModelError(
            f"the model puts tensors of different dtypes together{after}: {line}. Latents have the dtype of their "
            f"distributions, dist.Normal(0., 1.) the default, which is {torch.get_default_dtype()}. Give data the "
            "same, or make another the default before the model runs first:\n"
            "    data = data.to(torch.get_default_dtype())\n"
            "    torch.set_default_dtype(torch.float64)"
        )
    return None


def _of_size(mismatch: re.Match[str], trace: Any, arguments: Mapping[str, Any]) -> ModelError:
    """A site that is longer than its plate: the plate of the units, or one whose columns differ in length."""
    plate, site, size, found = mismatch.groups()
    said = f"site '{site}' has {found} elements, and lies in plate '{plate}' of size {size}"
    latent = [node for node in _samples(trace) if not node["is_observed"]]
    if any(frame.name == plate for node in latent for frame in node["cond_indep_stack"]):
        return ModelError(
            f"{said}. Observations of which there are several for each unit have a plate of their own, beside that of "
            f"the units, and look their unit up:\n    with pyro.plate('{site}_plate', {found}):\n"
            f"        pyro.sample('{site}', dist...(y[unit_of_each]), obs={site})"
        )
    shapes = {name: tuple(value.shape) for name, value in arguments.items() if isinstance(value, Tensor)}
    return ModelError(
        f"{said}. Data and covariates must have an element for each observation; the arguments of the model have the "
        f"shapes {shapes}. If {found} is right:\n    with pyro.plate('{plate}', {found}):"
    )


def _of_lookup(error: Exception, line: str, trace: Any) -> ModelError | None:
    """An index that torch does not take, or a number that is no tensor."""
    if beyond := _BEYOND.search(line):
        index, size = beyond.groups()
        return ModelError(
            f"the model looks up element {index}{_after(trace)}, and there are {size}, from 0 to {int(size) - 1}. Make "
            "the plate larger, or number the units from 0 without gaps:\n"
            "    unit = torch.unique(unit, return_inverse=True)[1]"
        )
    if isinstance(error, IndexError) and "used as indices" in line:
        return ModelError(f"an index{_after(trace)} is no integer: {line}. Make it one:\n    unit = unit.long()")
    if _ARRAY.search(line):
        return ModelError(
            f"the model got data that are no tensors{_after(trace)}: {line}. Make tensors of them:\n"
            "    data = torch.as_tensor(data, dtype=torch.get_default_dtype())"
        )
    return None


def _of_parameter(parameter: re.Match[str], trace: Any, arguments: Mapping[str, Any]) -> ModelError:
    """A parameter of a distribution that is NaN, most often because a covariate is missing."""
    name, kind, constraint = parameter.groups()
    said = f"'{name}' of a distribution {kind}{_after(trace)} is NaN, and must satisfy {constraint}"
    for argument, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
            index = value.isnan().nonzero()[0].tolist()
            return ModelError(
                f"{said}. Argument {argument} of the model is NaN at index {index}, and {int(value.isnan().sum())} of "
                f"its {value.numel()} values are. Leave these observations out, of all columns, or fill them in:\n"
                f"    keep = ~{argument}.isnan()\n    {argument} = {argument}[keep]"
            )
    return ModelError(f"{said}. Are values missing in the data? This says where:\n    data.isnan().nonzero()")


def observed(trace: Any) -> list[Any]:
    """Return the nodes of the observed sites of a trace."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and node["is_observed"]]
    return [node for node in nodes if not site_is_subsample(node) and not is_imputed(node)]


def _after(trace: Any, with_dtype: bool = False) -> str:
    """Where in the model that was: after its last site."""
    sites = _samples(trace)
    if not sites:
        return ""
    return f" after site '{sites[-1]['name']}'" + (f" ({sites[-1]['value'].dtype})" if with_dtype else "")


def of_density(error: Exception, trace: Any) -> ModelError | None:
    """Explain what the densities of a run raised; None where no site has data of a dtype that it cannot take.

    :param Exception error: of torch.
    :param trace: of the run.
    """
    if not (isinstance(error, RuntimeError) and _DTYPES.search(str(error))):
        return None
    for node in _samples(trace):
        floating = node["value"].to(torch.get_default_dtype())
        if node["is_observed"] and (problem := _problem(node, node["value"])) and not _problem(node, floating):
            return ModelError(
                f"observed site '{node['name']}' ({type(node['fn']).__name__}) has data of {node['value'].dtype}, "
                f"which its density cannot take: {problem.rstrip('.')}. Make them floating-point numbers:\n"
                f"    pyro.sample('{node['name']}', ..., obs=data.to(torch.get_default_dtype()))"
            )
    return None


def _problem(node: Any, value: Tensor) -> str:
    """What torch says of the density of a value at a site; nothing if it has one."""
    try:
        node["fn"].log_prob(value)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _samples(trace: Any) -> list[Any]:
    """The sites that have a value with a dtype."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and not site_is_subsample(node)]
    return [node for node in nodes if isinstance(node["value"], Tensor)]
