"""Symmetric matrices of every kind that a repair meets, and derivative checks, shared by the tests of the repairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck


def with_eigenvalues(*eigenvalues: float, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """``(*batch, n, n)``, each in a random basis of its own."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64))
    matrix = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.mT
    return (matrix + matrix.mT) / 2


MATRICES = {
    "distinct": with_eigenvalues(0.3, 1.0, 2.5),
    "repeated": with_eigenvalues(0.7, 0.7, 2.0),
    "multiple of the identity": 0.8 * torch.eye(3, dtype=torch.float64),
    "zero": torch.zeros(3, 3, dtype=torch.float64),
    "zero 2x2": torch.zeros(2, 2, dtype=torch.float64),
    "nearly repeated": with_eigenvalues(0.7, 0.7 + 1e-9, 0.7 + 1e-5),
    "zero eigenvalues": with_eigenvalues(0.0, 0.0, 1.5),
    "indefinite": with_eigenvalues(-1.2, 0.4, 0.4),
    "indefinite 2x2": with_eigenvalues(-1.2, 0.4),
    "negative": with_eigenvalues(-1.0, -1.0, -0.2),
    "opposite": with_eigenvalues(-1.0, 1.0, 1.0),
    "spread": with_eigenvalues(-0.01, 0.3, 40.0, 40.0),
    "1x1": torch.tensor([[-0.4]], dtype=torch.float64),
    "batch": with_eigenvalues(-0.5, 0.5, 0.5, batch=(2,)),
    "nested batch": with_eigenvalues(0.1, 0.1, batch=(1, 2)),
}
# Members that need a repair with a floor of 0.5 and members that do not, with coinciding eigenvalues in both.
_SPECTRA = [(-0.4, -0.4, 2.0), (90.0, 90.0, 95.0), (0.0, 0.0, 40.0)]
MIXED = torch.stack([with_eigenvalues(*spectrum, seed=seed) for seed, spectrum in enumerate(_SPECTRA)])


def symmetrized(repair: Callable[..., tuple[Tensor, object]]) -> Callable[..., Tensor]:
    """The repaired matrix as a function of any square one."""
    return lambda matrix, *scale: repair((matrix + matrix.mT) / 2, *scale)[0]


def check_derivatives(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    """First and second derivatives against finite differences, one by one and in batched reverse passes."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    gradcheck(fn, leaves, check_batched_grad=True)
    gradgradcheck(fn, leaves, check_batched_grad=True)
