"""Print the results as tables in reStructuredText: ``python benchmarks/rivals/table.py results.csv``.

A table for each task and size; every number is the median over the seeds. Rows that failed say why, below the table.
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


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    with parser.parse_args().results.open(encoding="utf-8", newline="") as file:
        print("\n\n".join(tables(list(csv.DictReader(file)))))


if __name__ == "__main__":
    main()
