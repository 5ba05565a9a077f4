"""A journal of what a computation has found, so that an interrupted one can be taken up and go the same way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from laplace_amort.errors import ResumeError

__all__ = ["AT_START", "Journal", "same_start"]

AT_START = "log joint at the start"  # the label of what every fit finds first

_LIMIT = "out of steps: "
# What two values of a log joint may differ by, as a share, and be those of one model at the same data: other versions
# and other numbers of threads add up in other orders.
_ROUNDING = 1e-9


def same_start(before: float, now: float) -> None:
    """Refuse a model or data that are not those of a saved fit.

    :param float before: log joint at the start of the saved fit.
    :param float now: of the model at hand, there.
    :raises ResumeError: if they differ.
    """
    near = abs(before - now) <= _ROUNDING * (1 + abs(before))
    if not (near or before == now or (math.isnan(before) and math.isnan(now))):
        raise ResumeError(
            f"the saved fit went another way than this one: its log joint at the start is {before:.12g}, and here it "
            f"is {now:.12g}. Are data, model, seed or versions others? Start anew:\n    fit(model, *args)"
        )


class Journal:
    """The results of all expensive calls, in their order; a second run reads them instead of computing them again.

    What lies between the calls must follow from their results alone, as an optimizer of SciPy does. Then the second run
    arrives where the first was interrupted, in next to no time and with the same numbers, and goes on.

    Do not let a call depend on anything else that changes, unless it is part of ``state``.

    :param entries: of the run before; what is added goes into a new list.
    :param state: what ``put`` gets before the first call that is not in the entries.
    :param take: returns what the calls depend on besides their arguments, to keep after each.
    :param put: brings that back.

    Example::

        >>> first = Journal()
        >>> first.call("square of 3", lambda: 9)
        9
        >>> second = Journal(first.entries)
        >>> second.call("square of 3", lambda: 1 / 0)
        9
        >>> second.call("square of 4", lambda: 16)
        16
    """

    def __init__(
        self,
        entries: list[tuple[str, Any]] | None = None,
        state: Any = None,
        take: Callable[[], Any] = lambda: None,
        put: Callable[[Any], None] = lambda state: None,
    ) -> None:
        self.entries = list(entries or [])
        self.state = state
        self._take, self._put = take, put
        self._position = 0

    @property
    def replaying(self) -> bool:
        """Whether the next call is one of the run before."""
        return self._position < len(self.entries)

    def end_of_steps(self, label: str) -> None:
        """Note that a search has taken all the steps it may take: a run that may take more goes on from here.

        :param str label: of the search.
        """
        self.call(f"{_LIMIT}{label}", lambda: None)

    def call(self, label: str, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` returned the last time, or what it returns now.

        :param str label: what is computed, and for which arguments.
        :param compute: without arguments; its result must be something that ``torch.save`` can keep.
        :raises ResumeError: if the last run had something else in this place.
        """
        self._go_beyond(label)
        if self.replaying:
            found, result = self.entries[self._position]
            if found != label:
                raise ResumeError(
                    f"the saved fit went another way than this one: it has '{found}' where this one has '{label}'. Are "
                    "data, model, guide, settings or versions others? Start anew:\n    fit(model, *args)"
                )
            self._position += 1
            if not self.replaying:
                self._put(self.state)
            return result
        result = compute()
        self.entries.append((label, result))
        self._position += 1
        self.state = self._take()
        return result

    def _go_beyond(self, label: str) -> None:
        """Leave out what the last run did when its steps were spent, where this one has more of them."""
        if self.replaying and self.entries[self._position][0].startswith(_LIMIT) and not label.startswith(_LIMIT):
            del self.entries[self._position :]
            self._put(self.state)
