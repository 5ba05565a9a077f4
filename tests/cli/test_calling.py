"""Which columns a model gets as integers: those that it looks elements up by, in every way that torch has."""

import argparse

import pytest
import torch
from torch.nn import functional

from laplace_amort.cli.binding import bind
from laplace_amort.cli.calling import call_once
from laplace_amort.cli.columns import read_table
from laplace_amort.cli.exits import Stop

ROWS = "unit,other,x\n0,1,0.5\n1,1,1\n2,0,2\n"
NONE = argparse.Namespace(target="models.py:f", arg=(), map=(), categorical=(), index=(), drop_missing=False)
FOUR = torch.arange(4.0, dtype=torch.float64)


def indices(tmp_path, function):
    """Names of the columns that a function of ``unit``, ``other`` and ``x`` gets as integers in the end."""
    path = tmp_path / "data.csv"
    path.write_text(ROWS)
    arguments = bind(function, read_table(path), NONE)
    return call_once(function, "models.py:f", arguments, lambda returned: None)[1].indices


@pytest.mark.parametrize(
    "look_up",
    [
        lambda unit: FOUR[unit],
        lambda unit: FOUR[..., unit],
        lambda unit: FOUR.expand(2, 4)[[slice(None), unit][0], unit],
        lambda unit: FOUR.index_select(0, unit),
        lambda unit: torch.index_select(FOUR, dim=0, index=unit),
        lambda unit: FOUR.gather(0, unit),
        lambda unit: torch.take(FOUR, unit),
        lambda unit: torch.take_along_dim(FOUR, unit, 0),
        lambda unit: torch.take_along_dim(FOUR, indices=unit, dim=0),
        lambda unit: torch.zeros(4).index_add(0, unit, torch.ones(3)),
        lambda unit: torch.zeros(4).index_add_(0, unit, torch.ones(3)),
        lambda unit: torch.zeros(4).scatter_add(0, unit, torch.ones(3)),
        lambda unit: torch.zeros(4).__setitem__(unit, 1.0),
        lambda unit: torch.bincount(unit),
        lambda unit: functional.one_hot(unit),
        lambda unit: functional.embedding(unit, torch.ones(4, 2)),
        lambda unit: torch.repeat_interleave(torch.ones(3), unit),
    ],
)
def test_what_is_looked_up_by_is_integers(tmp_path, look_up):
    assert indices(tmp_path, lambda unit, other, x: look_up(unit)) == {"unit"}


def test_a_column_that_elements_are_looked_up_in_stays_as_it_is(tmp_path):
    def function(unit, other, x):
        assert other[unit].dtype == torch.float64
        assert (x * other + other.max()).dtype == torch.float64

    assert indices(tmp_path, function) == {"unit"}


def test_both_columns_of_a_pair(tmp_path):
    assert indices(tmp_path, lambda unit, other, x: torch.zeros(3, 2)[unit, other]) == {"unit", "other"}


def test_a_column_that_is_used_in_both_ways(tmp_path):
    def function(unit, other, x):
        assert (unit / 2).dtype == torch.float64
        return FOUR[unit]

    assert indices(tmp_path, function) == {"unit"}


def test_what_takes_integers_in_another_way_is_told(tmp_path):
    with pytest.raises(Stop, match="If it takes integers, name the column: --index COLUMN, one of unit, other"):
        indices(tmp_path, lambda unit, other, x: unit & other)
