"""Fits of the models of the table, made once for all tests of what comes after a fit."""

from __future__ import annotations

import functools

from helpers import posteriors as posterior_helpers

# Models with parameters, which every test clears.
_NOT_KEPT = "with_params", "module"


def fitted(name):
    return posterior_helpers.fitted(name) if name in _NOT_KEPT else _kept(name)


@functools.cache
def _kept(name):
    return posterior_helpers.fitted(name)
