"""Which data a distribution of the model does not know: what a log density of minus infinity often comes from."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger

__all__ = ["Supports"]


class Supports(Messenger):
    """Looks at observed sites while a model runs; ``found`` is the first value outside its support, in words.

    It is no more than a suspicion: a support may depend on a latent, whose value in this run is one of many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.found or not msg["is_observed"] or msg["mask"] is not None:
            return
        try:
            inside = msg["fn"].support.check(msg["value"])
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):  # it has no support to speak of
            return
        outside = torch.nonzero(~torch.as_tensor(inside))
        if len(outside):
            index = tuple(outside[0].tolist())
            value = torch.as_tensor(msg["value"])
            if len(index) == value.dim():  # not of vectors
                value = value[index]
            self.found = (
                f"Site '{msg['name']}' observes {value.tolist()} at {list(index)} (counted from 0), which is outside "
                f"the support of its {type(msg['fn']).__name__}; {len(outside)} such in all"
            )
