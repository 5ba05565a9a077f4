r"""Ecological inference: who in a precinct chose what, when only the margins of that table are known.

Precinct ``i`` has :math:`n_{ir}` voters of race ``r``, and :math:`v_{ic}` of its voters made choice ``c``. The table of
race by choice inside is hidden. Its rates are the unit's latents, as logits against the first choice,

.. math:: \pi_{ir} = \text{softmax}(0, \eta_{ir1}, \dots, \eta_{ir,C-1}), \qquad
          v_i \sim \text{Multinomial}\Big(n_i,\; \sum_r \tfrac{n_{ir}}{n_i} \pi_{ir}\Big).

Contrasts with one choice are identified, where one logit for each choice would not be. Three models of them:

- :func:`model`: :math:`\eta_{irc} \sim N(\mu_{rc}, \sigma_{rc})`, the same everywhere but for noise;
- :func:`contextual_model`: means that are linear in the races' shares of the precinct, and a covariance of the
  contrasts, which is the same for all races;
- :func:`shared_scale_model`: one :math:`\sigma` for the logits of all choices, before contrasts were taken.

The first assumes that a race votes the same wherever it lives. Where whites among many black neighbors vote unlike
whites among whites, that is wrong, the estimates are biased (*aggregation bias*), and no posterior of that model shows
it: its intervals are narrow around the wrong place.

The data are party registrations in 212 precincts of eight counties in the south-east of North Carolina, 2001. The state
registered party and race of each voter, so the table inside each precinct is known: :func:`truth`.

To fit it::

    voters, votes = data()
    guide = AutoLaplaceFamily(contextual_model, head=MarginalCurvature())
    result = fit(contextual_model, voters, votes, guide=guide, objective=MarginalLaplace())
    rates = choice_rates(result.gaussian.sample(1000)["eta"])
    print(overall_rates(rates, voters).mean(0))

References: King (1997), *A Solution to the Ecological Inference Problem*; Rosen, Jiang, King & Tanner (2001), *Bayesian
and frequentist inference for ecological inference: the R x C case*, Statistica Neerlandica 55; Wakefield (2004),
*Ecological inference for 2 x 2 tables*, Journal of the Royal Statistical Society A 167.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import pad

from laplace_amort import AutoLaplaceFamily
from laplace_amort.examples import datasets

__all__ = [
    "CHOICES",
    "RACES",
    "PrecinctVotes",
    "check_case",
    "choice_rates",
    "contextual_model",
    "data",
    "draw_choices",
    "model",
    "overall_rates",
    "shared_scale_model",
    "truth",
]

RACES = "white", "black", "natam"
CHOICES = "none", "dem", "rep"


def data() -> tuple[Tensor, Tensor]:
    """Return the arguments of the models: ``voters (212, 3)`` by race, and ``votes (212, 3)`` by choice.

    Races are in the order of :data:`RACES`, choices in that of :data:`CHOICES`; ``none`` is neither big party.
    """
    columns = datasets.load("senc")
    return (
        torch.stack([columns[f"n_{race}"] for race in RACES], dim=-1),
        torch.stack([columns[f"v_{choice}"] for choice in CHOICES], dim=-1),
    )


def truth() -> Tensor:
    """Return the tables inside the precincts, voters by race and choice, ``(212, 3, 3)``; no model sees them."""
    columns = datasets.load("senc")
    rows = [torch.stack([columns[f"y_{race}_{choice}"] for choice in CHOICES], dim=-1) for race in RACES]
    return torch.stack(rows, dim=-2)


class PrecinctVotes(dist.TorchDistribution):
    """Votes of precincts whose voters choose at the rates of their races.

    A multinomial: each vote is by a voter whose race is drawn from the shares of the precinct. The numbers of a race's
    voters are known, not drawn, so this is a little too wide; with hundreds of voters that is nothing beside the
    variation of precincts.

    :param Tensor voters: by race, ``(N, R)``; a race may have none, a precinct must have some.
    :param Tensor logits: of each race's choices, ``(*, N, R, C)``.

    Example: two races that choose alike are one::

        >>> votes = PrecinctVotes(torch.tensor([[60., 40.]]), torch.zeros(1, 2, 2))
        >>> one = dist.Binomial(100, logits=torch.zeros(1))
        >>> torch.allclose(votes.log_prob(torch.tensor([[70., 30.]])), one.log_prob(torch.tensor([70.])), atol=1e-4)
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "voters": constraints.independent(constraints.nonnegative, 1),
        "logits": constraints.independent(constraints.real, 2),
    }

    def __init__(self, voters: Tensor, logits: Tensor, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(voters.shape[:-1], logits.shape[:-2])
        self.voters = voters.expand(batch + voters.shape[-1:])
        self.logits = logits.expand(batch + logits.shape[-2:])
        super().__init__(batch, logits.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Counts; that they sum to the voters is not checked."""
        return constraints.independent(constraints.nonnegative_integer, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrecinctVotes:
        """Return the same, of a larger batch shape."""
        voters = self.voters.expand(torch.Size(batch_shape) + self.voters.shape[-1:])
        logits = self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-2:])
        return PrecinctVotes(voters, logits, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of ``value (*, N, C)``, as ``(*, N)``, multinomial coefficient included."""
        log_shares = (self.voters / self.voters.sum(-1, keepdim=True)).log()
        log_rates = (log_shares.unsqueeze(-1) + self.logits.log_softmax(-1)).logsumexp(-2)
        coefficient = (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1)
        return coefficient + (value * log_rates).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw votes, as many as there are voters, ``(*sample_shape, *, N, C)``; one binomial for each choice."""
        shares = self.voters / self.voters.sum(-1, keepdim=True)
        shape = self._extended_shape(torch.Size(sample_shape))
        rates = (shares.unsqueeze(-1) * self.logits.softmax(-1)).sum(-2).expand(shape)
        return draw_choices(self.voters.sum(-1).round(), rates)


def model(voters: Tensor, votes: Tensor | None = None) -> None:
    """The same rates everywhere, but for noise.

    :param Tensor voters: by race, ``(N, R)``.
    :param Tensor votes: by choice, ``(N, C)``; without it, three choices are drawn.
    """
    shape = _shape(voters, votes)
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand(shape).to_event(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0).expand(shape).to_event(2))
    with pyro.plate("precincts", len(voters), dim=-1):
        eta = pyro.sample("eta", dist.Normal(mu, sigma).to_event(2))
        _observe(voters, votes, eta)


def contextual_model(voters: Tensor, votes: Tensor | None = None) -> None:
    """Rates that may depend on who else lives in the precinct.

    ``gamma[r, c, s]`` is the change of a race's logit with the share of race ``s + 1``, that of all precincts taken as
    zero: so ``mu`` is the logit where the shares are as in all of them.

    :param Tensor voters: by race, ``(N, R)``.
    :param Tensor votes: by choice, ``(N, C)``; without it, three choices are drawn.
    """
    shape = _shape(voters, votes)
    shares = voters / voters.sum(-1, keepdim=True) - voters.sum(0) / voters.sum()
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand(shape).to_event(2))
    gamma = pyro.sample("gamma", dist.Normal(0.0, 1.0).expand([*shape, shape[0] - 1]).to_event(3))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0).expand(shape[1:]).to_event(1))
    correlation = pyro.sample("correlation", dist.LKJCholesky(shape[1], 1.0))
    with pyro.plate("precincts", len(voters), dim=-1):
        mean = mu + (gamma * shares[:, None, None, 1:]).sum(-1)
        scale_tril = (sigma.unsqueeze(-1) * correlation).unsqueeze(-3)  # the same for every race
        eta = pyro.sample("eta", dist.MultivariateNormal(mean, scale_tril=scale_tril).to_event(1))
        _observe(voters, votes, eta)


def shared_scale_model(voters: Tensor, votes: Tensor | None = None) -> None:
    r"""One scale for all: contrasts of :math:`\alpha_c + \beta_{rc} + \nu_{irc}`, with :math:`\nu \sim N(0, \sigma)`.

    The priors :math:`\alpha_c, \beta_{rc} \sim N(0, 4)` and :math:`\sigma \sim \text{LogNormal}(-2.5, 1.2)`, and the
    normal ``nu``, are carried over to what is identified: contrasts of independent normals are correlated.

    :param Tensor voters: by race, ``(N, R)``.
    :param Tensor votes: by choice, ``(N, C)``; without it, three choices are drawn.
    """
    races, contrasts = _shape(voters, votes)
    # The first choice's logit is in every contrast, and alpha in every race's.
    of_choices, of_races = (torch.ones(n, n).to(voters) + torch.eye(n).to(voters) for n in (contrasts, races))
    prior = dist.MultivariateNormal(voters.new_zeros(races * contrasts), 16.0 * torch.kron(of_races, of_choices))
    mu = pyro.sample("mu", prior)
    sigma = pyro.sample("sigma", dist.LogNormal(-2.5, 1.2))
    with pyro.plate("precincts", len(voters), dim=-1):
        scale_tril = sigma[..., None, None, None] * torch.linalg.cholesky(of_choices)
        noise = dist.MultivariateNormal(mu.unflatten(-1, (races, contrasts)), scale_tril=scale_tril)
        _observe(voters, votes, pyro.sample("eta", noise.to_event(1)))


def choice_rates(eta: Tensor) -> Tensor:
    """Return the rates of each race's choices, ``(*, N, R, C)``, of contrasts ``eta (*, N, R, C - 1)``."""
    return pad(eta, (1, 0)).softmax(-1)


@torch.no_grad()
def draw_choices(voters: Tensor, rates: Tensor) -> Tensor:
    """Draw how many voters make each choice, ``(*, C)``; one binomial for each choice.

    :param Tensor voters: their number, ``(*)`` or what broadcasts to it.
    :param Tensor rates: of the choices, ``(*, C)``.
    """
    left, share, counts = voters.expand(rates.shape[:-1]), torch.ones_like(rates[..., 0]), []
    for rate in rates.unbind(-1)[:-1]:
        counts.append(torch.binomial(left.contiguous(), (rate / share).clamp(0, 1)))
        left, share = left - counts[-1], (share - rate).clamp(min=torch.finfo(rate.dtype).tiny)
    return torch.stack([*counts, left], dim=-1)


def overall_rates(rates: Tensor, voters: Tensor) -> Tensor:
    """Return the rates of all voters of a race, ``(*, R, C)``, of those in precincts, ``(*, N, R, C)``.

    :param Tensor rates: ``(*, N, R, C)``.
    :param Tensor voters: by race, ``(N, R)``.
    """
    return (voters.unsqueeze(-1) * rates).sum(-3) / voters.sum(0).unsqueeze(-1)


def check_case() -> tuple[Callable[..., None], AutoLaplaceFamily, tuple[Tensor, ...]]:
    """Return model, guide and arguments, for ``laplace-amort check laplace_amort.examples.ecological:check_case``."""
    voters, votes = data()
    return model, AutoLaplaceFamily(model), (voters[:12], votes[:12])


def _shape(voters: Tensor, votes: Tensor | None) -> list[int]:
    """Races, and contrasts of choices."""
    return [voters.shape[-1], (len(CHOICES) if votes is None else votes.shape[-1]) - 1]


def _observe(voters: Tensor, votes: Tensor | None, eta: Tensor) -> None:
    pyro.sample("votes", PrecinctVotes(voters, pad(eta, (1, 0))), obs=votes)
