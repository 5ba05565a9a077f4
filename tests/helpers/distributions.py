"""A table of Pyro distributions, one row each: parameters with their supports, and a value that may be a latent too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform


def unconstrained_to(support: constraints.Constraint) -> Transform:
    """The bijection, or where torch has none (matrix parameters) the map that ``pyro.param`` takes."""
    try:
        return biject_to(support)
    except NotImplementedError:
        return transform_to(support)


double = partial(torch.tensor, dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    """A distribution, its parameters with their supports, a value, and whether that is a latent too."""

    make: Callable[..., dist.TorchDistribution]
    value: Tensor
    latent: bool
    support: constraints.Constraint | None  # of the value, where the distribution does not say
    functorch: bool  # whether torch.func can differentiate it three times
    params: dict[str, tuple[constraints.Constraint, Tensor]]

    def unconstrained(self) -> list[Tensor]:
        """The point: one unconstrained tensor per parameter, and one for the value if it is a latent."""
        points = [unconstrained_to(support).inv(value) for support, value in self.params.values()]
        if self.latent:
            made = self.make(**{name: value for name, (_, value) in self.params.items()})
            points.append(biject_to(self.support or made.support).inv(self.value))
        return [point.detach() for point in points]

    def log_joint(self, *points: Tensor) -> Tensor:
        """Log density of the value, with the Jacobian of its transform if it is a latent."""
        supports = ((name, support) for name, (support, _) in self.params.items())
        made = self.make(**{n: unconstrained_to(support)(u) for (n, support), u in zip(supports, points, strict=False)})
        if not self.latent:
            return made.log_prob(self.value).sum()
        transform = biject_to(self.support or made.support)
        value = transform(points[-1])
        return made.log_prob(value).sum() + transform.log_abs_det_jacobian(points[-1], value).sum()


def row(make, value, *, latent=None, support=None, functorch=True, **params) -> Row:
    """Supports of the parameters come from the class of the distribution, unless given as (support, value)."""
    known = getattr(getattr(make, "func", make), "arg_constraints", {})
    pairs = {name: given if isinstance(given, tuple) else (known[name], given) for name, given in params.items()}
    tensors = {name: (support, double(given)) for name, (support, given) in pairs.items()}
    value = value if isinstance(value, Tensor) else double(value)
    if latent is None:
        latent = value.is_floating_point() and not bool((value == value.round()).all())
    return Row(make, value, latent, support, functorch, tensors)


REAL, POSITIVE, UNIT = constraints.real, constraints.positive, constraints.unit_interval
VECTOR, TRIL = constraints.real_vector, constraints.lower_cholesky
REALS, POSITIVES, UNITS = [-0.7, 0.4, 1.9], [0.3, 1.1, 2.6], [0.15, 0.5, 0.8]
COUNTS, BITS, LOGITS, PROBS = [0.0, 2.0, 5.0], [0.0, 1.0, 1.0], [0.4, -0.3, 0.1], [0.2, 0.5, 0.3]
PAIRS, PAIR = [[0.3, -0.6], [1.1, 0.7], [-0.4, 0.2]], [0.2, -0.1]
TRIANGLE, COVARIANCE = [[1.2, 0.0], [0.4, 0.8]], [[1.5, 0.3], [0.3, 0.9]]
CHOLESKY = [[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.28, 0.96]]


def zero_inflated(gate, rate):
    return dist.ZeroInflatedDistribution(dist.Poisson(rate), gate=gate)


def mixture(logits, loc, scale):
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, scale))


def beta_mixture(logits, a, b):
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Beta(a, b))


def masked_mixture(loc, scale):
    mask = torch.tensor([True, False, True])
    return dist.MaskedMixture(mask, dist.Normal(loc, scale).expand([3]), dist.Cauchy(loc, scale).expand([3]))


def masked(loc, scale):
    return dist.Normal(loc, scale).expand([3]).mask(torch.tensor([True, False, True]))


def affine(loc, scale, df):
    base = dist.StudentT(df, torch.zeros(()), torch.ones(()))
    return dist.TransformedDistribution(base, dist.transforms.AffineTransform(loc, scale))


def softplus_normal(loc, scale):
    return dist.TransformedDistribution(dist.Normal(loc, scale), dist.transforms.SoftplusTransform())


def sine_skewed(loc, concentration, skewness):
    return dist.SineSkewed(dist.VonMises(loc, concentration).to_event(1), skewness)


def gaussian_hmm(scale):
    noise, identity = dist.Normal(torch.zeros(1), scale).to_event(1), torch.eye(1)
    return dist.GaussianHMM(noise, identity, noise, identity, noise, duration=3)


def discrete_hmm(initial, transition, loc):
    return dist.DiscreteHMM(initial, transition, dist.Normal(loc, 1.0))


ROWS = {
    # real line
    "Normal": row(dist.Normal, REALS, loc=0.2, scale=0.8),
    "StudentT": row(dist.StudentT, REALS, df=3.5, loc=0.2, scale=0.8),
    "Cauchy": row(dist.Cauchy, REALS, loc=0.2, scale=0.8),
    "Laplace": row(dist.Laplace, REALS, loc=0.1, scale=0.8),
    "Logistic": row(dist.Logistic, REALS, loc=0.2, scale=0.8),
    "Gumbel": row(dist.Gumbel, REALS, loc=0.2, scale=0.8),
    "SoftLaplace": row(dist.SoftLaplace, REALS, loc=0.2, scale=0.8),
    "AsymmetricLaplace": row(dist.AsymmetricLaplace, REALS, loc=0.1, scale=0.8, asymmetry=1.3),
    "SoftAsymmetricLaplace": row(dist.SoftAsymmetricLaplace, REALS, loc=0.1, scale=0.8, asymmetry=1.3, softness=0.7),
    "SkewLogistic": row(dist.SkewLogistic, REALS, loc=0.2, scale=0.8, asymmetry=1.3),
    "VonMises": row(dist.VonMises, REALS, loc=0.2, concentration=1.7),
    "VonMises concentrated": row(dist.VonMises, REALS, loc=0.2, concentration=9.0),
    "GroupedNormalNormal": row(
        partial(dist.GroupedNormalNormal, group_idx=torch.tensor([0, 0, 1])),
        REALS,
        latent=False,
        prior_loc=[0.1, 0.3],
        prior_scale=[0.8, 1.1],
        obs_scale=[0.5, 0.9, 1.2],
    ),
    "NanMaskedNormal": row(dist.NanMaskedNormal, [0.3, float("nan"), 1.2], latent=False, loc=0.2, scale=0.8),
    "Stable": row(dist.StableWithLogProb, REALS, stability=1.7, skew=0.1, scale=0.8, loc=0.2),
    # half line
    "LogNormal": row(dist.LogNormal, POSITIVES, loc=0.2, scale=0.8),
    "HalfNormal": row(dist.HalfNormal, POSITIVES, scale=0.8),
    "HalfCauchy": row(dist.HalfCauchy, POSITIVES, scale=0.8),
    "Gamma": row(dist.Gamma, POSITIVES, concentration=1.7, rate=0.8),
    "InverseGamma": row(dist.InverseGamma, POSITIVES, concentration=1.7, rate=0.8),
    "Chi2": row(dist.Chi2, POSITIVES, df=3.5),
    "Exponential": row(dist.Exponential, POSITIVES, rate=0.8),
    "Weibull": row(dist.Weibull, POSITIVES, scale=0.8, concentration=1.7),
    "FisherSnedecor": row(dist.FisherSnedecor, POSITIVES, df1=3.5, df2=5.5),
    "Pareto": row(dist.Pareto, POSITIVES, scale=0.2, alpha=1.7),
    "GeneralizedPareto": row(dist.GeneralizedPareto, POSITIVES, latent=False, loc=0.1, scale=0.8, concentration=0.6),
    "FoldedDistribution": row(
        lambda **p: dist.FoldedDistribution(dist.Normal(**p)), POSITIVES, loc=(REAL, 0.2), scale=(POSITIVE, 0.8)
    ),
    # unit interval and simplex
    "Beta": row(dist.Beta, UNITS, concentration1=1.7, concentration0=0.8),
    "Kumaraswamy": row(dist.Kumaraswamy, UNITS, concentration1=1.7, concentration0=0.8),
    "ContinuousBernoulli": row(dist.ContinuousBernoulli, UNITS, probs=0.3),
    "ContinuousBernoulli near 1/2": row(dist.ContinuousBernoulli, UNITS, probs=0.4995),
    "AffineBeta": row(dist.AffineBeta, [0.6, 1.4, 2.0], concentration1=1.7, concentration0=0.8, loc=0.2, scale=2.5),
    "RelaxedBernoulli": row(partial(dist.RelaxedBernoulli, double(0.7)), UNITS, logits=0.4),
    "TruncatedPolyaGamma": row(partial(dist.TruncatedPolyaGamma, double(0.0)), UNITS),
    "Dirichlet": row(dist.Dirichlet, PROBS, concentration=[1.7, 0.8, 2.4]),
    "LogisticNormal": row(dist.LogisticNormal, PROBS, loc=[0.2, -0.4], scale=[0.8, 1.3]),
    "RelaxedOneHotCategorical": row(partial(dist.RelaxedOneHotCategorical, double(0.7)), PROBS, logits=LOGITS),
    # vectors and matrices
    "MultivariateNormal scale_tril": row(dist.MultivariateNormal, PAIRS, loc=PAIR, scale_tril=TRIANGLE),
    "MultivariateNormal covariance": row(dist.MultivariateNormal, PAIRS, loc=PAIR, covariance_matrix=COVARIANCE),
    "MultivariateNormal precision": row(dist.MultivariateNormal, PAIRS, loc=PAIR, precision_matrix=COVARIANCE),
    "MultivariateStudentT": row(dist.MultivariateStudentT, PAIRS, df=3.5, loc=PAIR, scale_tril=TRIANGLE),
    "LowRankMultivariateNormal": row(
        dist.LowRankMultivariateNormal, PAIRS, loc=PAIR, cov_factor=[[0.6], [-0.4]], cov_diag=[0.8, 1.3]
    ),
    "OMTMultivariateNormal": row(dist.OMTMultivariateNormal, PAIRS, loc=(VECTOR, PAIR), scale_tril=(TRIL, TRIANGLE)),
    "NanMaskedMultivariateNormal": row(
        dist.NanMaskedMultivariateNormal,
        [[0.3, float("nan")], [1.1, 0.7]],
        latent=False,
        loc=PAIR,
        scale_tril=TRIANGLE,
    ),
    "Independent": row(
        lambda **p: dist.Normal(**p).to_event(1), PAIRS, loc=(VECTOR, PAIR), scale=(POSITIVE, [0.8, 1.3])
    ),
    "MixtureOfDiagNormals": row(
        dist.MixtureOfDiagNormals,
        PAIRS,
        locs=PAIRS[:2],
        coord_scale=[[0.8, 1.3], [0.6, 0.9]],
        component_logits=[0.4, -0.3],
    ),
    "MixtureOfDiagNormalsSharedCovariance": row(
        dist.MixtureOfDiagNormalsSharedCovariance,
        PAIRS,
        locs=PAIRS[:2],
        coord_scale=[0.8, 1.3],
        component_logits=[0.4, -0.3],
    ),
    "LKJCholesky": row(partial(dist.LKJCholesky, 3), CHOLESKY, concentration=1.7),
    "LKJ": row(partial(dist.LKJ, 2), [[1.0, 0.6], [0.6, 1.0]], concentration=1.7),
    "Wishart": row(
        dist.Wishart, COVARIANCE, latent=False, df=(constraints.greater_than(1.0), 4.5), scale_tril=(TRIL, TRIANGLE)
    ),
    "ProjectedNormal": row(dist.ProjectedNormal, [0.6, 0.8], latent=False, concentration=[0.4, -0.7]),
    "ProjectedNormal 3": row(dist.ProjectedNormal, [0.6, 0.0, 0.8], latent=False, concentration=[0.4, -0.7, 0.9]),
    "VonMises3D": row(
        dist.VonMises3D, [0.6, 0.0, 0.8], latent=False, functorch=False, concentration=(VECTOR, [0.4, -0.7, 0.9])
    ),
    "SineBivariateVonMises": row(
        dist.SineBivariateVonMises,
        PAIRS,
        phi_loc=0.2,
        psi_loc=-0.1,
        phi_concentration=2.5,
        psi_concentration=1.7,
        correlation=0.4,
    ),
    "SineSkewed": row(
        sine_skewed,
        PAIRS,
        latent=False,
        loc=(VECTOR, PAIR),
        concentration=(POSITIVE, [1.7, 2.5]),
        skewness=(constraints.interval(-1.0, 1.0), [0.3, -0.2]),
    ),
    "SpanningTree": row(dist.SpanningTree, torch.tensor([[0, 1], [0, 2]]), edge_logits=LOGITS),
    "OneOneMatching": row(dist.OneOneMatching, torch.tensor([1, 0]), logits=PAIRS[:2]),
    "DiscreteHMM": row(
        discrete_hmm,
        REALS,
        latent=False,
        functorch=False,
        initial=(VECTOR, PAIR),
        transition=(REAL, COVARIANCE),
        loc=(REAL, [0.2, 1.1]),
    ),
    "CoalescentTimes": row(
        partial(dist.CoalescentTimes, double([0.0, 0.0, 1.0])), [-1.5, -0.7], latent=False, rate=0.8
    ),
    "Unit": row(dist.Unit, [], latent=False, log_factor=0.4),
    "Uniform": row(lambda: dist.Uniform(double(-1.0), double(2.0)), REALS),
    "GaussianHMM": row(gaussian_hmm, [[0.3], [-0.6], [1.1]], scale=(POSITIVE, [0.8])),
    # counts and categories
    "Bernoulli probs": row(dist.Bernoulli, BITS, probs=[0.3, 0.6, 0.8]),
    "Bernoulli logits": row(dist.Bernoulli, BITS, logits=[0.3, -0.6, 0.8]),
    "Geometric probs": row(dist.Geometric, COUNTS, probs=0.3),
    "Geometric logits": row(dist.Geometric, COUNTS, logits=0.3),
    "Binomial probs": row(partial(dist.Binomial, 6), COUNTS, probs=0.3),
    "Binomial logits": row(partial(dist.Binomial, 6), COUNTS, logits=0.3),
    "ExtendedBinomial": row(partial(dist.ExtendedBinomial, 6), COUNTS, logits=0.3),
    "BetaBinomial": row(partial(dist.BetaBinomial, total_count=6), COUNTS, concentration1=1.7, concentration0=0.8),
    "ExtendedBetaBinomial": row(
        partial(dist.ExtendedBetaBinomial, total_count=6), COUNTS, concentration1=1.7, concentration0=0.8
    ),
    "Poisson": row(dist.Poisson, COUNTS, rate=1.7),
    "GammaPoisson": row(dist.GammaPoisson, COUNTS, concentration=1.7, rate=0.8),
    "NegativeBinomial logits": row(dist.NegativeBinomial, COUNTS, total_count=1.7, logits=0.3),
    "NegativeBinomial probs": row(dist.NegativeBinomial, COUNTS, total_count=1.7, probs=(UNIT, 0.3)),
    "LogNormalNegativeBinomial": row(
        dist.LogNormalNegativeBinomial, COUNTS, total_count=1.7, logits=0.3, multiplicative_noise_scale=0.4
    ),
    "ZeroInflatedPoisson": row(dist.ZeroInflatedPoisson, COUNTS, rate=1.7, gate=0.3),
    "ZeroInflatedNegativeBinomial": row(
        dist.ZeroInflatedNegativeBinomial, COUNTS, total_count=1.7, logits=0.3, gate_logits=-0.4
    ),
    "ZeroInflatedDistribution": row(zero_inflated, COUNTS, gate=(UNIT, 0.3), rate=(POSITIVE, 1.7)),
    "Categorical probs": row(dist.Categorical, COUNTS[:2], probs=PROBS),
    "Categorical logits": row(dist.Categorical, COUNTS[:2], logits=LOGITS),
    "OneHotCategorical": row(dist.OneHotCategorical, [0.0, 1.0, 0.0], logits=LOGITS),
    "Multinomial probs": row(partial(dist.Multinomial, 7), COUNTS, probs=PROBS),
    "Multinomial logits": row(partial(dist.Multinomial, 7), COUNTS, logits=LOGITS),
    "DirichletMultinomial": row(
        partial(dist.DirichletMultinomial, total_count=7), COUNTS, concentration=[1.7, 0.8, 2.4]
    ),
    "OrderedLogistic": row(dist.OrderedLogistic, COUNTS[:2], predictor=[0.4, -0.3], cutpoints=[-0.9, 0.2, 1.4]),
    # combinations
    "MixtureSameFamily": row(
        mixture, REALS, support=REAL, logits=(VECTOR, PAIR), loc=(VECTOR, [0.2, 1.3]), scale=(POSITIVE, [0.8, 0.5])
    ),
    "MixtureSameFamily of Beta": row(
        beta_mixture, UNITS, support=UNIT, logits=(VECTOR, PAIR), a=(POSITIVE, [1.7, 0.8]), b=(POSITIVE, [0.9, 2.4])
    ),
    "MaskedMixture": row(masked_mixture, REALS, loc=(REAL, 0.2), scale=(POSITIVE, 0.8)),
    "MaskedDistribution": row(masked, REALS, loc=(REAL, 0.2), scale=(POSITIVE, 0.8)),
    "TransformedDistribution": row(affine, REALS, loc=(REAL, 0.2), scale=(POSITIVE, 0.8), df=(POSITIVE, 3.5)),
    "TransformedDistribution nonlinear": row(softplus_normal, POSITIVES, loc=(REAL, 0.2), scale=(POSITIVE, 0.8)),
}
