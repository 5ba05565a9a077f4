"""The house: imports go only downward, tensors stay below Pyro, and one room traces models."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import laplace_amort

ROOT = "laplace_amort"

# Rooms, that is modules and subpackages of laplace_amort, and their layers. A room imports from its own layer or below.
LAYERS = {
    "errors": 0,
    "graph": 0,
    "statuses": 0,
    "dual_path": 1,
    "blocks": 1,
    "arrowhead": 1,
    "symmetric": 1,
    "softabs": 1,
    "repair": 1,
    "modified_cholesky": 1,
    "boost": 1,
    "block_repair": 1,
    "warm_start": 1,
    "draws": 1,
    "frames": 1,
    "findings": 1,
    "fit_status": 1,
    "journal": 1,
    "derivatives": 2,
    "information": 2,
    "arrowhead_information": 2,
    "marginal": 2,
    "heads": 2,
    "simplify": 2,
    "recording": 2,
    "newton": 2,
    "modes": 2,
    "coordinates": 2,
    "identification": 2,
    "evaluation": 2,
    "optimizers": 2,
    "pulls": 2,
    "rules": 2,
    "psis": 2,
    "importance": 2,
    "unit_checks": 2,
    "separable": 2,
    "conditionals": 2,
    "sites": 3,
    "model_errors": 3,
    "handlers": 3,
    "log_joint": 3,
    "layout": 3,
    "unit_model": 3,
    "unit_terms": 3,
    "observations": 3,
    "params": 3,
    "routes": 4,
    "family": 4,
    "guides": 4,
    "unit_draws": 4,
    "target": 5,
    "bound": 5,
    "run": 5,
    "starts": 5,
    "objectives": 5,
    "posterior": 5,
    "pointwise": 5,
    "predictions": 5,
    "arviz_export": 5,
    "comparison": 5,
    "ladder": 5,
    "consistency": 5,
    "diagnostics": 5,
    "unit_bounds": 5,
    "unit_objectives": 5,
    "stochastic": 5,
    "search": 5,
    "summaries": 5,
    "fit_result": 5,
    "fitting": 5,
    "testing": 5,
    "plot_style": 5,
    "plot_numbers": 5,
    "plot_densities": 5,
    "demo_plots": 5,
    "fit_plots": 5,
    "global_plots": 5,
    "unit_plots": 5,
    "plots": 5,
    "datasets": 6,
    "examples": 6,
    "demo": 6,
    "commands": 6,
    "cli": 6,
}
TENSORS_ONLY = 2  # up to this layer, no Pyro
TRACERS = {"log_joint", "testing"}  # a model is traced by log_joint alone; guides are traced where they are checked
TRACING = {"trace", "get_trace", "TraceMessenger", "TraceHandler", "get_importance_trace"}


class Package:
    """Every module of the package, parsed, and what each imports.

    :param dict sources: source text by path below the package, such as ``testing/report.py``.
    """

    def __init__(self, sources: dict[str, str]) -> None:
        self.trees = {self.module_name(path): ast.parse(source, path) for path, source in sources.items()}
        self.packages = {self.module_name(path) for path in sources if path.endswith("__init__.py")}
        self.imports = {name: list(self.imports_of(name)) for name in self.trees}

    @staticmethod
    def module_name(path: str) -> str:
        parts = [ROOT, *Path(path).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports_of(self, name: str) -> Iterator[tuple[int, str]]:
        """Line and full name of everything imported, also inside functions and under TYPE_CHECKING."""
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self.absolute(name, node)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))

    def absolute(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        up = node.level - (name in self.packages)
        parents = name.split(".")
        return ".".join([*parents[: len(parents) - up], *([node.module] if node.module else [])])

    def edges(self, name: str) -> Iterator[tuple[int, str]]:
        """Imports of modules of this package; a name that is no module counts for the module that holds it."""
        for line, target in self.imports[name]:
            if target.split(".")[0] == ROOT:
                while target not in self.trees and "." in target:
                    target = target.rpartition(".")[0]
                yield line, target


def room(name: str) -> str:
    """The room of a module; empty for the package itself, which belongs to no layer and only hands names on."""
    return name.split(".")[1] if "." in name else ""


def violations(package: Package) -> list[str]:
    return [
        *(found for name in package.trees for found in _violations_of(package, name)),
        *(f"import cycle: {' -> '.join(cycle)}" for cycle in _cycles(package)),
    ]


def _violations_of(package: Package, name: str) -> Iterator[str]:
    here = room(name)
    if here and here not in LAYERS:
        yield f"room '{here}' is in no layer: add it to LAYERS in {Path(__file__).name}"
        return
    for line, target in package.edges(name):
        there = room(target)
        if here and there in LAYERS and LAYERS[there] > LAYERS[here]:
            yield f"{name}:{line} (layer {LAYERS[here]}) imports {target} (layer {LAYERS[there]})"
    for line, target in package.imports[name]:
        if target.split(".")[0] == "pyro" and here and LAYERS[here] <= TENSORS_ONLY:
            yield f"{name}:{line} (layer {LAYERS[here]}) imports {target}"
    if here not in TRACERS:
        yield from (f"{name}:{line} traces a Pyro program ({what})" for line, what in _traces(package, name))


def _traces(package: Package, name: str) -> Iterator[tuple[int, str]]:
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(package.trees[name])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.name.endswith("poutine")
    }
    for line, target in package.imports[name]:
        if target.startswith("pyro.") and target.rpartition(".")[2] in TRACING:
            yield line, target
    for node in ast.walk(package.trees[name]):
        if isinstance(node, ast.Attribute) and node.attr in TRACING:
            owner = ast.unparse(node.value)
            if node.attr != "trace" or owner in aliases or owner.endswith("poutine"):
                yield node.lineno, ast.unparse(node)


def _cycles(package: Package) -> Iterator[list[str]]:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for _, target in package.edges(name):
                if target != name and target in package.trees:
                    yield from visit(target, [*path, name])
            done.add(name)

    for name in package.trees:
        yield from visit(name, [])


def installed_sources() -> dict[str, str]:
    directory = Path(laplace_amort.__path__[0])
    return {str(path.relative_to(directory)): path.read_text("utf-8") for path in directory.rglob("*.py")}


def test_the_house_is_in_order() -> None:
    sources = installed_sources()
    assert {"__init__.py", "errors.py", "dual_path.py", "log_joint.py"} <= set(sources)
    assert violations(Package(sources)) == []


def test_one_room_traces_models() -> None:
    """The finder sees the tracing that is there, so its silence elsewhere means something."""
    package = Package(installed_sources())
    assert list(_traces(package, f"{ROOT}.log_joint"))


SOUND = {
    "__init__.py": "from laplace_amort.dual_path import dual_path\nfrom laplace_amort.log_joint import LogJoint",
    "errors.py": "import torch",
    "dual_path.py": "from laplace_amort.errors import PathError",
    "log_joint.py": "from pyro import poutine\nfrom . import errors\npoutine.trace(model).get_trace()",
    "routes.py": "import pyro\nfrom laplace_amort.log_joint import LogJoint\ntorch.jit.trace(f)\nelbo._get_trace(m)",
    "testing/__init__.py": "from .report import Report\nfrom . import checks",
    "testing/report.py": "from ..errors import GuideCheckError",
    "testing/checks.py": "from laplace_amort.testing import report\nfrom pyro.poutine import trace",
    "cli.py": "import importlib\nfrom laplace_amort import LogJoint, datasets\nimportlib.import_module(name)",
    "datasets/__init__.py": "",
}


def test_sound_house_passes() -> None:
    assert violations(Package(SOUND)) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        (
            "errors.py",
            "import laplace_amort.dual_path",
            "laplace_amort.errors:1 (layer 0) imports laplace_amort.dual_path (layer 1)",
        ),
        (
            "dual_path.py",
            "from laplace_amort.log_joint import LogJoint",
            "(layer 1) imports laplace_amort.log_joint (layer 3)",
        ),
        ("dual_path.py", "from laplace_amort import log_joint", "(layer 1) imports laplace_amort.log_joint (layer 3)"),
        ("dual_path.py", "from . import log_joint", "(layer 1) imports laplace_amort.log_joint (layer 3)"),
        ("dual_path.py", "from .log_joint import LogJoint", "(layer 1) imports laplace_amort.log_joint (layer 3)"),
        (
            "log_joint.py",
            "def f():\n    from .testing.report import Report",
            "laplace_amort.log_joint:2 (layer 3) imports",
        ),
        (
            "routes.py",
            "if TYPE_CHECKING:\n    from .cli import main",
            "laplace_amort.routes:2 (layer 4) imports laplace_amort.cli",
        ),
        ("routes.py", "importlib.import_module('laplace_amort.cli')", "(layer 4) imports laplace_amort.cli (layer 6)"),
        (
            "testing/report.py",
            "from .. import cli",
            "laplace_amort.testing.report:1 (layer 5) imports laplace_amort.cli",
        ),
        (
            "testing/__init__.py",
            "from ..cli import main",
            "laplace_amort.testing:1 (layer 5) imports laplace_amort.cli",
        ),
        ("errors.py", "import pyro", "laplace_amort.errors:1 (layer 0) imports pyro"),
        (
            "dual_path.py",
            "def f():\n    from pyro.infer import SVI",
            "laplace_amort.dual_path:2 (layer 1) imports pyro.infer.SVI",
        ),
        ("dual_path.py", "import pyro.poutine as p", "(layer 1) imports pyro.poutine"),
        (
            "dual_path.py",
            "from laplace_amort import DualPath",
            "import cycle: laplace_amort -> laplace_amort.dual_path -> laplace_amort",
        ),
        (
            "log_joint.py",
            "from laplace_amort import LogJoint",
            "import cycle: laplace_amort -> laplace_amort.log_joint -> laplace_amort",
        ),
        (
            "testing/report.py",
            "from laplace_amort.testing.checks import x",
            "laplace_amort.testing.report -> laplace_amort.testing.checks",
        ),
        (
            "params.py",
            "from pyro import poutine\npoutine.trace(model)",
            "laplace_amort.params:2 traces a Pyro program (poutine.trace)",
        ),
        (
            "params.py",
            "import pyro\npyro.poutine.trace(model)",
            "laplace_amort.params:2 traces a Pyro program (pyro.poutine.trace)",
        ),
        (
            "params.py",
            "import pyro.poutine as p\np.trace(model)",
            "laplace_amort.params:2 traces a Pyro program (p.trace)",
        ),
        (
            "params.py",
            "from pyro.poutine import trace as t",
            "laplace_amort.params:1 traces a Pyro program (pyro.poutine.trace)",
        ),
        (
            "params.py",
            "from pyro.poutine.trace_messenger import TraceMessenger",
            "laplace_amort.params:1 traces a Pyro program",
        ),
        ("params.py", "handler.get_trace()", "laplace_amort.params:1 traces a Pyro program (handler.get_trace)"),
        ("cli.py", "from pyro.infer.enum import get_importance_trace", "laplace_amort.cli:1 traces a Pyro program"),
        ("attic.py", "", "room 'attic' is in no layer: add it to LAYERS in test_house.py"),
        ("attic/box.py", "", "room 'attic' is in no layer: add it to LAYERS in test_house.py"),
    ],
)
def test_planted_violations_are_found(path: str, source: str, expected: str) -> None:
    found = violations(Package({**SOUND, path: source}))
    assert any(expected in line for line in found), found


# Run in a fresh interpreter with a bare package, because laplace_amort/__init__.py imports the upper layers too.
IMPORT_WITHOUT_PYRO = """
import importlib, json, sys, types

class NoPyro:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pyro":
            raise ImportError("pyro is out of bounds")

rooms, directory, planted = json.loads(sys.argv[1])
sys.meta_path.insert(0, NoPyro())
package = sys.modules["laplace_amort"] = types.ModuleType("laplace_amort")
package.__path__ = [directory]
for room in rooms:
    importlib.import_module("laplace_amort." + room)
assert "pyro" not in sys.modules
try:
    importlib.import_module("laplace_amort." + planted)
except ImportError as error:
    print(error)
"""


def test_tensor_layers_run_without_pyro() -> None:
    directory = laplace_amort.__path__[0]
    rooms = sorted({room(name) for name in Package(installed_sources()).trees} - {""})
    argument = json.dumps([[name for name in rooms if LAYERS.get(name, 9) <= TENSORS_ONLY], directory, "params"])
    command = [sys.executable, "-c", IMPORT_WITHOUT_PYRO, argument]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "pyro is out of bounds\n"), run.stderr


def test_package_only_hands_names_on() -> None:
    tree = ast.parse(installed_sources()["__init__.py"])
    names = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(names) == laplace_amort.__all__
    others = [node for node in tree.body[1:] if not isinstance(node, ast.ImportFrom)]
    assert {ast.unparse(node).split(" =")[0] for node in others} == {"__version__", "__all__"}
