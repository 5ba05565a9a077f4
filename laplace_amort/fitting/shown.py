"""What is shown of a fit: the verdict, the posterior's table, and how it was found, as text and as HTML."""

from __future__ import annotations

from laplace_amort.fitting.verdict import Judgement
from laplace_amort.posterior import GlobalsTable, markup

__all__ = ["html", "text"]


def text(judgement: Judgement, table: GlobalsTable | str, how: str) -> str:
    """Return all that is to be said of a fit.

    :param Judgement judgement: how far to trust it.
    :param table: of the globals, or why there is none; empty if the verdict has said it.
    :param str how: it was found.
    """
    return "\n\n".join(part for part in (str(judgement), str(table), how) if part)


def html(judgement: Judgement, table: GlobalsTable | str, how: str) -> str:
    """Return what :func:`text` does, as HTML.

    :param Judgement judgement: how far to trust it.
    :param table: of the globals, or why there is none; empty if the verdict has said it.
    :param str how: it was found.
    """
    first, _, reasons = str(judgement).partition("\n")
    bold = f"{judgement.verdict.name}: {judgement.verdict}"
    kind = f"verdict {'ok' if judgement.verdict.ok else 'not-ok'}"
    parts = [markup.strong(bold, first.removeprefix(bold), kind)]
    parts += [markup.paragraph(reasons, "reasons")] if reasons else []
    parts += [table._repr_html_() if isinstance(table, GlobalsTable) else markup.paragraph(table, "no-table")]
    return markup.division([*parts, markup.paragraph(how, "how")], "laplace-amort")
