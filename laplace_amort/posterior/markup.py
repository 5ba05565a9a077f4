"""What notebooks show: plain HTML, in which everything that a user named is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["division", "paragraph", "strong", "table"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return a table, of which the first cell of each row is its name.

    :param header: of the columns.
    :param rows: cells as text.
    :param str caption: above it; empty for none.

    Example::

        >>> print(table(["global", "mean"], [["<tau>", "1"]]).strip())
        <table><thead><tr><th scope="col">global</th><th scope="col">mean</th></tr></thead>
        <tbody><tr><th scope="row">&lt;tau&gt;</th><td>1</td></tr></tbody></table>
    """
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "\n".join(
        f'<tr><th scope="row">{_lines(name)}</th>{"".join(f"<td>{_lines(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f"<table>{above}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of text, whose indented lines are code.

    :param str text: as it is printed.
    :param str kind: its class; empty for none.
    """
    return f"<p{_class(kind)}>{_lines(text)}</p>\n"


def strong(text: str, rest: str = "", kind: str = "") -> str:
    """Return a paragraph that begins in bold.

    :param str text: in bold.
    :param str rest: that follows.
    :param str kind: its class; empty for none.
    """
    return f"<p{_class(kind)}><strong>{_lines(text)}</strong>{_lines(rest)}</p>\n"


def division(parts: Iterable[str], kind: str) -> str:
    """Return parts of HTML as one.

    :param parts: of HTML.
    :param str kind: its class.
    """
    return f"<div{_class(kind)}>\n{''.join(parts)}</div>"


def _class(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""


def _lines(text: str) -> str:
    """Escape text, with a break for each line, and what is indented as code."""
    return "<br>".join(
        f"<code>{escape(line.strip())}</code>" if line.startswith("    ") else escape(line)
        for line in text.splitlines()
    )
