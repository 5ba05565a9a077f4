"""In which precision a function of the user's computes: as it is written, or in double whatever its tensors are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from laplace_amort.types import default_dtype

__all__ = ["Arithmetic", "AsWritten", "InDouble", "narrowed"]

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_WIDE_TYPES = {f"torch.{kind}Tensor": torch.float64 for kind in ("Float", "Half", "BFloat16")}  # as Tensor.type has it
# Operations that would make less of a number, and what is done instead.
_INSTEAD: dict[Any, Any] = {
    Tensor.float: Tensor.double,
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
}
# Questions about a tensor that have the same answer in any precision, and need no copy to answer.
_ABOUT = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "ndim", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "is_sparse")
    ),
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.data_ptr,
    Tensor.__hash__,
}
_WRITES = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}


class Arithmetic(Protocol):
    """A context that functions of the user's run in, again inside itself too."""

    def __enter__(self) -> Any:
        """Begin."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """End."""

    def of(self, value: Any) -> Any:
        """Return an argument as a function is to have it: a tensor, or tensors in lists and dictionaries."""


class AsWritten:
    """Let a function compute as it does."""

    def __enter__(self) -> None:
        """Change nothing."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Change nothing."""

    def of(self, value: Any) -> Any:
        """Return the argument as it is."""
        return value


class InDouble:
    """Let a function compute in double precision, whatever the precision of its arguments and constants.

    Inside, the default dtype is ``float64``. Every tensor of a lower precision is converted where it is used, wherever
    it comes from; what asks for a lower precision by name gets double. So what is computed from data is computed from
    their exact values, and not converted afterwards.

    Do not use it around a function that does its arithmetic outside of torch's Python: what is scripted or compiled
    keeps the precision it was written in, as does NumPy. :func:`narrowed` sees where torch loses digits.

    :param leaves: pairs of a tensor, such as a parameter, and the one in double precision to take for it.

    Example::

        >>> data = torch.tensor([0.1], dtype=torch.float32)
        >>> with InDouble():
        ...     print((data.float() * torch.tensor(3.0)).dtype, torch.zeros(1, dtype=torch.float32).dtype)
        torch.float64 torch.float64
    """

    def __init__(self, leaves: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self.leaves = list(leaves)
        self._mode = _Converting(self.leaves)
        self._open = ExitStack()
        self._depth = 0

    def __enter__(self) -> None:
        """Begin; inside itself this does nothing."""
        self._depth += 1
        if self._depth == 1:
            self._open.enter_context(default_dtype(torch.float64))
            self._open.enter_context(self._mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End, with the default dtype as it was."""
        self._depth -= 1
        if not self._depth:
            self._open.close()

    def of(self, value: Any) -> Any:
        """Return an argument with all tensors in it in double precision."""
        return tree_map_only(Tensor, self._mode.converted, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        return {"leaves": self.leaves}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["leaves"])  # type: ignore[misc]


class _Converting(TorchFunctionMode):
    """Convert the tensors that a function of torch is called with, and the dtypes."""

    def __init__(self, leaves: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.twins = {id(leaf): twin for leaf, twin in leaves}
        self.constants = WeakIdKeyDictionary()  # with the version that was converted: data may change in place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            return func(*args, **kwargs)
        if _writes(func) and args and isinstance(args[0], Tensor):  # what is written to stays the tensor that it is
            return func(args[0], *map(self._wide, args[1:]), **kwargs)
        wide = {name: part if name == "out" else self._wide(part) for name, part in kwargs.items()}
        return _INSTEAD.get(func, func)(*map(self._wide, args), **wide)

    def _wide(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            return self.converted(part)
        if isinstance(part, torch.dtype):
            return _WIDE.get(part, part)
        if isinstance(part, str):
            return _WIDE_TYPES.get(part, part)
        if type(part) in (list, tuple):
            return type(part)(self._wide(one) for one in part)
        return part

    def converted(self, tensor: Tensor) -> Tensor:
        """Return a tensor in double precision: its twin, or a copy that is made once."""
        if tensor.dtype not in _WIDE:
            return self.twins.get(id(tensor), tensor)
        if id(tensor) in self.twins:
            return self.twins[id(tensor)]
        wide: Tensor
        if tensor.requires_grad or tensor.is_inference():
            wide = tensor.to(_WIDE[tensor.dtype])
            return wide
        version, wide = self.constants.get(tensor, (None, tensor))
        if version != tensor._version:
            wide = tensor.to(_WIDE[tensor.dtype])
            if not _is_passing():
                self.constants[tensor] = tensor._version, wide
        return wide


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


def _is_passing() -> bool:
    """Whether tensors made now are only good for now: under ``inference_mode``, or in a transform of torch.func."""
    return torch.is_inference_mode_enabled() or torch._C._functorch.peek_interpreter_stack() is not None


def narrowed(function: Callable[[], Any]) -> tuple[Any, str]:
    """Call a function, and see whether it makes less of a number in double precision on the way.

    :param function: without arguments.
    :return: what it returns; and the name of the first operation that did, empty if none.
    """
    seen = _Narrowing()
    with seen:
        result = function()
    return result, seen.first


class _Narrowing(TorchDispatchMode):
    """Look for operations with a number in double precision among the arguments, and a result in a lower one."""

    first = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see the Recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # or this would be told that everything is in double precision
            result = func(*args, **(kwargs or {}))
            into = {part.dtype for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
            out = {part.dtype for part in tree_leaves(result) if isinstance(part, Tensor)}
        if not self.first and not into.isdisjoint(_WIDE.values()) and not out.isdisjoint(_WIDE):
            self.first = str(func)
        return result
