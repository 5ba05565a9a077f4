"""Every test: float64, validation on, an empty parameter store, a fixed seed."""

import os

import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "wide", max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# LAPLACE_AMORT_HYPOTHESIS=wide searches with fresh random examples.
settings.load_profile(os.environ.get("LAPLACE_AMORT_HYPOTHESIS", "ci"))


@pytest.fixture(autouse=True)
def _clean_slate():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(default)
    pyro.clear_param_store()


@pytest.fixture(scope="module", autouse=True)
def _report_figures(request):
    """With LAPLACE_AMORT_REPORT set, print the largest error of each comparison that a module collects."""
    yield
    figures = getattr(request.module, "figures", {})
    if os.environ.get("LAPLACE_AMORT_REPORT"):
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print()
            for name, (largest, count) in sorted(figures.items()):
                print(f"{name:<45} largest relative error {largest:8.1e} in {count} comparisons")
