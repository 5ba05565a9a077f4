"""Enumerations whose members are sentences. They know no torch: the command line has some before any model."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """Base of enumerations whose members are pairs of a code and a sentence; ``str(status)`` is the sentence.

    Example::

        >>> class Answer(Status):
        ...     YES = 0, "it is so"
        >>> print(Answer(0))
        it is so
    """

    sentence: str

    def __new__(cls, code: int, sentence: str) -> Status:
        """Attach the sentence to its code."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.sentence = sentence
        return member

    def __str__(self) -> str:
        return self.sentence
