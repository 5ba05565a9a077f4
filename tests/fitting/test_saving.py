"""The format of saved fits: what is written is read, nothing is executed, and what is none says so."""

import errno
import io
import json
import math
import os
import pickle
import random
import zipfile
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch

from laplace_amort import FitStatus, ResumeError
from laplace_amort.fitting.evaluation import Evaluation
from laplace_amort.fitting.history import Step
from laplace_amort.fitting.saving import Described, Known, described, read, write

KNOWN = Known((FitStatus, Evaluation, Step))
CONTENT = {
    "numbers": [None, True, False, 3, -1.5, 0.1, math.inf, -math.inf, 2**70, 1e-320],
    "words": {"a": 'ü \u2028 "', "": [], "nested": {"b": ({"c": ()},)}},
    "keys": {1: "one", ("a", 2): "pair", "$enum": "no tag", None: 0},
    "status": FitStatus.STUCK,
    "step": Step("ELBO", -1.0, math.inf, 16, 0.5, "why"),
    "evaluation": Evaluation(-3.0, numpy.array([1.0, -0.0]), numpy.eye(2)),
    "tensors": [
        torch.arange(6).reshape(2, 3),
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.ones(2, dtype=torch.float32),
    ],
    "bytes": torch.arange(5, dtype=torch.uint8),
    "set": frozenset({"b", "a"}),
    "flags": numpy.array([[True], [False]]),
    "scalar": numpy.float64(2.5),
}


def same(one, other):
    if isinstance(other, torch.Tensor | numpy.ndarray):
        assert type(one) is type(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert (torch.as_tensor(one) == torch.as_tensor(other)).all()
    elif isinstance(other, dict):
        assert list(one) == list(other)
        for key in other:
            same(one[key], other[key])
    elif isinstance(other, list | tuple):
        assert type(one) is type(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other
        assert type(one) is (float if isinstance(other, numpy.floating) else type(other))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.laf"


def test_what_is_written_is_read(path):
    write(path, CONTENT, KNOWN)
    found = read(path, KNOWN)
    same(found, CONTENT)
    write(path, found, KNOWN)  # in the place of the first
    same(read(str(path), KNOWN), CONTENT)
    assert list(path.parent.iterdir()) == [path]


def test_not_a_number_is_read(path):
    write(path, {"a": math.nan, "b": torch.tensor([math.nan])}, KNOWN)
    assert math.isnan(read(path, KNOWN)["a"])
    assert read(path, KNOWN)["b"].isnan().all()


def test_others_can_read_it(path):
    """A zip with JSON, strict in its numbers, and arrays."""
    write(path, CONTENT, KNOWN)
    with zipfile.ZipFile(path) as members:
        text = json.loads(members.read("fit.json"), parse_constant=pytest.fail)
    assert text["format"] == "laplace_amort fit"
    assert numpy.load(path, allow_pickle=False)["float64"].dtype == numpy.float64


class Color(Enum):
    RED = 1


class Pair(NamedTuple):
    a: int


@pytest.mark.parametrize("value", [object(), print, Color.RED, Pair(1), {1, 2}, b"", 1j, torch.ones(1) * 1j, KNOWN])
def test_what_no_file_holds(value, path):
    path.write_text("as it was")
    with pytest.raises(TypeError, match="a file of a fit holds no"):
        write(path, {"a": [value]}, KNOWN)
    assert path.read_text() == "as it was"
    assert described(value, KNOWN) == Described(repr(value))
    assert repr(described(value, KNOWN)) == repr(value)


def test_a_class_of_the_same_name_is_another():
    with pytest.raises(TypeError, match="holds no"):
        Known((FitStatus,)).check(type("FitStatus", (), {}))


def test_a_full_disk_leaves_what_was_there(path, monkeypatch):
    write(path, {"a": 1}, KNOWN)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(path, {"a": 2}, KNOWN)
        with pytest.raises(OSError, match="No space left"):
            write(path.with_name("new.laf"), {"a": 2}, KNOWN)
    assert read(path, KNOWN) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_modes_and_links_stay(path):
    write(path, {"a": 1}, KNOWN)
    path.chmod(0o640)
    link = path.with_name("link.laf")
    link.symlink_to(path)
    write(link, {"a": 2}, KNOWN)
    assert link.is_symlink()
    assert read(path, KNOWN) == {"a": 2}
    assert path.stat().st_mode & 0o777 == 0o640


def test_no_place_for_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "nowhere" / "fit.laf", {}, KNOWN)
    with pytest.raises(OSError, match="is no file"):
        write(tmp_path, {}, KNOWN)
    with pytest.raises(OSError, match="is no file"):
        write("/dev/null", {}, KNOWN)
    assert Path("/dev/null").is_char_device()
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.laf", KNOWN)


@pytest.mark.parametrize("text", [b"", b"not a fit", b"PK\x03\x04", b"{}", bytes(1000)])
def test_another_file(text, path):
    path.write_bytes(text)
    with pytest.raises(ResumeError, match=r"fit\.laf was not written by FitResult\.save, or it is damaged"):
        read(path, KNOWN)


def test_a_file_that_was_cut_off(path):
    write(path, CONTENT, KNOWN)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ResumeError, match="or it is damaged"):
            read(path, KNOWN)


def test_a_file_with_bits_that_are_others(path):
    """It is read as it was written, or not at all."""
    write(path, CONTENT, KNOWN)
    whole, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read(path, KNOWN)
        except ResumeError:
            refused += 1
        else:
            same(found, CONTENT)
    assert refused > 200


def rewritten(path, change):
    """The same file with another text in it."""
    with zipfile.ZipFile(path) as members:
        parts = {name: members.read(name) for name in members.namelist()}
    text = json.loads(parts["fit.json"])
    change(text)
    parts["fit.json"] = json.dumps(text).encode()
    with zipfile.ZipFile(path, "w") as members:
        for name, data in parts.items():
            members.writestr(name, data)


@pytest.mark.parametrize(
    "content",
    [
        {"a": {"$record": "Popen", "fields": {"args": "true"}}},
        {"a": {"$record": "Step", "fields": {"cmd": 1}}},
        {"a": {"$enum": ["Step", "__class__"]}},
        {"a": {"$enum": ["FitStatus", "NOWHERE"]}},
        {"a": {"$tensor": ["float64", 0, [10**6]]}},
        {"a": {"$tensor": ["float64", -1, [1]]}},
        {"a": {"$array": ["float128", 0, [1]]}},
        {"a": {"$what": 1}},
        [1, 2],
        None,
    ],
)
def test_text_that_was_written_by_somebody_else(content, path):
    write(path, CONTENT, KNOWN)
    rewritten(path, lambda text: text.update(content=content))
    with pytest.raises(ResumeError, match="or it is damaged"):
        read(path, KNOWN)


def test_a_later_version(path):
    write(path, CONTENT, KNOWN)
    rewritten(path, lambda text: text.update(version=99))
    with pytest.raises(ResumeError, match="of version 99 of the format of fits, and this package reads version 3"):
        read(path, KNOWN)


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_nothing_is_executed(path):
    trace = path.with_name("trace")
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # it would be
    trace.unlink()
    write(path, CONTENT, KNOWN)
    array = numpy.array([Evil(trace)], dtype=object)
    data = io.BytesIO()
    numpy.save(data, array, allow_pickle=True)
    with zipfile.ZipFile(path, "a") as members:
        members.writestr("object.npy", data.getvalue())
    with pytest.raises(ResumeError, match="damaged"):
        read(path, KNOWN)
    torch.save({"format": "laplace_amort fit 2", "saved": Evil(trace)}, path)
    with pytest.raises(
        ResumeError, match=r"of an earlier version \('laplace_amort fit 2'\)(.|\n)*fit\(model, \*args\)"
    ):
        read(path, KNOWN)
    torch.save({"format": "another", "saved": Evil(trace)}, path)
    with pytest.raises(ResumeError, match=r"but by torch\.save"):
        read(path, KNOWN)
    assert not trace.exists()
