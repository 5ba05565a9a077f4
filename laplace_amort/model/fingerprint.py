"""What a call of a model depends on besides its latents, as far as it can be seen: whether two calls are the same.

Data, numbers and settings are constants of a recording. Tensors show by a counter that they were written to; numbers
are compared, in arguments and in whatever the code of a model names: variables of functions around it, of its file,
attributes of its object. What cannot be seen in an argument makes every call another.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from laplace_amort.autodiff import state_of

__all__ = ["Fingerprint"]

_ATOMS = (int, str, bytes, bool, type(None), complex, numpy.generic, torch.dtype, torch.device, Enum)
_FIXED = (types.ModuleType, type, types.BuiltinFunctionType)
# Bytes of an array that are compared, and things that are looked at.
_BYTES, _THINGS = 10_000, 1000
# Code that is not the user's.
_LIBRARIES = ("torch", "pyro", "numpy", "laplace_amort", "builtins")


class _Unseen(Exception):
    """Something may change without showing it."""


class Fingerprint:
    """What is seen of one call.

    :param model: a Pyro model.
    :param tuple args: positional arguments of the model.
    :param dict kwargs: its keyword arguments.

    Attribute: ``complete``, whether every argument shows when it changes. Of what surrounds the model, in closures,
    in its file or on its object, numbers, texts and tensors are seen, and no more.

    Example::

        >>> data = torch.zeros(2)
        >>> before = Fingerprint(print, (data, 0.5), {})
        >>> before.matches(Fingerprint(print, (data, 0.5), {})), before.matches(Fingerprint(print, (data, 0.7), {}))
        (True, False)
        >>> data[0] = 1
        >>> before.matches(Fingerprint(print, (data, 0.5), {}))
        False
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.seen: list[object] = [torch.get_default_dtype()]
        self.alive: list[weakref.ref[Any]] = []
        self._entered: set[int] = set()
        self.complete = True
        try:
            self._value(args)
            self._value(kwargs)
        except _Unseen:
            self.complete = False
            return
        self._surroundings(model)

    def matches(self, other: Fingerprint) -> bool:
        """Tell whether another call is the same, as far as both are seen."""
        return self.complete and self.seen == other.seen and all(reference() is not None for reference in self.alive)

    def _value(self, value: Any) -> None:
        """Look at an argument, or at anything in it.

        :raises _Unseen: if it may change without showing it.
        """
        if len(self.seen) > _THINGS:
            raise _Unseen
        if self._plain(value):
            return
        if isinstance(value, list | tuple | Mapping):
            self.seen += [type(value), len(value)]
            for part in value.items() if isinstance(value, Mapping) else value:
                self._value(part)
        elif isinstance(value, numpy.ndarray) and value.nbytes <= _BYTES and value.dtype != object:
            self.seen += [value.shape, value.dtype, value.tobytes()]
        elif isinstance(value, nn.Module | types.FunctionType | types.MethodType):
            self._surroundings(value)
        else:
            raise _Unseen

    def _plain(self, value: Any) -> bool:
        """Look at a tensor or a number; return whether it is one."""
        if isinstance(value, Tensor):
            self.seen += [id(value), state_of(value)]
            self.alive.append(weakref.ref(value))
        elif isinstance(value, float):
            self.seen.append(value.hex())  # NaN is itself
        elif isinstance(value, _ATOMS):
            self.seen += [type(value), value]
        elif isinstance(value, _FIXED):
            self.seen.append(id(value))
        else:
            return False
        return True

    def _surroundings(self, value: Any, names: frozenset[str] = frozenset()) -> None:
        """Look at something around the model; of an object, at attributes of these names."""
        if len(self.seen) > _THINGS or self._plain(value) or id(value) in self._entered:
            return
        self._entered.add(id(value))
        if isinstance(value, types.MethodType):  # another object whenever it is asked for
            self.seen += [id(value.__func__), id(value.__self__)]
            self._code(value.__func__, value.__self__)
            return
        self.seen.append(id(value))
        if isinstance(value, types.FunctionType):
            self._code(value, None)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._surroundings(part)
        elif isinstance(value, nn.Module):
            self._module(value, names)
        elif isinstance(value, list | tuple | dict):
            self.seen.append(len(value))
            for part in value.values() if isinstance(value, dict) else value:
                self._surroundings(part, names)
        elif isinstance(value, numpy.ndarray):
            self.seen += [value.tobytes()] if value.nbytes <= _BYTES and value.dtype != object else []
        else:
            self._attributes(value, names or frozenset(getattr(value, "__dict__", ())))
            called = _on_class(value, "__call__")
            if isinstance(called, types.FunctionType):
                self._code(called, value)

    def _code(self, function: Any, owner: Any) -> None:
        """Look at what the code of a function names."""
        if function.__module__ and function.__module__.partition(".")[0] in _LIBRARIES:
            return
        names = _names_in(function.__code__)
        inner = [function.__defaults__, function.__kwdefaults__, getattr(function, "__wrapped__", None)]
        for cell in function.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
        inner += [function.__globals__[name] for name in names if name in function.__globals__]
        for value in inner:
            self._surroundings(value, names)
        if owner is not None:
            self._attributes(owner, names)

    def _attributes(self, owner: Any, names: frozenset[str]) -> None:
        """Look at attributes and methods of an object that a code may mean."""
        held = getattr(owner, "__dict__", {})
        for name in sorted(names):
            found = held[name] if name in held else _on_class(owner, name)
            if isinstance(found, types.FunctionType) and name not in held:
                if id(found) not in self._entered:
                    self._entered.add(id(found))
                    self._code(found, owner)
            elif found is not None:
                self._surroundings(found, names)

    def _module(self, module: nn.Module, names: frozenset[str]) -> None:
        """Look at all of a network, and at its code."""
        if isinstance(module, AutoGuide):  # which changes whenever it is called, and is not what a model is made of
            return
        self.seen.append(module.training)
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                self._plain(tensor)
        for value in vars(module).values():
            if isinstance(value, int | float | str):
                self._plain(value)
        for inner in module._modules.values():
            self._surroundings(inner)
        forward = _on_class(module, "forward")
        if isinstance(forward, types.FunctionType):
            self._code(forward, module)
        self._attributes(module, names)


def _names_in(code: types.CodeType) -> frozenset[str]:
    """All names that a code and the functions in it look up elsewhere."""
    inner = [_names_in(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _on_class(owner: Any, name: str) -> Any:
    """What the class of an object has under a name: a method, the function behind a property, or a value."""
    found = next((vars(parent)[name] for parent in type(owner).__mro__ if name in vars(parent)), None)
    return found.fget if isinstance(found, property) else found
