"""Doors that open when somebody comes: a package imports a file of its own when a name is first asked of it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["opened_on_demand"]


def opened_on_demand(door: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and the ``__dir__`` of a package that imports nothing before a name is asked for.

    Its modules and rooms are found as well, so that ``import laplace_amort; laplace_amort.linalg`` works.

    :param str door: name of the package.
    :param names: that it hands on, divided by spaces, by the module below it that each is taken from.
    """
    origin = {name: module for module, taken in names.items() for name in taken.split()}

    def find(name: str) -> Any:
        if name in origin:
            found = getattr(importlib.import_module(f"{door}.{origin[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{door}.{name}"):
            found = importlib.import_module(f"{door}.{name}")
        else:
            raise AttributeError(f"module {door!r} has no attribute {name!r}")
        setattr(sys.modules[door], name, found)  # so that nobody asks again
        return found

    def everything() -> list[str]:
        return sorted({*vars(sys.modules[door]), *origin})

    return find, everything
