"""A CSV file as tensors: one for each column, with nothing missing and nothing guessed in silence."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy

from laplace_amort.cli.exits import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Column", "Table", "read_table"]

_MISSING = {"", "na", "n/a", "nan", "+nan", "-nan", "null", "."}
_TRUTH = {"false": "0", "true": "1"}
_SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "space": " "}
_NAMED = 5  # of many labels, and of what is missing in a complaint


@dataclass(frozen=True)
class Column:
    """One column as numbers.

    :param str name: its name in the first line.
    :param numpy.ndarray values: of 64 bits: floating point numbers, or integers where all are whole.
    :param tuple labels: of a column of words: ``values`` are positions in this sorted list of them. Empty for numbers.
    """

    name: str
    values: numpy.typing.NDArray[numpy.generic]
    labels: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether all are whole numbers, or codes of words."""
        return bool(self.values.dtype == numpy.int64)

    def tensor(self, as_index: bool) -> Tensor:
        """Return the values, ``(num_rows,)``.

        :param bool as_index: integers, for a column of whole numbers; otherwise the default dtype of torch.
        """
        import torch  # only for a model: what is wrong with a table is told without it

        values = torch.from_numpy(self.values.copy())
        return values if as_index and self.is_whole else values.to(torch.get_default_dtype())

    def gap(self) -> int | None:
        """The first number from 0 on that is not among whole values; None if there is no gap below the largest."""
        found = numpy.unique(self.values)
        missing = numpy.flatnonzero(found != numpy.arange(len(found)))
        return int(missing[0]) if len(missing) else None

    def __str__(self) -> str:
        if self.labels:
            shown, more = ", ".join(self.labels[:_NAMED]), ", ..." * (len(self.labels) > _NAMED)
            return f"codes of {len(self.labels)} labels, {shown}{more}"
        low, high = (f"{value:g}" for value in (self.values.min(), self.values.max()))
        return f"{'whole ' if self.is_whole else ''}numbers from {low} to {high}"


@dataclass(frozen=True)
class Table:
    """The cells of a CSV file, as text.

    :param str source: where they are from, for complaints.
    :param list names: of the columns.
    :param list rows: for each the line of the file in which it ends, and its cells.
    """

    source: str
    names: Sequence[str]
    rows: Sequence[tuple[int, Sequence[str]]]

    def __len__(self) -> int:
        return len(self.rows)

    def without_missing(self, names: Iterable[str]) -> Table:
        """Return the rows in which no cell of these columns is missing."""
        at = [self.names.index(name) for name in names]
        kept = [(line, cells) for line, cells in self.rows if not any(_is_missing(cells[column]) for column in at)]
        if not kept:
            raise UsageError(f"{self.source}: something is missing in every row")
        return Table(self.source, self.names, kept)

    def check_complete(self, names: Sequence[str]) -> None:
        """Refuse missing cells in these columns.

        :raises UsageError: with line and column of the first of them, and what to type.
        """
        at = [(name, self.names.index(name)) for name in names]
        found = [
            f"line {line}, column '{name}': '{cells[column]}'"
            for line, cells in self.rows
            for name, column in at
            if _is_missing(cells[column])
        ]
        if found:
            raise UsageError(
                f"{self.source}: {len(found)} missing value{'s' * (len(found) > 1)}: {'; '.join(found[:_NAMED])}"
                f"{'; ...' * (len(found) > _NAMED)}. Fill them in, or leave these rows out:\n    --drop-missing"
            )

    def column(self, name: str, categorical: bool) -> Column:
        """Return a column, with nothing missing in it, as numbers.

        :param str name: of the column.
        :param bool categorical: whether to number its different values, as is done with words.
        :raises UsageError: if it has an infinite number.
        """
        at = self.names.index(name)
        cells = [row[at].strip() for _, row in self.rows]
        numbers = None if categorical else _numbers(cells)
        if numbers is None:
            labels = _sorted_labels(cells)
            code = {label: position for position, label in enumerate(labels)}
            return Column(name, numpy.array([code[cell] for cell in cells], dtype=numpy.int64), labels)
        if not numpy.isfinite(numbers).all():
            first = int(numpy.flatnonzero(~numpy.isfinite(numbers))[0])
            line, _ = self.rows[first]
            raise UsageError(f"{self.source}, line {line}, column '{name}': {cells[first]} is not finite")
        return Column(name, numbers)


def read_table(path: Path, separator: str | None = None) -> Table:
    """Read a CSV file whose first line has the names of its columns.

    :param path: of the file; ``-`` for standard input.
    :param separator: between cells, a character or ``comma``, ``semicolon``, ``tab`` or ``space``; by default a tab in
        a file that ends in ``.tsv``, and otherwise a comma.
    :raises UsageError: if there is no such file, or it is no table; with the line.
    """
    default = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    delimiter = default if separator is None else _SEPARATORS.get(separator, separator)
    if str(path) == "-":
        return _read(sys.stdin, "standard input", delimiter)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(file, str(path), delimiter)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8 (byte {error.start}): write it out again as UTF-8") from error


def _read(file: TextIO, source: str, delimiter: str) -> Table:
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
    try:
        # An empty line at the end is nothing.
        rows = [(reader.line_num, row) for row in reader if len(row) > 1 or "".join(row).strip()]
    except csv.Error as error:
        raise UsageError(f"{source}, line {reader.line_num}: {error}") from error
    if len(rows) < 2:
        raise UsageError(f"{source} has {'no rows below its first line' if rows else 'nothing in it'}")
    names = [name.strip() for name in rows[0][1]]
    _check_names(names, source, delimiter)
    for line, cells in rows[1:]:
        if len(cells) != len(names):
            raise UsageError(
                f"{source}, line {line}: {len(cells)} cells, and the first line names {len(names)} columns"
            )
    return Table(source, names, rows[1:])


def _check_names(names: list[str], source: str, delimiter: str) -> None:
    if len(names) == 1:
        other = next((name for name, one in _SEPARATORS.items() if one != delimiter and one in names[0]), None)
        if other is not None:
            raise UsageError(
                f"{source} has one column, '{names[0]}'. Is it separated otherwise?\n    --separator {other}"
            )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{source} has two columns of the name '{twice}'")
    if _numbers(names) is not None:
        raise UsageError(f"{source}: the first line must have the names of the columns; it has {', '.join(names[:8])}")


def _numbers(cells: list[str]) -> numpy.typing.NDArray[numpy.generic] | None:
    """The cells as whole numbers if all are, as floating point numbers if all are numbers, and otherwise None."""
    if all(cell.lower() in _TRUTH for cell in cells):
        cells = [_TRUTH[cell.lower()] for cell in cells]
    for kind, dtype in ((int, numpy.int64), (float, numpy.float64)):
        try:
            return numpy.array([kind(cell) for cell in cells], dtype=dtype)
        except (ValueError, OverflowError):
            pass
    return None


def _sorted_labels(cells: list[str]) -> tuple[str, ...]:
    """The different values in the order of numbers, if all are, or of words."""
    different = set(cells)
    try:
        return tuple(sorted(different, key=lambda cell: (float(cell), cell)))
    except ValueError:
        return tuple(sorted(different))


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in _MISSING
