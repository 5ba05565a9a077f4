"""The house: who may import whom, through which door; tensors know no Pyro, and one file traces models."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from helpers.house import ROOT, Import, Package, read_sources, room_of

import laplace_amort

GROUND = ("errors", "types", "statuses", "doors")  # imported by all, and importing nothing
# Who may import whom. ``public`` is the package itself, and a name after a dot is all that is taken of the room.
ROOMS = {
    "linalg": "",
    "autodiff": "",
    "units": "linalg autodiff",
    "model": "autodiff",
    "guide": "units model linalg autodiff",
    "posterior": "guide units model autodiff",
    "testing": "guide model linalg autodiff",
    "evidence": "posterior guide units",
    "fitting": "evidence posterior guide units linalg.Whitening linalg.RepairReport",
    "diagnostics": "fitting evidence posterior guide units",
    "plots": "diagnostics fitting posterior guide linalg",
    "examples": "public plots",
    "cli": "public plots testing examples",
}
MAY_IMPORT = {**{here: [] for here in GROUND}, **{here: [*GROUND, *rooms.split()] for here, rooms in ROOMS.items()}}
TENSORS = (*GROUND, "linalg", "autodiff", "units")  # these know no Pyro
ENTERED_BY_USERS = ("plots", "testing")  # doors of their own beside the package: what they hand on is public
ADDRESSED_DIRECTLY = ("examples", "plots.style")  # shelves of modules, or of colors, not doors that hand names on
# Where an import may wait inside a function until it is needed: the command line and pytest start without torch.
LATE = ("cli",)
LATE_FILES = (f"{ROOT}.testing.pytest_plugin",)
TRACER = f"{ROOT}.model.runs"  # the one file that traces models; guides are traced where they are checked
TRACING = {"trace", "get_trace", "TraceMessenger", "TraceHandler", "get_importance_trace"}


def violations(package: Package) -> list[str]:
    found = [
        f"{package.paths[name]}:{line} {message}"
        for name in package.trees
        for line, message in _violations_of(package, name)
    ]
    return found + [f"import cycle: {cycle}" for cycle in package.cycles()]


def _violations_of(package: Package, name: str) -> Iterator[tuple[int, str]]:
    here = room_of(name)
    if here and here not in MAY_IMPORT:
        yield 1, f"is in no room: '{here}' has no line in the table of who may import whom"
        return
    for found in package.own_imports(name):
        if found.inside and here not in LATE and name not in LATE_FILES:
            yield found.line, f"imports {found.full_name} inside a function"
        there = room_of(package.module_of(found)) or "public"
        if there != here:
            yield from ((found.line, message) for message in _wrong_ways(package, here, there, found))
            yield from _wrong_names(package, name, found)
    if here in TENSORS:
        beyond = (found for found in package.imports[name] if found.origin.split(".")[0] == "pyro")
        yield from ((found.line, f"imports {found.full_name}: '{here}' knows no Pyro") for found in beyond)
    if name != TRACER and here != "testing":
        yield from ((line, f"traces a Pyro program ({what})") for line, what in _traces(package, name))
    if package.paths[name].endswith("__init__.py") and name.count(".") < 2:
        yield from _faults_of_door(package, name)


def _wrong_ways(package: Package, here: str, there: str, found: Import) -> Iterator[str]:
    """What is wrong with an import from another room: the direction, the door, or the name."""
    allowed = MAY_IMPORT.get(here, list(MAY_IMPORT))  # the package itself hands on names of all rooms
    if there not in allowed and f"{there}.{found.name}" not in allowed:
        yield f"imports {found.full_name}: '{here}' may import {', '.join(allowed) or 'nothing'}"
    elif {there, found.origin.removeprefix(f"{ROOT}.")} & set(ADDRESSED_DIRECTLY):
        if (found.name or "").startswith("_"):
            yield f"imports {found.full_name}: the name is the file's own"
    elif there == "public":
        if found.name not in {None, "__version__", *package.handed_on(ROOT)}:
            yield f"imports {found.full_name}, which the package does not hand on"
    elif found.full_name == f"{ROOT}.{there}":
        if there not in ENTERED_BY_USERS:
            yield f"imports {found.full_name} as a whole: a room is entered by the name of what is taken"
    elif found.origin != f"{ROOT}.{there}":
        yield f"imports {found.full_name}: the door is {ROOT}.{there}"
    elif found.name not in package.handed_on(found.origin):
        yield f"imports {found.full_name}, which '{there}' does not hand on"


def _wrong_names(package: Package, name: str, found: Import) -> Iterator[tuple[int, str]]:
    """What a file reads of a thing from another room, and that is the other room's own."""
    handed_on = package.handed_on(found.full_name)
    for node in ast.walk(package.trees[name]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == found.alias:
            private = re.match("_(?!_)", node.attr)
            if private or (room_of(found.full_name) in ENTERED_BY_USERS and handed_on and node.attr not in handed_on):
                yield node.lineno, f"reads {found.full_name}.{node.attr}, which is the room's own"


def _faults_of_door(package: Package, name: str) -> Iterator[tuple[int, str]]:
    """What a door has besides one sentence and names that somebody outside wants."""
    tree, here, handed_on = package.trees[name], room_of(name), package.handed_on(name)
    if not re.fullmatch(r"[A-Z](?:(?!\.\s|\n\n).)*\.", ast.get_docstring(tree) or "", re.DOTALL):
        yield 1, "has no docstring of one sentence"
    for node in tree.body[1:]:
        names_only = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__")
        if _opens_on_demand(node):
            yield from _faults_of_opening(package, name, node)
        elif not names_only and not isinstance(node, ast.ImportFrom):
            yield node.lineno, f"does more than hand names on: {ast.unparse(node).splitlines()[0]}"
    means = ("typing.TYPE_CHECKING", f"{ROOT}.doors.opened_on_demand")  # to open on demand, and not handed on
    lines = {str(found.name): found.line for found in package.imports[name] if found.full_name not in means}
    line_of_all = next((node.lineno for node in tree.body if "__all__" in ast.unparse(node)), 1)
    for other in sorted(set(lines) ^ set(handed_on)):
        yield lines.get(other, line_of_all), f"imports {other} or has it in __all__, and not both"
    if here and here not in ENTERED_BY_USERS:
        used = {
            found.name
            for user in package.trees
            for found in package.own_imports(user)
            if found.origin == name and room_of(user) not in ("", here)
        }
        for other in sorted(set(handed_on) - used - set(package.handed_on(ROOT))):
            yield lines.get(other, line_of_all), f"hands on {other}, which no other room uses and which is not public"


def _opens_on_demand(node: ast.stmt) -> bool:
    """Whether a statement has imports for type checkers, and a table of the same for Python."""
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        return False
    pattern = r"\(?__getattr__, __dir__\)? = opened_on_demand\(__name__, \{.*\}\)"
    return (
        all(isinstance(line, ast.ImportFrom) for line in node.body)
        and len(node.orelse) == 1
        and re.fullmatch(pattern, ast.unparse(node.orelse[0]), re.DOTALL) is not None
    )


def _faults_of_opening(package: Package, name: str, node: ast.stmt) -> Iterator[tuple[int, str]]:
    """Where a table of names by module is not what type checkers are told, or a name is that of a module as well."""
    table = ast.literal_eval(ast.unparse(node.orelse[0].value.args[1]))  # type: ignore[attr-defined]
    opened = {f"{module}.{taken}" for module, names in table.items() for taken in names.split()}
    line = node.orelse[0].lineno  # type: ignore[attr-defined]
    told = {
        f"{found.origin.removeprefix(name)[1:]}.{found.name}"
        for found in package.imports[name]
        if node.lineno <= found.line < line
    }
    for other in sorted(told ^ opened):
        yield line, f"opens {other} for type checkers or for Python, and not for both"
    for other in sorted(opened):
        module = f"{name}.{other.rpartition('.')[2]}"
        if module in package.trees:  # whoever imports the file first would get it in place of what is in it
            yield line, f"opens {other}, and {package.paths[module]} has the same name"


def _traces(package: Package, name: str) -> Iterator[tuple[int, str]]:
    """Where a file traces a Pyro program: what it imports to that end, and what it calls."""
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(package.trees[name])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.name.endswith("poutine")
    }
    for found in package.imports[name]:
        if found.origin.startswith("pyro") and found.name in TRACING:
            yield found.line, found.full_name
    for node in ast.walk(package.trees[name]):
        if isinstance(node, ast.Attribute) and node.attr in TRACING:
            owner = ast.unparse(node.value)
            if node.attr != "trace" or owner in aliases or owner.endswith("poutine"):
                yield node.lineno, ast.unparse(node)


def installed() -> Package:
    return Package(read_sources(laplace_amort.__path__[0]))


def test_the_house_is_in_order() -> None:
    package = installed()
    assert set(MAY_IMPORT) <= {room_of(name) for name in package.trees}
    assert violations(package) == []


def test_one_file_traces_models() -> None:
    """The finder sees the tracing that is there, so its silence elsewhere means something."""
    assert list(_traces(installed(), TRACER))


def test_package_hands_on_what_it_says() -> None:
    assert sorted(installed().handed_on(ROOT)) == sorted(set(laplace_amort.__all__)) == sorted(laplace_amort.__all__)


# ------------------------------------------------------------------------------------------------ planted violations

DOOR = '"""What is here."""\n'
OPENED = """\
from typing import TYPE_CHECKING
from laplace_amort.doors import opened_on_demand
__all__ = ['Report']
if TYPE_CHECKING:
    from laplace_amort.testing.report import Report
else:
    __getattr__, __dir__ = opened_on_demand(__name__, {'report': 'Report'})
"""
SOUND = {
    "__init__.py": DOOR + "from laplace_amort.guide import Guide\n__version__ = '1'\n__all__ = ['Guide']",
    "doors.py": "__all__ = ['opened_on_demand']",
    "errors.py": "import torch\n__all__ = ['PathError']",
    "types.py": "__all__ = ['Vector']",
    "linalg/__init__.py": DOOR + "from .matrix import Matrix, Whitening\n__all__ = ['Matrix', 'Whitening']",
    "linalg/matrix.py": "from laplace_amort.errors import PathError",
    "linalg/repair.py": "from laplace_amort.linalg.matrix import Matrix, _small",
    "units/__init__.py": DOOR + "from laplace_amort.units.modes import Mode\n__all__ = ['Mode']",
    "units/modes.py": "import torch\nfrom laplace_amort.linalg import Matrix",
    "model/__init__.py": DOOR + "from laplace_amort.model.log_joint import LogJoint\n__all__ = ['LogJoint']",
    "model/log_joint.py": "from ..errors import PathError",
    "model/runs.py": "from pyro import poutine\npoutine.trace(model).get_trace()",
    "guide/__init__.py": DOOR + "from laplace_amort.guide.auto import Guide\n__all__ = ['Guide']",
    "guide/auto.py": "import pyro\nfrom laplace_amort.model import LogJoint\nfrom laplace_amort.units import Mode\n"
    "torch.jit.trace(f)\nelbo._get_trace(m)",
    "fitting/__init__.py": '"""How the parameter\nis found."""',
    "fitting/fit.py": "from laplace_amort.linalg import Whitening",
    "testing/__init__.py": DOOR + OPENED,
    "testing/pytest_plugin.py": "def f():\n    from laplace_amort.testing import Report",
    "testing/report.py": "from laplace_amort.testing import checks",
    "testing/checks.py": "from pyro.poutine import trace\nfrom ..guide import Guide",
    "plots/__init__.py": DOOR + "from .style import style\n__all__ = ['style']",
    "plots/style.py": "import matplotlib",
    "examples/__init__.py": DOOR,
    "examples/demo.py": "from laplace_amort import Guide",
    "examples/datasets/__init__.py": '"""Data. And more."""\ndef load(): ...',
    "cli/__init__.py": DOOR,
    "cli/main.py": "import importlib\nimport laplace_amort\nfrom laplace_amort import Guide, plots, __version__\n"
    "plots.style()\ndef f():\n    from laplace_amort.examples.demo import run\nimportlib.import_module(name)",
}


def test_sound_house_passes() -> None:
    assert violations(Package(SOUND)) == []


# What is written at the end of which file, and what is said of its last line.
PLANTED = [
    # Who may import whom.
    ("errors.py", "from laplace_amort.types import Vector", "types.Vector: 'errors' may import nothing"),
    ("linalg/matrix.py", "from laplace_amort.units import Mode", "units.Mode: 'linalg' may import errors, types"),
    ("linalg/matrix.py", "from ..units import Mode", "imports laplace_amort.units.Mode: 'linalg' may import"),
    ("linalg/matrix.py", "from .. import units", "imports laplace_amort.units: 'linalg' may import"),
    ("linalg/__init__.py", "from ..cli import main", "imports laplace_amort.cli.main: 'linalg' may import"),
    ("units/modes.py", "import laplace_amort.guide.auto", "laplace_amort.guide.auto: 'units' may import"),
    ("units/modes.py", "from laplace_amort import Guide", "laplace_amort.Guide: 'units' may import"),
    ("fitting/fit.py", "from ..linalg import Matrix", "laplace_amort.linalg.Matrix: 'fitting' may import"),
    ("examples/demo.py", "from ..units import Mode", "laplace_amort.units.Mode: 'examples' may import"),
    ("cli/main.py", "from ..guide import Guide", "laplace_amort.guide.Guide: 'cli' may import"),
    ("guide/auto.py", "if TYPE_CHECKING:\n    from ..cli import f", "laplace_amort.cli.f: 'guide' may import"),
    ("guide/auto.py", "def f():\n    from ..cli import g", "laplace_amort.cli.g: 'guide' may import"),
    ("guide/auto.py", "importlib.import_module('laplace_amort.cli')", "laplace_amort.cli: 'guide' may import"),
    # Through the door.
    ("units/modes.py", "from ..linalg.matrix import Matrix", "matrix.Matrix: the door is laplace_amort.linalg"),
    ("units/modes.py", "import laplace_amort.linalg.matrix", "linalg.matrix: the door is laplace_amort.linalg"),
    ("units/modes.py", "from laplace_amort import linalg", "imports laplace_amort.linalg as a whole"),
    ("units/modes.py", "from ..linalg import matrix", "linalg.matrix, which 'linalg' does not hand on"),
    ("units/modes.py", "from ..linalg import _own", "linalg._own, which 'linalg' does not hand on"),
    ("units/modes.py", "from ..linalg import *", "linalg.*, which 'linalg' does not hand on"),
    ("units/modes.py", "from ..errors import Other", "errors.Other, which 'errors' does not hand on"),
    ("units/modes.py", "Matrix._own", "reads laplace_amort.linalg.Matrix._own"),
    ("cli/main.py", "plots.numbers", "reads laplace_amort.plots.numbers"),
    ("cli/main.py", "from ..examples.demo import _own", "examples.demo._own: the name is the file's own"),
    ("cli/main.py", "from .. import Mode", "laplace_amort.Mode, which the package does not hand on"),
    ("__init__.py", "from .units.modes import Mode", "units.modes.Mode: the door is laplace_amort.units"),
    # Where it can be seen.
    ("guide/auto.py", "def f():\n    from ..model import LogJoint", "model.LogJoint inside a function"),
    ("testing/report.py", "def f():\n    from ..guide import Guide", "guide.Guide inside a function"),
    ("linalg/matrix.py", "async def f():\n    from . import repair", "linalg.repair inside a function"),
    # In no circle.
    ("linalg/matrix.py", "from . import repair", "-> linalg/repair.py:1 -> linalg/matrix.py"),
    ("linalg/matrix.py", "from . import Matrix", "cycle: linalg/__init__.py:2 -> linalg/matrix.py:2"),
    ("guide/auto.py", "from .. import Guide", "cycle: __init__.py:2 -> guide/__init__.py:2 -> guide/auto.py:6"),
    ("testing/checks.py", "def f():\n    from . import report", "-> testing/checks.py:4 -> testing/report.py"),
    # Tensors without Pyro.
    ("errors.py", "import pyro", "imports pyro: 'errors' knows no Pyro"),
    ("units/modes.py", "def f():\n    from pyro.infer import SVI", "pyro.infer.SVI: 'units' knows no Pyro"),
    ("linalg/matrix.py", "import pyro.poutine as p", "pyro.poutine: 'linalg' knows no Pyro"),
    # Tracing.
    ("guide/auto.py", "from pyro import poutine\npoutine.trace(f)", "traces a Pyro program (poutine.trace)"),
    ("guide/auto.py", "pyro.poutine.trace(f)", "traces a Pyro program (pyro.poutine.trace)"),
    ("guide/auto.py", "import pyro.poutine as p\np.trace(f)", "traces a Pyro program (p.trace)"),
    ("guide/auto.py", "from pyro.poutine import trace as t", "traces a Pyro program (pyro.poutine.trace)"),
    ("guide/auto.py", "from pyro.poutine.trace_messenger import TraceMessenger", "traces a Pyro program"),
    ("guide/auto.py", "handler.get_trace()", "traces a Pyro program (handler.get_trace)"),
    ("cli/main.py", "from pyro.infer.enum import get_importance_trace", "traces a Pyro program"),
    ("model/layout.py", "handler.get_trace()", "traces a Pyro program (handler.get_trace)"),
    # Doors.
    ("model/__init__.py", "x = 1", "does more than hand names on: x = 1"),
    ("fitting/__init__.py", "def f(): ...", "does more than hand names on: def f():"),
    ("model/__init__.py", "from .log_joint import Other", "imports Other or has it in __all__, and not both"),
    ("posterior/__init__.py", "__all__ = ['Other']", "imports Other or has it in __all__, and not both"),
    ("model/__init__.py", "if TYPE_CHECKING: x = 1", "does more than hand names on: if TYPE_CHECKING"),
    ("model/__init__.py", "from typing import Any", "imports Any or has it in __all__, and not both"),
    ("cli/__init__.py", "__all__ = ['f']; from .main import f", "hands on f, which no other room uses"),
    ("posterior/__init__.py", "", "has no docstring of one sentence"),
    ("posterior/__init__.py", '"""One. And two."""', "has no docstring of one sentence"),
    ("posterior/__init__.py", '"""One.\\n\\nMore."""', "has no docstring of one sentence"),
    # Rooms.
    ("attic.py", "", "is in no room: 'attic' has no line in the table"),
    ("attic/box.py", "", "is in no room: 'attic' has no line in the table"),
]


@pytest.mark.parametrize(("path", "planted", "said"), PLANTED)
def test_planted_violations_are_found(path: str, planted: str, said: str) -> None:
    source = "\n".join([*SOUND.get(path, "").splitlines(), planted])
    found = violations(Package({**SOUND, path: source}))
    assert any(f"{path}:{source.count(chr(10)) + 1} " in line and said in line for line in found), found


# A table of names that is not what type checkers are told, and a name that is a module's as well.
PLANTED_IN_OPENINGS = [
    ("{'report': 'Report'}", "{'report': 'Report Row'}", "opens report.Row for type checkers or for Python, and not"),
    ("{'report': 'Report'}", "{'checks': 'Report'}", "opens checks.Report for type checkers or for Python, and not"),
    ("{'report': 'Report'}", "{}", "opens report.Report for type checkers or for Python, and not for both"),
    ("Report", "report", "opens report.report, and testing/report.py has the same name"),
    ("{'report': 'Report'})", "{'report': 'Report'}); x = 1", "does more than hand names on: if TYPE_CHECKING:"),
    ("import Report", "import Report; x = 1", "does more than hand names on: if TYPE_CHECKING:"),
]


@pytest.mark.parametrize(("sound", "planted", "said"), PLANTED_IN_OPENINGS)
def test_planted_faults_of_openings_are_found(sound: str, planted: str, said: str) -> None:
    assert sound in OPENED
    source = DOOR + OPENED.replace(sound, planted)
    found = violations(Package({**SOUND, "testing/__init__.py": source}))
    assert any("testing/__init__.py:" in line and said in line for line in found), found


# Run in a fresh interpreter, where nothing has imported Pyro yet.
IMPORT_WITHOUT_PYRO = """
import importlib, json, sys

class NoPyro:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pyro":
            raise ImportError("pyro is out of bounds")

modules, planted = json.loads(sys.argv[1])
sys.meta_path.insert(0, NoPyro())
for module in modules:
    importlib.import_module(module)
assert "pyro" not in sys.modules
try:
    importlib.import_module(planted)
except ImportError as error:
    print(error)
"""


def test_rooms_of_tensors_run_without_pyro() -> None:
    modules = [name for name in installed().trees if room_of(name) in TENSORS]
    argument = json.dumps([modules, f"{ROOT}.guide.params"])
    command = [sys.executable, "-c", IMPORT_WITHOUT_PYRO, argument]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "pyro is out of bounds\n"), run.stderr


# Every door that opens on demand, in a fresh interpreter: what is asked for, and not before.
OPEN_DOORS = """
import sys
import laplace_amort, laplace_amort.testing, laplace_amort.testing.pytest_plugin
assert not {"torch", "pyro"} & set(sys.modules), "nobody has asked yet"
for door in laplace_amort, laplace_amort.testing:
    assert set(door.__all__) <= set(dir(door))
    for name in door.__all__:
        assert name not in vars(door), name
assert laplace_amort.linalg.Arrowhead is laplace_amort.Arrowhead  # a room without an import of its own
import laplace_amort.testing.suite  # first the file, then the name
assert laplace_amort.testing.check_guide is laplace_amort.testing.suite.check_guide
for door in laplace_amort, laplace_amort.testing:
    namespace = {}
    exec(f"from {door.__name__} import *", namespace)
    assert set(door.__all__) == set(namespace) - {"__builtins__"}
    try:
        door.absent
    except AttributeError as error:
        print(error)
import pickle
assert pickle.loads(pickle.dumps(laplace_amort.Ladder)) is laplace_amort.Ladder
"""


def test_doors_open_on_demand() -> None:
    run = subprocess.run([sys.executable, "-c", OPEN_DOORS], capture_output=True, text=True, check=False)
    said = [f"module '{door}' has no attribute 'absent'" for door in (ROOT, f"{ROOT}.testing")]
    assert (run.returncode, run.stdout.splitlines()) == (0, said), run.stderr
