"""How far our estimates are from those of TMB, where both have a row of the same task, size and seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from outcome import Estimates

REFERENCE = "TMB"
OURS = "laplace-amort MarginalLaplace"
COMPARISON_COLUMNS = (
    "global_difference",  # largest |difference of global estimates| / standard error of TMB
    "global_se_difference",  # largest relative difference of their standard errors
    "local_se_difference",  # and of those of the locals
)

Row = dict[str, Any]


def differences(ours: Estimates, reference: Estimates) -> dict[str, float]:
    """The comparison columns."""

    def relative(value: Any, of: Any) -> float:
        return float(np.max(np.abs(value / of - 1)))

    shift = np.abs(ours.global_loc - reference.global_loc) / reference.global_se
    return {
        "global_difference": float(np.max(shift)),
        "global_se_difference": relative(ours.global_se, reference.global_se),
        "local_se_difference": relative(ours.local_se, reference.local_se),
    }


def compare(rows: list[Row], path_of: Callable[[Row], Path]) -> None:
    """Write the comparison columns into our rows."""
    for row in rows:
        paths = path_of(row), path_of({**row, "rival": REFERENCE})
        if row["rival"] == OURS and all(path.exists() for path in paths):
            row.update(differences(*map(Estimates.load, paths)))
