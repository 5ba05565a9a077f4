"""The pages of the documentation: what they show of Python, doctest and shell, and the scope in which it runs.

A page is run from top to bottom like a notebook: every block of Python and every example with ``>>>`` in order, in one
scope. So a page must begin with what it needs. A block that follows the words "In ``name``:" is a file of that name; it
is written to the current directory before what comes next.
"""

from __future__ import annotations

import doctest
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
PYTHON = "python", "python3", "py", "pycon"
SHELL = "sh", "bash", "shell", "console"

_DIRECTIVE = re.compile(r"^( *)\.\. (?:code-block|code|sourcecode):: *(\w*) *$")
_OPTION = re.compile(r"^ *:[\w-]+:")
_FILE = re.compile(r"\bIn ``([\w-]+\.\w+)``:$")


class Block(NamedTuple):
    """One literal block of a page.

    :param str language: of a ``code-block``; empty for a literal block after two colons.
    :param str source: its text without the common indentation.
    :param int line: of the first line of the source, from 1.
    :param str file: name of the file that the block is; empty if it is none.
    """

    language: str
    source: str
    line: int
    file: str = ""


def name(page: Path) -> str:
    """The path of a page below the root of the project, as test ids show it."""
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(text: str) -> list[Block]:
    """The ``code-block`` directives of a page, wherever they are: also in lists and notes."""
    lines = text.splitlines()
    directives = ((at, _DIRECTIVE.match(line)) for at, line in enumerate(lines))
    return [_indented(lines, at + 1, len(found[1]), found[2]) for at, found in directives if found]


def literal_blocks(text: str) -> list[Block]:
    """The literal blocks that follow two colons; their language is nowhere said."""
    lines = text.splitlines()
    opened = (at for at, line in enumerate(lines) if line.endswith("::") and not re.match(r" *\.\. ", line))
    return [_indented(lines, at + 1, len(lines[at]) - len(lines[at].lstrip()), "") for at in opened]


def _indented(lines: list[str], begin: int, indent: int, language: str) -> Block:
    """What is indented by more than ``indent``, from the line ``begin``, without options of the directive."""
    before = next((line for line in reversed(lines[: begin - 1]) if line.strip()), "")
    file = _FILE.search(before)
    while begin < len(lines) and (not lines[begin].strip() or _OPTION.match(lines[begin])):
        begin += 1
    end = begin
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" " * (indent + 1))):
        end += 1
    source = textwrap.dedent("\n".join(lines[begin:end])).rstrip() + "\n"
    return Block(language, source, begin + 1, file[1] if file else "")


def python_blocks(text: str) -> list[Block]:
    """The blocks of plain Python; what has prompts is an example, see :func:`examples`."""
    return [b for b in code_blocks(text) if b.language in PYTHON and not b.source.startswith(">>>")]


def examples(text: str) -> list[doctest.Example]:
    """The examples with prompts, in whatever kind of block."""
    return doctest.DocTestParser().get_examples(text)


def run(page: Path, scope: dict[str, Any]) -> int:
    """Run a page from top to bottom, in the current directory, and return how many blocks and examples it has.

    :param scope: the names that are there from the start; in the end, all that the page has defined.
    :raises AssertionError: if an example prints something else than the page says.
    """
    text = read(page)
    pieces, python = _in_order(text), python_blocks(text)
    for piece in pieces:
        if isinstance(piece, doctest.Example):
            _run_example(piece, page, scope)
            continue
        if piece.file:
            Path(piece.file).write_text(piece.source, encoding="utf-8")
        if piece in python:
            execute(piece, page, scope)
    return len(pieces)


def _in_order(text: str) -> list[Block | doctest.Example]:
    files = (block for block in code_blocks(text) if block.file and block.language not in PYTHON)
    pieces = [(block.line, block) for block in (*python_blocks(text), *files)]
    return [piece for _, piece in sorted(pieces + [(e.lineno + 1, e) for e in examples(text)], key=lambda p: p[0])]


def execute(block: Block, page: Path, scope: dict[str, Any]) -> None:
    """Execute a block of Python; lines of a traceback are those of the page."""
    source = "\n" * (block.line - 1) + block.source
    exec(compile(source, str(page), "exec", dont_inherit=True), scope)


def _run_example(example: doctest.Example, page: Path, scope: dict[str, Any]) -> None:
    test = doctest.DocTest([example], scope, name(page), str(page), example.lineno, None)
    test.globs = scope  # DocTest copies what it is given, and the next example needs what this one defines
    said: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(
        test, out=said.append, clear_globs=False
    )
    assert not said, "".join(said)


def command_lines(text: str) -> Iterator[list[str]]:
    """The commands in blocks of shell, word by word, and those in literal text that begin with ``laplace-amort``."""
    for block in code_blocks(text):
        if block.language in SHELL:
            joined = block.source.replace("\\\n", " ")
            for line in joined.splitlines():
                command = line.removeprefix("$ ").strip()
                yield from _simple_commands(shlex.split(command, comments=True)) if command else ()
    for literal in re.findall(r"``(laplace-amort\s[^`]+)``", text):
        yield shlex.split(literal)


def _simple_commands(words: list[str]) -> Iterator[list[str]]:
    """Split at ``&&``, ``||``, ``|`` and ``;``, without redirections."""
    command: list[str] = []
    for word in [*words, ";"]:
        if word in ("&&", "||", "|", ";"):
            if command:
                yield command
            command = []
        else:
            command.append(word)
