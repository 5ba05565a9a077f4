"""Run one rival on one task and print a JSON object of result columns, on the last line of the output.

``python benchmarks/rivals/worker.py --task poisson --units 1000 --seed 0 --rival pyro-AutoNormal``;
``--estimates FILE`` saves the estimates too, if the rival has them. Whatever goes wrong is in ``status``, which is "ok"
otherwise. ``run.py`` starts a process of this for each row.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from memory import Peak
from outcome import Estimates, NotInstalledError
from registry import RIVALS
from tasks import KINDS, Task

PACKAGES = ("laplace_amort", "torch", "pyro-ppl", "funsor", "numpyro", "jax", "jaxlib", "numpy", "scipy")


def outcome_of(task: Task, rival: str, estimates: Path | None) -> dict[str, Any]:
    """Result columns, ``status`` among them."""
    entry = RIVALS[rival]
    reason = entry.left_out(task.name, task.units)
    if reason:
        return {"status": reason}
    try:
        function = entry.load()
        # Only what the fit adds to the interpreter, the packages and the data is its memory.
        task.arrays  # noqa: B018
        peak = Peak()
        result = function(task)
    except NotInstalledError as error:
        return {"status": f"not installed: {error}"}
    except Exception as error:
        return {"status": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    result.setdefault("peak_mib", peak.growth())
    saved: Estimates | None = result.pop("estimates", None)
    if saved and estimates:
        saved.save(estimates, task)
    parts = [result.get(f"{part}_seconds") or 0.0 for part in ("setup", "fit", "se")]
    return {"status": "ok", **result, "total_seconds": sum(parts)}


def versions() -> str:
    """Python and the packages of Python that are loaded."""
    modules = {"pyro-ppl": "pyro"}
    loaded = [name for name in PACKAGES if modules.get(name, name) in sys.modules]
    return "; ".join([f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in loaded)])


def plain(value: Any) -> Any:
    """A value as JSON has it: no NaN, nothing of NumPy."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=KINDS, required=True)
    parser.add_argument("--units", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rival", choices=RIVALS, required=True)
    parser.add_argument("--estimates", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    result = outcome_of(Task(chosen.task, chosen.units, chosen.seed), chosen.rival, chosen.estimates)
    found = [versions(), *filter(None, [result.pop("versions", None)])]
    print(json.dumps({**{key: plain(value) for key, value in result.items()}, "versions": "; ".join(found)}))


if __name__ == "__main__":
    main()
