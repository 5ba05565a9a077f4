"""A recording of a concatenation, taken apart without evaluating what is not asked for."""

import pytest
import torch
from helpers.models import normals

from laplace_amort.autodiff import record
from laplace_amort.errors import RecordingError

DATA = torch.tensor([1.0, 3.0], dtype=torch.float64)
POINT = torch.zeros(1), torch.zeros(2, 1)


def terms(global_, local):
    return [-(global_**2), -((DATA - local[:, 0]) ** 2).exp(), (global_ * local[:, 0]).sin()]


def joined(global_, local):
    return torch.cat(terms(global_, local))


def test_parts_are_what_was_joined():
    parts = record(joined, *POINT).parts()
    point = normals(1), normals(2, 1, seed=1)
    torch.testing.assert_close(parts(*point), tuple(terms(*point)))


def test_what_is_recorded_of_a_part_has_the_operations_of_that_part():
    parts = record(joined, *POINT).parts()
    for number in range(3):
        alone = record(lambda *point, number=number: terms(*point)[number].sum(), *POINT)
        again = record(lambda *point, number=number: parts(*point)[number].sum(), *POINT)
        assert len(again) <= len(alone)


def test_a_part_is_nan_where_a_factorization_fails():
    def with_cholesky(global_, local):
        covariance = torch.eye(2) + global_ * (1 - torch.eye(2))
        return torch.cat([local[:, 0], torch.linalg.cholesky(covariance).diagonal().log()])

    parts = record(with_cholesky, *POINT).parts()
    good, bad = parts(torch.full((1,), 0.5), POINT[1]), parts(torch.full((1,), 2.0), POINT[1])
    assert all(part.isfinite().all() for part in good)
    assert all(part.isnan().all() for part in bad)


def test_what_is_no_concatenation_has_no_parts():
    with pytest.raises(RecordingError, match="no concatenation"):
        record(lambda global_, local: global_.sum() * local.sum(), *POINT).parts()
