"""docs/troubleshooting.rst quotes messages as they are: each is provoked, and every kind of error has an entry."""

import re
import warnings

import pytest
from helpers import documents
from helpers.provokers import MODEL_MESSAGES
from helpers.provokers_of_fits import FIT_MESSAGES

from laplace_amort import FitStatus, errors
from laplace_amort.units.newton import ModeStatus

TEXT = documents.read(documents.ROOT / "docs" / "troubleshooting.rst")
PROVOKERS = MODEL_MESSAGES | FIT_MESSAGES
# Of a fit they are caught and become a note.
IN_NOTES = {"RecordingError", "PrecisionError", "KinkError"}


def quoted(text):
    """The messages that a page quotes: terms of definition lists, with dots for what varies."""
    return re.findall(r"^``(\S.*: .*)``\n    \S", text, re.M)


def said(provoker):
    """What is raised, warned of or returned, as a user reads it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = provoker()
        except Exception as error:
            found = error
    messages = [*(warning.message for warning in caught), *(found if isinstance(found, list) else [found])]
    return [f"{type(m).__name__}: {m}" if isinstance(m, BaseException) else str(m) for m in messages]


def matches(quote, message):
    """Whether a message begins as quoted, wherever its lines are broken."""
    parts = [re.escape(" ".join(part.split())) for part in quote.split("...")]
    return re.match(r"\s*.*?\s*".join(parts), " ".join(message.split())) is not None


@pytest.mark.parametrize("quote", quoted(TEXT))
def test_a_message_reads_as_quoted(quote):
    assert quote in PROVOKERS, f"no provoker for {quote!r}"
    messages = said(PROVOKERS[quote])
    assert any(matches(quote, message) for message in messages), messages


def test_nothing_is_provoked_that_is_not_quoted():
    assert list(PROVOKERS) == [quote for quote in PROVOKERS if quote in quoted(TEXT)]
    assert len(quoted(TEXT)) == len(set(quoted(TEXT)))


@pytest.mark.parametrize("status", [status for status in FitStatus if not status.ok], ids=lambda status: status.name)
def test_every_way_to_end_has_an_entry(status):
    assert any(matches(quote, f"{status.name}: {status}") for quote in quoted(TEXT))


@pytest.mark.parametrize("status", list(ModeStatus)[1:], ids=lambda status: status.name)
def test_every_way_to_lose_a_mode_has_an_entry(status):
    assert any(matches(quote, f"ModeNotFoundError: {status}") for quote in quoted(TEXT))


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith(("Error", "Warning"))])
def test_every_kind_of_error_has_an_entry(name):
    has_entry = any(quote.startswith(f"{name}: ") for quote in quoted(TEXT))
    assert has_entry != (name in IN_NOTES | {"LaplaceAmortError"})


@pytest.mark.parametrize(
    ("quote", "message", "same"),
    [
        ("ModelError: no latent site lies in ... plate", "ModelError: no latent\n    site lies in a plate (mu)", True),
        ("ModelError: no latent site lies in ... plate", "ModeWarning: no latent site lies in a plate", False),
        ("ModelError: no latent site", "ModelError: latent site 'no latent site'", False),
        ("MAX_STEPS: raise max_steps", "MAX_STEPS: raise max steps", False),
    ],
)
def test_a_quote_that_has_gone_stale_is_found(quote, message, same):
    assert matches(quote, message) is same


def test_an_entry_without_a_provoker_is_found():
    page = TEXT.replace("``ModelError: this guide was saved", "``ModelError: that guide was saved")
    assert set(quoted(page)) - set(PROVOKERS) == {"ModelError: that guide was saved without its model"}
