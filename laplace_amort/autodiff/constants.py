"""Tensors that were there before a function ran: whether they still are what they were."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

__all__ = ["Seen", "state_of"]


def state_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what of a tensor shows that it was written to, or given other memory; it equals no other if nothing does.

    Of what requires a gradient it is nothing but that: optimizers write to it, and recordings read its value.

    Example::

        >>> import torch
        >>> data = torch.zeros(2)
        >>> before = state_of(data)
        >>> data[0] = 1
        >>> state_of(data) == before
        False
    """
    if tensor.requires_grad:
        return ("requires_grad",)
    try:
        return (tensor._version, tensor.data_ptr(), tensor.shape)
    except RuntimeError:  # made under inference mode, sparse, or wrapped by a transform: nothing shows
        return (object(),)


class Seen(NamedTuple):
    """A tensor as it was; it is not kept alive.

    :param weakref.ref reference: to it.
    :param tuple state: of :func:`state_of`.
    """

    reference: weakref.ref[Tensor]
    state: tuple[object, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Seen:
        """Return a tensor as it is now."""
        return cls(weakref.ref(tensor), state_of(tensor))

    @property
    def unchanged(self) -> bool:
        """Whether it is there, and is what it was."""
        tensor = self.reference()
        return tensor is not None and state_of(tensor) == self.state
