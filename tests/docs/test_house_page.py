"""The page on the house: its drawing and its tables are what the imports say now, and a planted import changes them."""

import importlib.util
import shutil
from xml.etree import ElementTree

import pytest
from helpers import documents

DOCS = documents.ROOT / "docs"


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("house", DOCS / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(house, tmp_path):
    """A copy of the package, to plant imports in."""
    others = shutil.ignore_patterns("__pycache__", "*.csv", "*.json")
    return shutil.copytree(house.PACKAGE, tmp_path / house.PACKAGE.name, ignore=others)


@pytest.fixture
def empty(house, tmp_path):
    """A package with the rooms, and nothing in them."""
    for room in [*house.rooms(house.PACKAGE), "fitting/objectives"]:
        inside = tmp_path / house.PUBLIC / ("" if room == house.PUBLIC else room)
        inside.mkdir(parents=True, exist_ok=True)
        (inside / "__init__.py").touch()
    return tmp_path / house.PUBLIC


def test_the_page_is_what_the_script_makes_now(house):
    again = "run 'python docs/house.py'"
    assert (DOCS / "_static" / "house.svg").read_text(encoding="utf-8") == house.drawing(house.PACKAGE), again
    text = documents.read(DOCS / "house.rst")
    assert text == house.page(text, house.PACKAGE), again


def test_no_arrow_goes_up(house):
    assert "upward" not in house.drawing(house.PACKAGE).partition("</style>")[2]


def test_every_room_is_drawn_and_listed(house):
    drawn = ElementTree.fromstring(house.drawing(house.PACKAGE))
    names = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "name"}
    assert names == {*house.rooms(house.PACKAGE), "errors, types, statuses, doors"}
    table = house.files(house.PACKAGE)
    for path in house.PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            assert path.parent == house.PACKAGE or f"{path.name}``" in table


@pytest.mark.parametrize(
    ("path", "planted", "arrow"),
    [
        ("linalg/blocks.py", "from laplace_amort.guide import Problem", ("linalg", "guide")),
        ("linalg/blocks.py", "from laplace_amort import plots", ("linalg", "plots")),
        ("linalg/blocks.py", "from laplace_amort import fit", ("linalg", "laplace_amort")),
        ("linalg/blocks.py", "import laplace_amort.model.sites as sites", ("linalg", "model")),
        ("linalg/blocks.py", "from ..autodiff import record", ("linalg", "autodiff")),
        ("linalg/blocks.py", "from .. import units", ("linalg", "units")),
        ("fitting/objectives/elbo.py", "def f():\n    from ...diagnostics import diagnose", ("fitting", "diagnostics")),
        ("errors.py", "from laplace_amort.types import Vector", ("errors", "types")),
        ("__init__.py", "from .cli.main import main", ("laplace_amort", "cli")),
    ],
)
def test_a_planted_import_is_an_arrow(house, empty, path, planted, arrow):
    for ground in house.GROUND:
        (empty / f"{ground}.py").touch()
    assert house.arrows(empty) == set()
    (empty / path).write_text(planted, encoding="utf-8")
    assert house.arrows(empty) == {arrow}


def test_a_planted_arrow_changes_the_page(house, package):
    text, drawn = documents.read(DOCS / "house.rst"), house.drawing(package)
    with (package / "linalg" / "blocks.py").open("a", encoding="utf-8") as file:
        file.write("\nfrom laplace_amort.guide import Problem\n")
    assert house.drawing(package) != drawn
    assert 'class="upward"' in house.drawing(package)
    assert house.page(text, package) != text


def test_a_room_without_a_place_is_refused(house, package):
    (package / "attic").mkdir()
    (package / "attic" / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"differ in \['attic'\]: give each a place"):
        house.drawing(package)
