"""What goes wrong in a user's model, in words that name the site and have the line to type."""

from __future__ import annotations

import re
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.errors import LaplaceAmortError, ModelError

__all__ = ["of_density", "of_run"]

# How torch says that an operation got tensors of two dtypes.
_DTYPES = re.compile(r"\bdtype|scalar type|can't be cast", re.IGNORECASE)
_OUTSIDE = re.compile(r"Shape mismatch inside plate\('(.+)'\) at site (\S+) dim -\d+, (\d+) vs (\d+)")


def of_run(error: Exception, trace: Any) -> ModelError | None:
    """Explain what a run of a model raised; None where its own message is the best.

    :param Exception error: of Pyro or torch.
    :param trace: of the sites before it.
    """
    if isinstance(error, LaplaceAmortError):
        said, shapes, _ = str(error).partition("\nTrace Shapes:")  # which Pyro appends, and which names no more sites
        return ModelError(said) if shapes and type(error) is ModelError else None
    line = str(error).split("\n")[0]
    mismatch = _OUTSIDE.search(line)
    if mismatch:
        plate, site, size, found = mismatch.groups()
        return ModelError(
            f"site '{site}' has {found} elements, and lies in plate '{plate}' of size {size}. Observations of which "
            "there are several for each unit have a plate of their own, beside that of the units, and look their unit "
            f"up:\n    with pyro.plate('{site}_plate', {found}):\n"
            f"        pyro.sample('{site}', dist...(y[unit_of_each]), obs={site})"
        )
    if isinstance(error, RuntimeError) and _DTYPES.search(line):
        sites = _samples(trace)
        after = f" after site '{sites[-1]['name']}' ({sites[-1]['value'].dtype})" if sites else ""
        return ModelError(
            f"the model puts tensors of different dtypes together{after}: {line}. Latents have the dtype of their "
            f"distributions, dist.Normal(0., 1.) the default, which is {torch.get_default_dtype()}. Give data the "
            "same, or make another the default before the model runs first:\n"
            "    data = data.to(torch.get_default_dtype())\n"
            "    torch.set_default_dtype(torch.float64)"
        )
    return None


def of_density(error: Exception, trace: Any) -> ModelError | None:
    """Explain what the densities of a run raised; None where no site has data of a dtype that it cannot take.

    :param Exception error: of torch.
    :param trace: of the run.
    """
    if not _DTYPES.search(str(error)):
        return None
    for node in _samples(trace):
        floating = node["value"].to(torch.get_default_dtype())
        if node["is_observed"] and (problem := _problem(node, node["value"])) and not _problem(node, floating):
            return ModelError(
                f"observed site '{node['name']}' ({type(node['fn']).__name__}) has data of {node['value'].dtype}, "
                f"which its density cannot take: {problem}. Make them floating-point numbers:\n"
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
