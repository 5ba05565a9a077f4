"""The drawing and the tables of the page on the house, made from the imports of the package itself.

``python docs/house.py`` writes ``docs/_static/house.svg`` and the tables in ``docs/house.rst``; a test compares. It
parses the package and does not import it. A new room needs a place in ``FLOORS``, and nothing else.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "laplace_amort"
PUBLIC = PACKAGE.name  # the package's own __init__, which hands names on: the front door
GROUND = ["errors", "types", "statuses", "doors"]  # all stand on it, so that arrows to it say nothing
_GROUND = ", ".join(GROUND)

# From the roof down: what a floor is called, its color, and its rooms in an order in which arrows point down.
FLOORS = [
    ("doors", "#b4552d", ["cli", "examples", PUBLIC, "plots", "testing"]),
    ("a fit, and what comes of it", "#a8862b", ["diagnostics", "fitting", "evidence", "posterior"]),
    ("the family", "#4d7a52", ["guide"]),
    ("Pyro comes in", "#3c7a89", ["model"]),
    ("tensors alone", "#3f5d8c", ["units", "autodiff", "linalg"]),
    ("ground", "#5c5f66", [_GROUND]),
]

# Sizes of the drawing: rooms step to the right on their way down, and a line of each goes down at its left.
_LEFT, _TOP, _STEP, _ROW, _GAP = 122, 18, 45, 44, 14
_WIDTH, _HEIGHT, _CORNER, _TEXT, _MARGIN = 116, 32, 9, 48, 312

_INK = "#33363b"
_STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;font-size:13px}"
    ".name{font-weight:bold;font-size:14px;fill:#fff;text-anchor:middle}"
    ".says{font-size:12px}.title{font-style:italic}.floor{fill-opacity:.09}"
    ".arrow{fill:none;stroke-width:1.7}.upward{fill:none;stroke:#d00;stroke-width:3}"
)
_LEGEND = "Follow the line down from a room: where it turns off, there it imports from."


def arrows(package: Path) -> set[tuple[str, str]]:
    """Return who imports whom, as pairs of rooms; the package's own ``__init__`` is a room of its name.

    :param Path package: its directory.
    """
    return {
        (room, other)
        for path in sorted(package.rglob("*.py"))
        for room in [_room(path.relative_to(package).with_suffix("").parts, package)]
        for other in _imported(path, package)
        if other != room
    }


def _room(parts: tuple[str, ...], package: Path) -> str:
    """The room of a module or of a name in one, by its path below the package."""
    first = parts[0] if parts else "__init__"
    there = (package / first).is_dir() or (package / f"{first}.py").is_file()
    return first if there and first != "__init__" else package.name


def _imported(path: Path, package: Path) -> Iterator[str]:
    """The rooms that a file imports from, also inside functions."""
    inside = (package.name, *path.relative_to(package).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: -node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        yield from (_room(tuple(name.split(".")[1:]), package) for name in names if name.split(".")[0] == package.name)


def sentence(path: Path) -> str:
    """Return the first sentence of what a file says of itself, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


def rooms(package: Path) -> dict[str, str]:
    """Return the rooms from the roof down, the ground left out, and the sentence of each.

    :raises ValueError: if a room has no place in ``FLOORS``.
    """
    placed = [room for _, _, names in FLOORS[:-1] for room in names]
    there = {path.parent.name for path in package.glob("*/__init__.py")} | {PUBLIC}
    there |= {path.stem for path in package.glob("*.py")} - {"__init__", *GROUND}
    if there != set(placed):
        raise ValueError(f"rooms and FLOORS differ in {sorted(there ^ set(placed))}: give each a place in {__file__}")
    return {room: sentence(package / ("" if room == PUBLIC else room) / "__init__.py") for room in placed}


class _Place(NamedTuple):
    """Where a room is drawn: the left edge of its box, the top of its row, and the color of its floor."""

    x: float
    top: float
    color: str

    @property
    def middle(self) -> float:
        return self.top + _ROW / 2

    @property
    def line(self) -> float:
        """Where the line goes down from the room."""
        return self.x + _STEP / 2 - 4


def _layout() -> tuple[dict[str, _Place], list[tuple[float, float]]]:
    """Each room a step down and to the right of the one before, the ground as broad as the house; and the floors."""
    places: dict[str, _Place] = {}
    floors: list[tuple[float, float]] = []
    y = float(_TOP)
    for _, color, names in FLOORS:
        floors.append((y, _ROW * len(names) + _GAP))
        for at, room in enumerate(names):
            x = _LEFT + _STEP * len(places) if names != FLOORS[-1][2] else _LEFT
            places[room] = _Place(x, y + _GAP / 2 + _ROW * at, color)
        y += floors[-1][1]
    return places, floors


def drawing(package: Path) -> str:
    """Return the rooms as SVG: a line goes down from each and turns off into every room that it imports from."""
    says, (places, floors) = rooms(package), _layout()
    parts = []
    for (title, color, _), (top, height) in zip(FLOORS, floors, strict=True):
        parts.append(f'<rect class="floor" y="{top}" width="{_width()}" height="{height}" fill="{color}"/>')
        parts += _lines(title, 14, top + height / 2, "title", color, 15)
    # The front door hands names on; that it imports from every room below would only hide who needs whom.
    pairs = (pair for pair in arrows(package) if pair[0] != PUBLIC and pair[1] not in GROUND)
    between = [(places.get(room, places[_GROUND]), places[other]) for room, other in pairs]
    parts += [_arrow(*pair) for pair in sorted(between)]  # those nearest to where they lead on top
    for room, place in places.items():
        width = _width() - _LEFT - 14 if room == _GROUND else _WIDTH
        parts += _box(room, place, width)
        parts += _lines(says.get(room, ""), place.x + _WIDTH + 12, place.middle, "says", _INK, _TEXT)
    parts += _lines(_LEGEND, _width() - _MARGIN, _TOP + _ROW, "says", _INK, _TEXT)
    height = sum(floors[-1]) + _TOP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_width()} {height}" role="img">'
    title = "<title>The rooms of laplace_amort, and who imports whom</title>"
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, title, f"<style>{_STYLE}</style>", white, *parts, "</svg>\n"])


def _width() -> int:
    steps = sum(len(names) for *_, names in FLOORS) - 2  # the ground takes none
    return _LEFT + _STEP * steps + _WIDTH + _MARGIN


def _box(name: str, place: _Place, width: float) -> list[str]:
    top = place.middle - _HEIGHT / 2
    return [
        f'<rect x="{place.x}" y="{top}" width="{width}" height="{_HEIGHT}" rx="5" fill="{place.color}"/>',
        f'<text class="name" x="{place.x + width / 2}" y="{place.middle + 5}">{escape(name)}</text>',
    ]


def _lines(text: str, x: float, middle: float, kind: str, color: str, width: int) -> list[str]:
    """Text in lines of so many characters, around the middle."""
    lines = textwrap.wrap(text, width)
    first = middle + 4.5 - 7.5 * (len(lines) - 1)
    return [
        f'<text class="{kind}" x="{x}" y="{first + 15 * at}" fill="{color}">{escape(line)}</text>'
        for at, line in enumerate(lines)
    ]


def _arrow(room: _Place, other: _Place) -> str:
    """A line down from one room, round a corner and into another; an upward one, which must not be, is red."""
    if other.top <= room.top:
        return f'<path class="upward" d="M{room.line} {room.middle} L{other.x + _WIDTH} {other.middle}"/>'
    x, y, tip = room.line, other.middle, other.x - 1
    corner = f"V{y - _CORNER} Q{x} {y} {x + _CORNER} {y}"
    line = f'<path class="arrow" stroke="{room.color}" d="M{x} {room.middle + _HEIGHT / 2} {corner} H{tip - 6}"/>'
    return f'{line}<path fill="{room.color}" d="M{tip - 7} {y - 4} L{tip} {y} L{tip - 7} {y + 4} Z"/>'


def rules(package: Path) -> str:
    """Return the table of who imports whom."""
    pairs = arrows(package)
    rows = [
        (f"``{room}``", ", ".join(f"``{other}``" for other in rooms(package) if (room, other) in pairs) or "nothing")
        for room in rooms(package)
        if room != PUBLIC
    ]
    return _table(("room", "imports from"), rows, (15, 85))


def files(package: Path) -> str:
    """Return what each room has, file by file."""
    parts = []
    for room, says in list(rooms(package).items())[::-1]:
        if room != PUBLIC:
            paths = sorted({*(package / room).rglob("*.py")} - {package / room / "__init__.py"})
            rows = [(f"``{_shown(path, package / room)}``", sentence(path).rstrip(".")) for path in paths]
            parts += [f"{room}\n{'~' * len(room)}\n\n{says}\n", _table(("file", "what is in it"), rows, (25, 75))]
    return "\n".join(parts)


def _shown(path: Path, room: Path) -> str:
    return path.relative_to(room).as_posix().removesuffix("__init__.py")


def _table(head: tuple[str, str], rows: list[tuple[str, str]], widths: tuple[int, int]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths[0]} {widths[1]}", ""]
    for left, right in [head, *rows]:
        lines += textwrap.wrap(f"   * - {left}", 118, subsequent_indent=" " * 7, break_on_hyphens=False)
        lines += textwrap.wrap(f"     - {right}", 118, subsequent_indent=" " * 7, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def page(text: str, package: Path) -> str:
    """Return the page with its tables as they are now: each stands between two comments that name it."""
    for name, made in [("rules", rules(package)), ("files", files(package))]:
        begin, end = f".. begin {name}: written by docs/house.py\n", f".. end {name}\n"
        before, rest = text.split(begin)
        text = before + begin + "\n" + made + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    """Write the drawing, and the tables on the page."""
    (DOCS / "_static" / "house.svg").write_text(drawing(PACKAGE), encoding="utf-8")
    where = DOCS / "house.rst"
    where.write_text(page(where.read_text(encoding="utf-8"), PACKAGE), encoding="utf-8")


if __name__ == "__main__":
    main()
