"""Fit the tasks by every rival, each in a process of its own on one thread, and write a row for each to a CSV file.

``python benchmarks/rivals/run.py --tasks poisson --units 100 1000 --seeds 0 1 2 --out results.csv``. Within a seed and
a size the rivals take turns. Rows that the file has already are kept and not run again, unless they are of a tool that
was not installed, so that a run that was stopped goes on. Beside the file ``results.csv`` it writes
``results_estimates/`` with the estimates and ``results_versions.txt``; ``table.py`` prints tables of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare import COMPARISON_COLUMNS, compare
from convergence import BUDGET_VARIABLE
from outcome import RESULT_COLUMNS
from registry import RIVALS
from tasks import KINDS, SIZES

KEY = ("task", "units", "seed", "rival")
COLUMNS = (*KEY, "status", *RESULT_COLUMNS, *COMPARISON_COLUMNS)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")  # NPROC is for XLA
ONE_THREAD = {**dict.fromkeys(THREADS, "1"), "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}

Row = dict[str, Any]


def jobs(tasks: list[str], units: list[int] | None, seeds: list[int], rivals: list[str]) -> Iterator[Row]:
    """The keys of the rows, in the order in which they are run: of seeds, tasks, sizes and rivals."""
    for seed in seeds:
        for task in tasks:
            # Eight schools are eight.
            sizes = SIZES[task] if units is None or task == "eight_schools" else units
            for size in sizes:
                for rival in rivals:
                    if task in RIVALS[rival].tasks:
                        yield {"task": task, "units": size, "seed": seed, "rival": rival}


def estimates_path(out: Path, row: Row) -> Path:
    """Where the estimates of a row are saved."""
    name = "-".join(str(row[key]) for key in KEY).replace(" ", "_")
    return out.with_name(f"{out.stem}_estimates") / f"{name}.npz"


def run_worker(row: Row, estimates: Path, budget: float, timeout: float) -> Row:
    """Result columns of one row, whatever becomes of the process."""
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), "--estimates", str(estimates)]
    command += [part for key in KEY for part in (f"--{key}", str(row[key]))]
    environment = {**os.environ, **ONE_THREAD, BUDGET_VARIABLE: str(budget)}
    # A session of its own, so that a timeout also ends the R that a worker has started.
    worker = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = worker.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()
        return {"status": f"timed out after {timeout:.0f} s"}
    if worker.returncode == 0:
        return dict(json.loads(output.splitlines()[-1]))
    killed = " (out of memory?)" if worker.returncode == -signal.SIGKILL else ""
    last = (errors.strip().splitlines() or ["nothing on stderr"])[-1]
    return {"status": f"exit status {worker.returncode}{killed}: {last}"}


def read(path: Path) -> list[Row]:
    """The rows of an earlier run."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{**row, "units": int(row["units"]), "seed": int(row["seed"])} for row in csv.DictReader(file)]


def write(path: Path, rows: list[Row]) -> None:
    """Write all rows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_versions(path: Path, versions: set[str]) -> None:
    """Add the versions of everything that was run to the file, and what it was run on."""
    old = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
    machine = f"{platform.system()} {platform.machine()}, one thread of {os.cpu_count()} cores, {_processor()}"
    path.write_text("\n".join(sorted(old | versions | {machine})) + "\n", encoding="utf-8")


def _processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def shown(row: Row) -> str:
    """One line on a row."""
    key = " ".join(str(row[key]) for key in KEY)
    numbers = (("total_seconds", "s"), ("elbo", "nat"), ("objective", "nat"), ("peak_mib", "MiB"))
    return f"{key}: {row['status']} " + ", ".join(f"{float(row[k]):.6g} {u}" for k, u in numbers if row.get(k))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--units", type=int, nargs="+", help="sizes, by default those of tasks.SIZES")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="RIVAL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results.csv"))
    parser.add_argument("--budget", type=float, default=1800, help="seconds of training for the search of one VI rival")
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds for one row")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, and compare."""
    chosen = parse()
    out: Path = chosen.out
    rows = [row for row in read(out) if not row["status"].startswith("not installed")]
    done = {tuple(row[key] for key in KEY) for row in rows}
    for row in jobs(chosen.tasks, chosen.units, chosen.seeds, chosen.rivals):
        if tuple(row.values()) in done:
            continue
        estimates = estimates_path(out, row)
        estimates.parent.mkdir(parents=True, exist_ok=True)
        row |= run_worker(row, estimates, chosen.budget, chosen.timeout)
        print(shown(row), file=sys.stdout if row["status"] == "ok" else sys.stderr, flush=True)
        write_versions(out.with_name(f"{out.stem}_versions.txt"), set(filter(None, [row.pop("versions", None)])))
        rows.append(row)
        write(out, rows)
    compare(rows, lambda row: estimates_path(out, row))
    write(out, rows)


if __name__ == "__main__":
    main()
