"""What a run does with what it is given: whether its Python looks at values, and how much memory its results take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves

__all__ = ["Run", "is_validating", "watched"]

_READ = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
# Where torch's distributions check their parameters.
_DISTRIBUTION_INIT = torch.distributions.Distribution.__init__.__code__


class Run(NamedTuple):
    """What was seen of a run.

    :param result: what the function returned.
    :param str looked: the operation that took a value out of torch which follows from an argument, as a branch of
        Python does; empty if none did.
    :param int num_bytes: memory that the results of all operations take.
    :param list follows: for each tensor in the result, whether it follows from an argument by operations that return
        new tensors, also by such as no graph holds.
    """

    result: Any
    looked: str
    num_bytes: int
    follows: list[bool]


def watched(function: Callable[..., Any], *arguments: Tensor) -> Run:
    """Call a function, and see what it does with its arguments.

    :param function: of tensors.
    :param arguments: its arguments.
    """
    seen = _Watching(arguments)
    with seen, _Reading(seen):
        result = function(*arguments)
    return Run(result, seen.looked, seen.num_bytes, [seen._follows(part) for part in tree_leaves(result)])


class _Watching(TorchDispatchMode):
    """Follow what depends on some tensors through all operations."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.followed = {id(argument): argument for argument in arguments}  # an id is good while its tensor lives
        self.looked, self.num_bytes = "", 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see the Recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            follows = tree_any(self._follows, (args, kwargs))
            result = func(*args, **kwargs)
            parts = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
            self.num_bytes += sum(part.numel() * part.element_size() for part in parts)
        if follows:
            self.followed.update((id(part), part) for part in parts)
            if not parts and result is not None and not (result is True and is_validating()):
                self.looked = self.looked or str(func)
        return result

    def _follows(self, part: Any) -> bool:
        return isinstance(part, Tensor) and id(part) in self.followed


class _Reading(TorchFunctionMode):
    """Look for values that leave torch without an operation."""

    def __init__(self, seen: _Watching) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ and tree_any(self.seen._follows, args):
            self.seen.looked = self.seen.looked or f"Tensor.{func.__name__}"
        return func(*args, **(kwargs or {}))


def is_validating() -> bool:
    """Whether it is a distribution that asks, of its parameters or of a value: where it does not hold, it raises."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "_validate_sample" or frame.f_code is _DISTRIBUTION_INIT:
            return True
        frame = frame.f_back
    return False
