"""What a guide needs to be stored and copied: parameters in Pyro's store, and a model that may stay behind."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from pyro.nn import PyroModule, PyroParam
from pyro.nn.module import to_pyro_module_
from torch import nn

__all__ = ["NoContext", "apart_from_store", "copied_with", "follow_store", "is_importable"]


def follow_store(strategy: Any) -> Any:
    """Let parameters of a strategy be read from Pyro's store as the guide's own are; a plain module's are not."""
    if isinstance(strategy, nn.Module):
        to_pyro_module_(strategy)
        for module in strategy.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, PyroParam(value.detach()))
    return strategy


class NoContext:
    """In the place of what tells a module of Pyro's that its parameters are those of the store."""

    active, used = 0, False

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def apart_from_store(strategy: Any) -> Any:
    """Return a copy of a strategy, whose parameters are its own whatever the store has."""
    copied = copy.deepcopy(strategy)
    if isinstance(copied, nn.Module):
        for module in copied.modules():
            if isinstance(module, PyroModule):
                vars(module)["_pyro_context"] = NoContext()
    return copied


def copied_with(model: Any, memo: Mapping[int, Any]) -> Any:
    """Return the copy of a model that is copied together with its guide, as a part of one module; else the model."""
    owner = getattr(model, "__self__", model)
    if id(owner) not in memo:
        return model
    return memo[id(owner)] if owner is model else getattr(memo[id(owner)], model.__name__)


def is_importable(model: Any) -> bool:
    """Tell whether pickle can store a model: a module, a method of one, or a function that is found under its name."""
    if isinstance(getattr(model, "__self__", model), nn.Module):
        return True
    found: Any = sys.modules.get(getattr(model, "__module__", None) or "")
    for part in getattr(model, "__qualname__", "?").split("."):
        found = getattr(found, part, None)
    return found is model
