"""The documentation: ``sphinx-build -W --keep-going -b html docs OUTDIR``, without a network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import laplace_amort
from laplace_amort import plots, routes, testing

project = "laplace_amort"
version = release = laplace_amort.__version__
language = "en"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
html_theme = "sphinx_rtd_theme"
html_theme_options = {"navigation_depth": 3}
html_static_path = ["_static"]
html_css_files = ["laplace_amort.css"]
html_show_copyright = html_show_sphinx = html_copy_source = False

add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch and Pyro are in other formats
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 120

# Every name that is referred to must be documented. What other projects document cannot be looked up offline. Of our
# own, these are what strategies make of themselves while a fit runs; nobody else makes or reads them.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|fx|pyro|numpy|scipy|matplotlib|arviz|xarray|pandas)\..*"),
    ("py:.*", r"(collections|pathlib|typing|enum|functools)\..*"),
    ("py:.*", r"(Any|Callable|Iterable|Iterator|Mapping|Sequence|Path|Tensor|ELBO|NDArray|ndarray|Figure|tqdm)"),
    ("py:class", r"(laplace_amort\.[\w.]+\.)?((ELBO|Nested|Quadrature|Laplace)Function|WalkState)"),
    ("py:.*", r"(laplace_amort\.[\w.]+\.)?Journal(\.\w+)?"),
    ("py:class", r"(laplace_amort\.[\w.]+\.)?(SubsampledPlate|ObservedSite|Drawn|UnitIntegrals|Terms)"),
    ("py:class", r"(laplace_amort\.[\w.]+\.)?(PosteriorDraws|Gradients|FirstDerivatives|Self|Vector|Space|Value)"),
    ("py:class", r"(laplace_amort\.[\w.]+\.)?(Arithmetic|ManyPoints|Operations|Seen)"),
]


PUBLIC = {name: f"{room.__name__}.{name}" for room in (plots, routes, testing, laplace_amort) for name in room.__all__}
PUBLIC["routes"] = routes.__name__


class LinkFiles(SphinxTransform):
    """Links of one page to another, ```text <page.rst>`_``, also work where rst is read as it is."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Replace the link to the file by one to the page; Sphinx warns if there is no such page."""
        for link in list(self.document.findall(nodes.reference)):
            page, dot_rst, part = link.get("refuri", "").partition(".rst")
            if dot_rst and not part and "://" not in page:
                target = addnodes.pending_xref(
                    "", nodes.inline("", link.astext()), refdomain="std", reftype="doc", reftarget=page,
                    refdoc=self.env.docname, refexplicit=True, refwarn=True,
                )  # fmt: skip
                link.replace_self(target)


class PlainOutput(SphinxTransform):
    """Blocks after two colons are examples with prompts, or output and formulas, which are no Python."""

    default_priority = 390  # before Sphinx takes them all for Python

    def apply(self, **kwargs: Any) -> None:
        """Give each of them its language."""
        for block in self.document.findall(nodes.literal_block):
            if "language" not in block:
                block["language"] = "pycon" if block.astext().startswith(">>>") else "none"


class LinkNames(SphinxTransform):
    """Public names in literal text, ``fit`` or ``Ladder(...)``, lead to their documentation, without any role."""

    default_priority = 401

    def apply(self, **kwargs: Any) -> None:
        """Wrap every literal that begins with a public name."""
        for literal in list(self.document.findall(nodes.literal)):
            name = re.match(r"\w+(?=$|\(|\.)", literal.astext())
            if not name or name[0] not in PUBLIC or _is_linked(literal):
                continue
            target = addnodes.pending_xref(
                "", literal.deepcopy(), refdomain="py", reftype="obj", reftarget=PUBLIC[name[0]],
                refdoc=self.env.docname, refexplicit=True, refwarn=True,
            )  # fmt: skip
            literal.replace_self(target)


def _is_linked(node: nodes.Node) -> bool:
    while node is not None:
        if isinstance(node, nodes.reference | addnodes.pending_xref | nodes.title):
            return True
        node = node.parent
    return False


def find_by_last_part(app: Sphinx, env: Any, node: addnodes.pending_xref, text: nodes.Element) -> Any:
    """Find what a docstring names by the module it is in, or without one, under the name that it is documented by."""
    ours = re.fullmatch(r"(?:laplace_amort\.(?:\w+\.)*)?(\w+|[A-Z]\w+\.\w+)", node["reftarget"])
    if not ours or node["refdomain"] != "py":
        return None
    domain, found = env.domains["py"], []
    if not re.match(r"laplace_amort\.\w+$", node["reftarget"]):  # the public names themselves must be documented
        matches = domain.find_obj(env, None, None, ours[1], None, 1)
        found = [match for match in matches if not match[1].aliased]  # not by the file as well as by the room
    if len(found) != 1:
        return None
    place = (env, node["refdoc"], app.builder, "obj", found[0][0])
    return domain.resolve_xref(*place, node, text)


def separate_references(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make a paragraph of each reference: docstrings have them one below the other."""
    for at in reversed(range(1, len(lines))):
        if re.match(r" *\[\d+\] ", lines[at]):
            lines.insert(at, "")


def setup(app: Sphinx) -> None:
    """Add what this file defines."""
    app.add_transform(PlainOutput)
    app.add_transform(LinkFiles)
    app.add_transform(LinkNames)
    app.connect("missing-reference", find_by_last_part)
    app.connect("autodoc-process-docstring", separate_references)
