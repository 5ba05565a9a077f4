"""What the demos are called: the help of the command line says it before any of them, or torch, is there."""

from __future__ import annotations

__all__ = ["STEPS", "TITLES"]

# Of the examples with a long run of NUTS, and of the one with the truth.
TITLES = {
    "multisite": "44 sites of an education experiment, Student-t effects, the conditional mode in closed form",
    "epil": "59 patients of an epilepsy trial, Poisson log-normal counts, the conditional mode by Newton steps",
    "radon": "919 homes in 85 counties, intercept and slope of each county, the conditional mode by Newton steps",
    "senc": "212 precincts of North Carolina, party by race from margins alone, beside the true tables",
}
STEPS = 400  # of SVI, for each guide
