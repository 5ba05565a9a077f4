"""Make the images of plots.rst, by the code of that page: ``python docs/make_plots.py``.

They are written to ``docs/_static/plots``, with a palette, so that each is small.
"""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

DOCS = Path(__file__).parent
PAGE, IMAGES = DOCS / "plots.rst", DOCS / "_static" / "plots"
_WIDTH, _COLORS = 900, 192


def main() -> None:
    """Run the blocks of the page in a directory of their own, and keep the images that they save."""
    blocks = re.findall(
        r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    scope: dict[str, Any] = {}
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for block in blocks:
            exec(compile(textwrap.dedent(block), str(PAGE), "exec"), scope)
        for path in sorted(Path(directory).glob("*.png")):
            small(path).save(IMAGES / path.name, optimize=True)
            print(f"{path.name}: {(IMAGES / path.name).stat().st_size} bytes")
        os.chdir(DOCS)


def small(path: Path) -> Image.Image:
    """An image no wider than a page, with a palette."""
    image = Image.open(path).convert("RGB")
    width = min(_WIDTH, image.width)
    image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    return image.quantize(_COLORS, Image.Quantize.MAXCOVERAGE)


if __name__ == "__main__":
    main()
