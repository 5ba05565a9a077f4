"""The images of docs/plots.rst are those that its code saves, and small; its statements are those of the code."""

import re

from helpers import documents
from PIL import Image

PAGE = documents.ROOT / "docs" / "plots.rst"
TEXT = PAGE.read_text(encoding="utf-8")
SHOWN = re.findall(r"^\.\. image:: (\S+)\n   :alt: \S", TEXT, re.MULTILINE)


def test_every_image_is_one_that_the_page_saves():
    saved = re.findall(r'save_figure\(.*, "(\w+\.png)"\)', TEXT)
    assert [f"_static/plots/{name}" for name in saved] == SHOWN
    assert len(SHOWN) == 6
    there = {path.name for path in (PAGE.parent / "_static" / "plots").iterdir()}
    assert there == set(saved)


def test_images_are_there_and_small():
    for path in SHOWN:
        file = PAGE.parent / path
        assert file.stat().st_size < 60_000, path
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert 500 <= image.width <= 1200


def test_every_figure_of_a_fit_is_shown():
    from laplace_amort import plots

    figures = {name for name in plots.__all__ if name.endswith("_figure")}
    assert figures <= set(re.findall(r"plots\.(\w+_figure)\(", TEXT))
