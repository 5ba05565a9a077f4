"""A CSV file as tensors: what is read, what is refused, and in which words."""

import io
import sys

import numpy
import pytest
import torch

from laplace_amort.cli.columns import read_table
from laplace_amort.cli.exits import UsageError


def table(tmp_path, text, name="data.csv", **options):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path, **options)


def test_columns_of_every_kind(tmp_path):
    found = table(tmp_path, 'site,x,n,word,yes\n"a, b",1.5,3,new york,TRUE\nc,-2e3,4,x,false\n\n')
    assert len(found) == 2
    site, x, n, word, yes = (found.column(name, False) for name in found.names)
    assert (site.labels, site.values.tolist()) == (("a, b", "c"), [0, 1])
    assert word.labels == ("new york", "x")
    assert not x.is_whole
    assert x.tensor(as_index=True).tolist() == [1.5, -2000.0]
    assert n.is_whole
    assert n.tensor(as_index=True).dtype == torch.int64
    assert n.tensor(as_index=False).dtype == torch.get_default_dtype()
    assert yes.values.tolist() == [1, 0]
    assert str(n) == "whole numbers from 3 to 4"
    assert str(x) == "numbers from -2000 to 1.5"
    assert str(word) == "codes of 2 labels, new york, x"


def test_numbers_as_categories_are_in_the_order_of_numbers(tmp_path):
    column = table(tmp_path, "id\n10\n9\n10\n100\n").column("id", categorical=True)
    assert column.labels == ("9", "10", "100")
    assert column.values.tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize(("cells", "gap"), [("0 1 2 1", None), ("1 2", 0), ("0 1 3 1", 2)])
def test_gap(tmp_path, cells, gap):
    assert table(tmp_path, "i\n" + cells.replace(" ", "\n")).column("i", False).gap() == gap


@pytest.mark.parametrize(
    ("text", "name", "separator"),
    [
        ("a;b\n1;2\n", "x.csv", "semicolon"),
        ("a\tb\n1\t2\n", "x.tsv", None),
        ("a|b\n1|2\n", "x.txt", "|"),
        ("a b\n1  2\n", "x.csv", "space"),
        ("\ufeffa,b\r\n1,2\r\n", "x.csv", None),
        ('a, b\n1, "2"\n', "x.csv", None),
    ],
)
def test_dialects(tmp_path, text, name, separator):
    found = table(tmp_path, text, name, separator=separator)
    assert found.names == ["a", "b"]
    assert [found.column(n, False).values.tolist() for n in "ab"] == [[1], [2]]


def test_standard_input(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n1\n"))
    found = read_table(type(tmp_path)("-"))
    assert (found.source, found.names, len(found)) == ("standard input", ["a"], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has nothing in it"),
        ("a,b\n", "has no rows below its first line"),
        ("1,2\n3,4\n", "the first line must have the names of the columns; it has 1, 2"),
        ("a,a\n3,4\n", "has two columns of the name 'a'"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, and the first line names 2 columns"),
        ("a;b\n1;2\n", "has one column, 'a;b'. Is it separated otherwise?\n    --separator semicolon"),
        (b"a\n\xe9\n", "is not text in UTF-8 (byte 2)"),
    ],
)
def test_what_is_no_table(tmp_path, text, message):
    with pytest.raises(UsageError) as caught:
        table(tmp_path, text)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match="Is a directory"):
        read_table(tmp_path)


@pytest.mark.parametrize("missing", ["", " ", "NA", "nan", "NaN", "N/A", ".", "-nan"])
def test_missing_values_are_named(tmp_path, missing):
    found = table(tmp_path, f"a,b,c\n1,x,\n2,{missing},\n3,z,\n")
    found.check_complete(["a"])
    with pytest.raises(UsageError) as caught:
        found.check_complete(["a", "b"])
    assert f"1 missing value: line 3, column 'b': '{missing.strip()}'" in str(caught.value)
    assert "--drop-missing" in str(caught.value)
    kept = found.without_missing(["a", "b"])
    assert kept.column("a", False).values.tolist() == [1, 3]
    with pytest.raises(UsageError, match="something is missing in every row"):
        found.without_missing(["c"])


def test_a_word_none_is_no_missing_value(tmp_path):
    found = table(tmp_path, "drug\nnone\naspirin\n")
    found.check_complete(["drug"])
    assert found.column("drug", False).labels == ("aspirin", "none")


def test_many_missing_values_are_counted(tmp_path):
    with pytest.raises(UsageError, match=r"9 missing values: .*; \.\.\.\."):
        table(tmp_path, "a,b\n" + "NA,1\n" * 9).check_complete(["a"])


def test_infinite_values_are_refused(tmp_path):
    with pytest.raises(UsageError, match="line 3, column 'a': -inf is not finite"):
        table(tmp_path, "a\n1\n-inf\n").column("a", False)


def test_numbers_beyond_64_bits_are_floating_point(tmp_path):
    column = table(tmp_path, "a\n1\n100000000000000000000\n").column("a", False)
    assert numpy.array_equal(column.values, [1.0, 1e20])
