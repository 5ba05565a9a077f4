"""What the run that finds the sites shows is not looked for again, and what it cannot show is."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from laplace_amort import LogJoint
from laplace_amort.errors import ModelError

Z = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
RUNS = []


def model(z, size=3):
    RUNS.append(len(z))
    error = pyro.param("error", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", 3, subsample_size=size, dim=-1) as index:
        pyro.sample("z", dist.Normal(mu, error), obs=z[index])


@pytest.fixture(autouse=True)
def clean():
    RUNS.clear()
    pyro.clear_param_store()


def test_parameters_and_the_check_of_data_take_no_further_run():
    log_joint = LogJoint(model, Z)
    log_joint.check_data()
    log_joint.check_data()
    (leaf,) = log_joint.parameters().values()
    assert leaf is pyro.get_param_store()._params["error"]
    assert len(RUNS) == 1


def test_data_are_refused_as_often_as_one_asks():
    log_joint = LogJoint(model, Z.index_fill(0, torch.tensor([1]), torch.nan))
    for _ in range(2):
        with pytest.raises(ModelError, match=r"'z' \(Normal\) has 1 of 3 values that are impossible"):
            log_joint.check_data()
    assert len(RUNS) == 1


def test_other_data_are_looked_at():
    log_joint = LogJoint(model, Z)
    log_joint.check_data()
    other = log_joint.given(Z.index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(ModelError, match="impossible"):
        other.check_data()
    assert list(other.parameters()) == ["error"]
    assert len(RUNS) == 2
    log_joint.check_data()
    assert len(RUNS) == 2


@pytest.mark.parametrize(("index", "runs"), [([0, 1, 2], 1), ([2, 0, 1], 2)])
def test_other_indices_are_looked_at(index, runs):
    LogJoint(model, Z).with_indices(units=torch.tensor(index)).check_data()
    assert len(RUNS) == runs


def test_what_a_minibatch_was_drawn_by_is_told_from_another():
    data = Z.index_fill(0, torch.tensor([1]), torch.nan)
    log_joint = LogJoint.at_indices({"units": torch.tensor([0, 2])}, model, data, size=2)
    log_joint.check_data()
    log_joint.with_indices(units=torch.tensor([0, 2])).check_data()
    assert len(RUNS) == 1
    with pytest.raises(ModelError, match="impossible"):
        log_joint.with_indices(units=torch.tensor([0, 1])).check_data()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_has_no_run_of_its_original(duplicate):
    """A trace has tensors in the middle of a graph, which cannot be copied."""
    log_joint = LogJoint(model, Z)
    other = duplicate(log_joint)
    assert len(RUNS) == 1
    assert list(other.parameters()) == ["error"]
    assert len(RUNS) == 2
    torch.testing.assert_close(other(torch.zeros(1)), log_joint(torch.zeros(1)))
