"""What one run of a model shows of it: its parameters, and whether its data are possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.model import messages

__all__ = ["FirstRun"]


class FirstRun:
    """A run of a model at a feasible point, of which only what may be asked for is kept.

    :param trace: of the run; it is let go once its data have been checked.
    """

    def __init__(self, trace: Any) -> None:
        self._params = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "param"}
        self._indices = {name: node["value"] for name, node in trace.nodes.items() if site_is_subsample(node)}
        self._unchecked = trace

    def check_data(self) -> None:
        """Refuse data that no latents make possible.

        :raises ModelError: naming site, index and value.
        """
        if self._unchecked is not None:
            messages.refuse_impossible_data(self._unchecked)
            self._unchecked = None

    def parameters(self) -> dict[str, Tensor]:
        """Return the unconstrained leaves of the parameters of the model, by name."""
        leaves = {name: value.unconstrained() for name, value in self._params.items()}
        return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def had(self, indices: Mapping[str, Tensor]) -> bool:
        """Tell whether the plates of the run had these indices."""
        ran = self._indices
        return all(name in ran and torch.equal(ran[name].to(wanted.device), wanted) for name, wanted in indices.items())
