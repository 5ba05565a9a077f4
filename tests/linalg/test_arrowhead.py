"""Every operation of an arrowhead against its dense twin, with first and second derivatives."""

from collections.abc import Callable

import pytest
import torch
from helpers.arrowheads import (
    OPERATIONS,
    ArrowheadCase,
    Blocks,
    Vectors,
    arrowhead_cases,
    dense,
    derivatives,
    relative_error,
)
from helpers.oracles import Figures
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laplace_amort.linalg.arrowhead import Arrowhead

figures = Figures()

Function = Callable[..., Tensor]

TOLERANCE = 1e-10


def both_ways(name: str, case: ArrowheadCase, vectors: Vectors, kind: type = Arrowhead) -> tuple[Function, Function]:
    """The operation as two functions of head, border and tail."""
    ours, twin = OPERATIONS[name]
    return (
        lambda *blocks: ours(kind(*Blocks(*blocks).symmetric()), vectors),
        lambda *blocks: twin(dense(Blocks(*blocks).symmetric()), case, vectors),
    )


def error(name: str, blocks: Blocks, ours: Function, twin: Function) -> float:
    orders = ["value", "gradient", "second derivative"]
    pairs = zip(orders, derivatives(ours, blocks), derivatives(twin, blocks), strict=True)
    return max(figures.add(f"{name}, {order}", relative_error(a, b)) for order, a, b in pairs)


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=settings.default.max_examples * 2 // 5)
@given(case=arrowhead_cases(), samples=st.sampled_from([(), (3,), (2, 1), (0,)]))
def test_equals_its_dense_twin(name: str, case: ArrowheadCase, samples: tuple[int, ...]) -> None:
    ours, twin = both_ways(name, case, case.vectors(*samples))
    assert error(name, case.blocks(), ours, twin) < TOLERANCE


# ------------------------------------------------------------------------------------------------------- planted bugs


class TransposedScale(Arrowhead):
    """Upper triangular scales: the right covariances, other draws."""

    def __init__(self, head, border, tail):
        super().__init__(head, border, tail)
        self.local_scale_tril = torch.linalg.cholesky(tail).mT.inverse()
        self._whitened = self.local_scale_tril.mT @ border


class SignOfRegression(Arrowhead):
    def conditional_mean(self, deviation):
        return -super().conditional_mean(deviation)

    def draw_local(self, deviation, noise):
        return super().draw_local(-deviation, noise)


class DetachedScales(Arrowhead):
    """Right values without gradients."""

    def __init__(self, head, border, tail):
        super().__init__(head, border, tail.detach())


class HeadForSchurComplement(Arrowhead):
    def __init__(self, head, border, tail):
        super().__init__(head, border, tail)
        self.schur_complement = head


class ForgetfulLogDet(Arrowhead):
    def log_det(self):
        return super().log_det() - torch.logdet(self.tail[..., 0, :, :])


class ConditionalForMarginal(Arrowhead):
    def local_covariance(self):
        return self.conditional_covariance()

    def local_variance(self):
        return self.conditional_covariance().diagonal(dim1=-2, dim2=-1)


PLANTED = {
    TransposedScale: ["draw", "draw_local", "local_scale_tril"],
    SignOfRegression: ["draw", "draw_local", "solve", "conditional_mean"],
    DetachedScales: ["log_det", "solve", "solve_tails", "draw", "regression", "local_covariance", "schur_complement"],
    HeadForSchurComplement: ["log_det", "solve", "draw", "global_variance", "cross_covariance", "schur_complement"],
    ForgetfulLogDet: ["log_det"],
    ConditionalForMarginal: ["local_covariance", "local_variance"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in PLANTED.items() for name in names])
def test_comparison_finds_planted_bugs(kind: type, name: str) -> None:
    case = ArrowheadCase(global_dim=2, num_units=3, local_dim=2, seed=1)
    blocks, vectors = case.blocks(), case.vectors()
    ours, twin = (derivatives(function, blocks) for function in both_ways(name, case, vectors, kind))
    assert max(relative_error(a, b) for a, b in zip(ours, twin, strict=True)) > 1e-2
