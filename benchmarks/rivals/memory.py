"""Peak memory of what a process does after a point, from ``/proc`` (Linux).

``ru_maxrss`` does not serve: it cannot be reset, and a process inherits that of the one which started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")


def _mebibytes(key: str) -> float:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


class Peak:
    """Growth of the resident set since it was made; ``None`` where there is no ``/proc``."""

    def __init__(self) -> None:
        self.before: float | None = None
        if _STATUS.exists():
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is freed but kept would hide growth
            self.restart()
            self.before = _mebibytes("VmRSS")
        self.highest: float | None = None

    def restart(self) -> None:
        """Forget what was the peak since the last call of :meth:`growth`."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def growth(self) -> float | None:
        """In MiB, at the peak until now, without what was forgotten."""
        if self.before is None:
            return None
        self.highest = max(self.highest or 0.0, _mebibytes("VmHWM") - self.before)
        return self.highest
