"""The package as a house of rooms: its files parsed, and who imports what from where."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = "laplace_amort"


class Import(NamedTuple):
    """One name that a file imports.

    :param int line: line of the statement.
    :param str origin: module that the name is taken from, or that is imported as a whole.
    :param name: name that is taken; None for ``import origin``.
    :param str alias: what the file calls it.
    :param bool inside: whether the statement is inside a function.
    """

    line: int
    origin: str
    name: str | None
    alias: str
    inside: bool

    @property
    def full_name(self) -> str:
        return f"{self.origin}.{self.name}" if self.name else self.origin


class Package:
    """Every file of the package, parsed, and what each imports.

    :param dict sources: source text by path below the package, such as ``testing/report.py``.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.paths = {self.module_name(path): path for path in sources}
        self.trees = {self.module_name(path): ast.parse(source, path) for path, source in sources.items()}
        self.imports = {name: list(self._imports_of(name)) for name in self.trees}

    @staticmethod
    def module_name(path: str) -> str:
        parts = [ROOT, *Path(path).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def own_imports(self, name: str) -> list[Import]:
        """What a file imports of the package itself."""
        return [found for found in self.imports[name] if found.origin.split(".")[0] == ROOT]

    def module_of(self, found: Import) -> str:
        """The file that an import reads: a name that is no module counts for the module that holds it."""
        target = found.full_name
        while target not in self.trees and "." in target:
            target = target.rpartition(".")[0]
        return target

    def handed_on(self, name: str) -> list[str]:
        """The ``__all__`` of a module, empty if it has none."""
        for node in self.trees[name].body if name in self.trees else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return list(ast.literal_eval(node.value))
        return []

    def cycles(self) -> Iterator[str]:
        """Circles of files that import each other: each file with the line where it imports the next."""
        done: set[str] = set()

        def visit(name: str, path: dict[str, int]) -> Iterator[str]:
            if name in path:
                circle = list(path)[list(path).index(name) :]
                yield " -> ".join([*(f"{self.paths[file]}:{path[file]}" for file in circle), self.paths[name]])
            elif name not in done:
                lines = {self.module_of(found): found.line for found in reversed(self.own_imports(name))}
                for target in lines:
                    if target != name and target in self.trees:
                        yield from visit(target, {**path, name: lines[target]})
                done.add(name)

        for name in self.trees:
            yield from visit(name, {})

    def _imports_of(self, name: str) -> Iterator[Import]:
        """Every import, also inside functions, under TYPE_CHECKING, and by the name of a module in a string."""
        tree = self.trees[name]
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                taken = [(alias.name, None, alias.asname or alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = self._absolute(name, node)
                taken = [(origin, alias.name, alias.asname or alias.name) for alias in node.names]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                taken = [(str(arg.value), None, "") for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            else:
                continue
            yield from (Import(node.lineno, *names, id(node) in inside) for names in taken)

    def _absolute(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        up = node.level - self.paths[name].endswith("__init__.py")
        parents = name.split(".")
        return ".".join([*parents[: len(parents) - up], *([node.module] if node.module else [])])


def read_sources(directory: str | Path) -> dict[str, str]:
    """The Python files below a folder, by path."""
    paths = sorted(Path(directory).rglob("*.py"))
    return {path.relative_to(directory).as_posix(): path.read_text("utf-8") for path in paths}


def room_of(name: str) -> str:
    """The room of a module; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""
