"""A pytest plugin for suites that test guides: a fixture that checks one, from a clean slate.

It is asked for by name, in the root ``conftest.py`` of a suite::

    pytest_plugins = ["laplace_amort.testing.pytest_plugin"]

Pytest loads nothing of it anywhere else: a plugin that registers itself would act in every run in an environment,
whatever it tests. Where it is loaded it imports torch for the first test that asks for the fixture, not when pytest
starts. It has no options, no hooks, and no fixture that acts on a test without being named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from laplace_amort.testing import CheckReport, CheckSettings

__all__ = ["GuideCheck", "laplace_amort_check"]

_SEED = 0


class GuideCheck(Protocol):
    """What the fixture hands to a test."""

    def __call__(
        self, model: Any, guide: Any, *args: Any, settings: CheckSettings | None = None, **kwargs: Any
    ) -> CheckReport:
        """Return the report of :func:`laplace_amort.testing.check_guide`, or fail the test with its table.

        :param model: a Pyro model.
        :param guide: a guide for it.
        :param args: arguments of both.
        :param settings: of the check.
        :param kwargs: keyword arguments of both.
        """


@pytest.fixture
def laplace_amort_check() -> Iterator[GuideCheck]:
    """Check a guide's precision and gradients, in float64, with Pyro's validation, an empty parameter store and a seed.

    All of that holds for the whole test, and is put back after it.
    """
    with _clean_slate():
        yield _check


def _check(model: Any, guide: Any, *args: Any, settings: CheckSettings | None = None, **kwargs: Any) -> CheckReport:
    """Check a guide, and fail the test with the table of the report."""
    __tracebackhide__ = True
    from laplace_amort.errors import GuideCheckError
    from laplace_amort.testing import check_guide

    try:
        return check_guide(model, guide, *args, settings=settings, **kwargs)
    except GuideCheckError as error:
        table = f"{error.report}\n\n" if error.report is not None else ""
        pytest.fail(f"{table}{error}", pytrace=False)


@contextmanager
def _clean_slate() -> Iterator[None]:
    """Set what every check starts from, and put it back."""
    import pyro

    from laplace_amort.types import default_dtype

    random = pyro.util.get_rng_state()
    with ExitStack() as stack:
        stack.enter_context(default_dtype())
        stack.callback(pyro.util.set_rng_state, random)
        stack.enter_context(pyro.get_param_store().scope())
        stack.enter_context(pyro.validation_enabled(True))
        pyro.set_rng_seed(_SEED)
        yield
