"""Small real data sets and reference posteriors, shipped with the package for the examples and the demo.

Sources and terms are in ``PROVENANCE.rst`` beside this file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["DATASETS", "REFERENCES", "Reference", "Summary", "load", "reference"]

DATASETS = ("effects_errors", "epil", "radon_mn", "senc")
REFERENCES = ("multisite", "epil", "radon")


@dataclass(frozen=True)
class Summary:
    """What a reference posterior says of one quantity; every tensor has the shape of the quantity.

    :param str role: "global", "local", or "derived" for a function of the globals.
    :param Tensor mean: posterior mean.
    :param Tensor sd: posterior standard deviation.
    :param Tensor q05: 5 % quantile.
    :param Tensor q50: median.
    :param Tensor q95: 95 % quantile.
    :param Tensor mcse_mean: Monte Carlo standard error of ``mean``.
    :param Tensor mcse_sd: Monte Carlo standard error of ``sd``.
    """

    role: str
    mean: Tensor
    sd: Tensor
    q05: Tensor
    q50: Tensor
    q95: Tensor
    mcse_mean: Tensor
    mcse_sd: Tensor


@dataclass(frozen=True)
class Reference:
    """A reference posterior, from a long run of NUTS, in the model's own constrained space.

    :param str name: name of the reference.
    :param str model: the model in words.
    :param variables: :class:`Summary` of every latent site and derived quantity, by name.
    :param float log_evidence: log p(z), all constants included; no correct ELBO is above it beyond noise.
    :param float log_evidence_standard_error: its Monte Carlo standard error.
    """

    name: str
    model: str
    variables: Mapping[str, Summary]
    log_evidence: float
    log_evidence_standard_error: float


def load(name: str) -> dict[str, Tensor]:
    """Return the columns of a data set as tensors of the default dtype, one element per row.

    ``"effects_errors"``, 44 rows, one per site of a multi-site education experiment: ``site`` number of the site, from
    0; ``effect`` estimated treatment effect there; ``se`` its standard error, in the unit of the effect (which the
    source does not state).

    ``"epil"``, 236 rows, four per patient of an epilepsy trial: ``subject`` number of the patient, from 0; ``period``
    1 to 4, successive periods of two weeks; ``y`` seizures in the period; ``trt`` 1 for progabide, 0 for placebo;
    ``base`` seizures in the eight weeks before treatment; ``age`` in years.

    ``"radon_mn"``, 919 rows, one per home in Minnesota: ``county`` number of the county, from 0 to 84; ``floor`` 0 if
    the radon was measured in the basement, 1 on the ground floor; ``log_radon`` natural logarithm of its activity in
    pCi/L.

    ``"senc"``, 212 rows, one per precinct of eight counties in the south-east of North Carolina, 2001: registered
    voters by race, ``n_white``, ``n_black``, ``n_natam`` (Native American); by party, ``v_dem``, ``v_rep``, ``v_none``;
    and, since the state registered both, by race and party, such as ``y_white_dem``.

    :param str name: one of ``DATASETS``.
    :raises ValueError: if there is no data set of that name.

    Example::

        >>> sites = load("effects_errors")
        >>> list(sites), len(sites["effect"])
        (['site', 'effect', 'se'], 44)
    """
    rows = list(csv.DictReader(_read(_known(name, DATASETS, "data set") + ".csv").splitlines()))
    return {column: torch.tensor([float(row[column]) for row in rows]) for column in rows[0]}


def reference(name: str) -> Reference:
    """Return the reference posterior of one of the example models.

    :param str name: one of ``REFERENCES``.
    :return: :class:`Reference`, its tensors of the default dtype.
    :raises ValueError: if there is no reference of that name.

    Example::

        >>> mu = reference("multisite").variables["mu"]
        >>> print(f"{mu.mean:.3f} +- {mu.sd:.3f}")
        0.062 +- 0.084
    """
    content = json.loads(_read(f"reference_{_known(name, REFERENCES, 'reference posterior')}.json"))
    derived = {key: {**entry, "role": "derived"} for key, entry in content["derived"].items()}
    return Reference(
        name=name,
        model=content["model"],
        variables=MappingProxyType({k: _summary(v) for k, v in {**content["variables"], **derived}.items()}),
        log_evidence=content["log_evidence"]["value"],
        log_evidence_standard_error=content["log_evidence"]["standard_error"],
    )


def _summary(entry: Mapping[str, Any]) -> Summary:
    fields = ("mean", "sd", "q05", "q50", "q95", "mcse_mean", "mcse_sd")
    return Summary(role=entry["role"], **{field: torch.tensor(entry[field]) for field in fields})


def _read(file: str) -> str:
    return resources.files(__name__).joinpath(file).read_text(encoding="utf-8")


def _known(name: str, names: Iterable[str], kind: str) -> str:
    if name not in names:
        raise ValueError(f"there is no {kind} '{name}'; the names are: {', '.join(names)}")
    return name
