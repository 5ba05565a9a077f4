"""Sites of which ``obs_mask`` hides a part, filled in: what was observed, and draws of what was not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro.infer import Predictive
from torch import Tensor

from laplace_amort.model import observed_sites
from laplace_amort.posterior.draws import PosteriorDraws

__all__ = ["filled_in"]


@torch.no_grad()
def filled_in(posterior: PosteriorDraws, drawn: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw what was not observed from what the model says of it, given draws of all latents.

    :param Posterior posterior: that these are of.
    :param drawn: constrained values ``(S, *shape)`` of every latent, by site.
    :param int seed: of these draws; torch's generator stays as it is.
    :return: values ``(S, *shape)`` of each site that has an ``obs_mask``, under its own name.
    """
    model = posterior.gaussian.unit_model
    names = model.density.partly_observed
    if not names:
        return {}
    predictive = Predictive(posterior.problem.guide.model, dict(drawn), return_sites=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = predictive(*model.args, **model.kwargs)
    sites = observed_sites(model)  # Predictive leaves room for plates that a site is not in
    return {name: values[name].reshape(-1, *sites[name].value.shape) for name in names}
