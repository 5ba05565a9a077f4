"""Print the results as tables in reStructuredText: ``python benchmarks/rivals/table.py results.csv``.

A table for each task and size; every number is the median over the seeds. Rows that failed say why, below the table.
``--ratio TMB "laplace-amort MarginalLaplace"`` prints one table instead: how many times as long the first took as the
second, seed by seed, and how far their estimates are apart.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tabulate
from registry import RIVALS
from tasks import KINDS

# Heading by column, and the number of digits.
NUMBERS = {
    "setup_seconds": ("set up, s", ".2g"),
    "fit_seconds": ("fit, s", ".3g"),
    "se_seconds": ("errors, s", ".2g"),
    "total_seconds": ("total, s", ".3g"),
    "compile_seconds": ("compile, s", ".2g"),
    "steps": ("steps", ".0f"),
    "elbo": ("ELBO", ".2f"),
    "elbo_se": ("± SE", ".2g"),
    "objective": ("objective", ".4f"),
    "peak_mib": ("peak MiB", ".0f"),
    "global_difference": ("globals / SE", ".1e"),
    "global_se_difference": ("global SE", ".1e"),
    "local_se_difference": ("local SE", ".1e"),
}

DIFFERENCES = "global_difference", "global_se_difference", "local_se_difference"

Row = dict[str, Any]


def median(rows: list[Row], column: str) -> str:
    """Median over the rows that have the column, as text."""
    values = [float(row[column]) for row in rows if row.get(column)]
    return format(statistics.median(values), NUMBERS[column][1]) if values else ""


def tables(rows: list[Row]) -> Iterator[str]:
    """One block of text for each task and size."""

    def group(row: Row) -> tuple[int, int]:
        return list(KINDS).index(row["task"]), int(row["units"])

    for (task, units), members in itertools.groupby(sorted(rows, key=group), group):
        yield block(list(KINDS)[task], units, list(members))


def block(task: str, units: int, rows: list[Row]) -> str:
    """Title, table and notes."""
    order = [*RIVALS, *(row["rival"] for row in rows)]
    names = sorted({row["rival"] for row in rows}, key=order.index)
    by_rival = {name: [row for row in rows if row["rival"] == name] for name in names}
    fine = {name: [row for row in members if row["status"] == "ok"] for name, members in by_rival.items()}
    used = [column for column in NUMBERS if any(row.get(column) for members in fine.values() for row in members)]
    body = [[f"``{name}``", *(median(good, column) for column in used)] for name, good in fine.items() if good]
    headings = ["rival", *(NUMBERS[column][0] for column in used)]
    table = tabulate.tabulate(body, headings, "rst", disable_numparse=True, colalign=("left", *["right"] * len(used)))
    title = f"{task}, {units} units, {len({row['seed'] for row in rows})} seed(s)"
    return "\n".join([title, "~" * len(title), "", table, "", *notes(by_rival)])


def notes(by_rival: dict[str, list[Row]]) -> Iterator[str]:
    """What failed and why, once for each rival and reason."""
    for name, members in by_rival.items():
        for status in dict.fromkeys(row["status"] for row in members if row["status"] != "ok"):
            seeds = ", ".join(row["seed"] for row in members if row["status"] == status)
            yield f"- ``{name}`` (seed {seeds}): {status}"


def ratio_table(rows: list[Row], slower: str, faster: str) -> str:
    """Medians of both times and the range of their ratio over the seeds; and the largest of all differences."""
    done = {(row["task"], int(row["units"]), row["seed"], row["rival"]): row for row in rows if row["status"] == "ok"}
    cases = sorted({key[:2] for key in done}, key=lambda case: (list(KINDS).index(case[0]), case[1]))
    body = []
    for case in cases:
        pairs = [(done.get((*case, seed, slower)), done.get((*case, seed, faster))) for seed in _seeds(rows)]
        both = [(a, b) for a, b in pairs if a and b]
        if both:
            times = [[float(row["total_seconds"]) for row in column] for column in zip(*both, strict=True)]
            ratios = [a / b for a, b in zip(*times, strict=True)]
            worst = [_largest([b for _, b in both], column) for column in DIFFERENCES]
            medians = [format(statistics.median(column), ".3g") for column in times]
            body.append([*case, len(both), *medians, f"{min(ratios):.2g} to {max(ratios):.2g}", *worst])
    headings = ["task", "units", "seeds", f"{slower}, s", f"{faster}, s", "ratio"]
    return tabulate.tabulate(body, headings + [NUMBERS[c][0] for c in DIFFERENCES], "rst", disable_numparse=True)


def _seeds(rows: list[Row]) -> list[str]:
    return sorted({row["seed"] for row in rows})


def _largest(rows: list[Row], column: str) -> str:
    values = [float(row[column]) for row in rows if row.get(column)]
    return format(max(values), ".0e") if values else ""


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--ratio", nargs=2, metavar=("SLOWER", "FASTER"), choices=RIVALS)
    chosen = parser.parse_args()
    with chosen.results.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    print(ratio_table(rows, *chosen.ratio) if chosen.ratio else "\n\n".join(tables(rows)))


if __name__ == "__main__":
    main()
