"""The rivals in R: TMB with our templates, lme4 and glmmTMB. Python writes the data and reads the result."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from outcome import Estimates, NotInstalledError
from tasks import Task

HERE = Path(__file__).resolve().parent
# The newer framework of the two is twice as fast on these templates; -O3 gains some percent.
TMB_FRAMEWORK, TMB_FLAGS = "TMBad", "-O3"


def run_script(script: str, *arguments: str | Path) -> None:
    """Run an R script of this folder; its last lines become the error if it fails."""
    if shutil.which("Rscript") is None:
        raise NotInstalledError("Rscript")
    command = ["Rscript", "--vanilla", str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        missing = [line for line in lines if line.startswith("not installed: ")]
        if missing:
            raise NotInstalledError(missing[0].removeprefix("not installed: "))
        killed = " (out of memory?)" if done.returncode == -signal.SIGKILL else ""
        raise RuntimeError(f"{script}, exit status {done.returncode}{killed}: " + " | ".join(lines[-4:]))


def compiled_template(name: str) -> tuple[Path, float]:
    """The compiled template without its suffix, and the seconds it took, in this run or an earlier one."""
    source = HERE / "tmb" / f"{name}.cpp"
    key = hashlib.sha256(source.read_bytes() + (TMB_FRAMEWORK + TMB_FLAGS).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "laplace_amort_rivals" / key
    note = cache / "seconds"
    if not note.exists():
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, cache)
        start = time.perf_counter()
        run_script("tmb_compile.R", cache / source.name, TMB_FRAMEWORK, TMB_FLAGS)
        note.write_text(str(time.perf_counter() - start), encoding="ascii")
    return cache / name, float(note.read_text(encoding="ascii"))


def joint_nll(task: Task, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """TMB's negative log joint density at the rows of ``points (P, D)``, locals after globals, site by site."""
    library, _ = compiled_template(task.name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.write_csv(folder)
        np.savetxt(folder / "points.csv", points, delimiter=",", fmt="%.17g")
        run_script("tmb.R", task.name, "nll", folder, library)
        return np.loadtxt(folder / "nll.csv", ndmin=1)


def fit_tmb(task: Task) -> dict[str, Any]:
    """Fit by TMB: the Laplace approximation of the marginal likelihood, nlminb, sdreport."""
    library, compile_seconds = compiled_template(task.name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.write_csv(folder)
        run_script("tmb.R", task.name, "fit", folder, library)
        result = _read_result(folder)
        result["estimates"] = _read_estimates(task, folder)
    return {**result, "compile_seconds": compile_seconds}


def fit_lme4(task: Task, package: str, points: int) -> dict[str, Any]:
    """Fit by lme4 or glmmTMB, with the given number of quadrature points (1: Laplace)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.write_csv(folder)
        run_script("lme4.R", task.name, package, str(points), folder)
        return _read_result(folder)


def _read_result(folder: Path) -> dict[str, Any]:
    with (folder / "result.csv").open(encoding="utf-8", newline="") as file:
        result: dict[str, Any] = {row["key"]: row["value"] for row in csv.DictReader(file)}
    return {key: value if key in ("remark", "versions") else _number(value) for key, value in result.items()}


def _number(text: str) -> float | None:
    return None if text == "NA" else float(text)


def _read_estimates(task: Task, folder: Path) -> Estimates:
    global_, local = (
        np.loadtxt(folder / f"{part}.csv", delimiter=",", skiprows=1, ndmin=2).T for part in ("global", "local")
    )
    shape = (len(task.local_names), -1)
    return Estimates(global_[0], global_[1], local[0].reshape(shape), local[1].reshape(shape))
