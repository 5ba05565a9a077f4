"""The format of saved fits: a zip of JSON text and numeric arrays, in which nothing is ever executed.

Values are plain: None, booleans, numbers, text, lists, tuples, frozen sets, dictionaries, arrays, tensors, members of
enumerations by their names, and records (named tuples and dataclasses) of classes that the reader knows, by the names
of their fields. Whoever wants to read a file without this package needs a zip, a JSON and a NumPy reader.
"""

# Not a file of torch.save, read with weights_only: that is still an unpickler, what it holds to be safe changes from
# version to version, and each of many small arrays takes a record of its own. Here all of a dtype are one.

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.lib import format as npy
from torch import Tensor

from laplace_amort.errors import ResumeError

__all__ = ["Described", "Known", "described", "read", "write"]

_FORMAT, _VERSION = "laplace_amort fit", 3
_TEXT = "fit.json"
# What the readers of zips, text and arrays, and classes given other fields, raise of a file that is none of these.
_DAMAGE = zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError
_AGAIN = "    result = fit(model, *args)\n    result.save(path)"


@dataclasses.dataclass(frozen=True)
class Described:
    """In the place of what no file holds, such as an object of a user's own class: what it looked like.

    :param str text: its ``repr``.
    """

    text: str

    def __repr__(self) -> str:
        return self.text


class Known:
    """Classes whose objects a file may hold.

    :param records: named tuples, dataclasses, and enumerations.
    :param others: by class, what makes a dictionary of an object, and the reverse.
    """

    def __init__(self, records: Iterable[type], others: Mapping[type, tuple[Any, Any]] | None = None) -> None:
        self._classes = {one.__name__: one for one in (Described, *records, *(others or {}))}
        self._others = dict(others or {})

    def named(self, name: str) -> Any:
        """Return the class of a name.

        :raises ValueError: if there is none.
        """
        if name not in self._classes:
            raise ValueError(f"it holds a {name}, which this version does not know: was it written by a later one?")
        return self._classes[name]

    def check(self, kind: type) -> None:
        """Refuse a class that a reader would not know.

        :raises TypeError: naming it.
        """
        if self._classes.get(kind.__name__) is not kind:
            raise TypeError(f"a file of a fit holds no {kind.__module__}.{kind.__qualname__}")

    def fields(self, value: Any) -> dict[str, Any]:
        """Take an object apart.

        :raises TypeError: if its class is not known.
        """
        kind = type(value)
        self.check(kind)
        if kind in self._others:
            found: dict[str, Any] = self._others[kind][0](value)
            return found
        if dataclasses.is_dataclass(kind):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
        return dict(value._asdict())

    def built(self, name: str, fields: dict[str, Any]) -> Any:
        """Put an object together."""
        kind = self.named(name)
        return self._others[kind][1](fields) if kind in self._others else kind(**fields)


def described(value: Any, known: Known) -> Any:
    """Return a value if a file can hold it, and else what it looks like."""
    try:
        _Writer(known).plain(value)
    except TypeError:
        return Described(repr(value))
    return value


class _Writer:
    """Makes JSON of values, and keeps their numbers, those of a dtype one after the other."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.parts: dict[str, list[Any]] = {}
        self.sizes: dict[str, int] = {}

    def plain(self, value: Any) -> Any:
        """Return what JSON can say of a value."""
        if isinstance(value, Enum):  # before numbers, which some of them are
            self.known.check(type(value))
            return {"$enum": [type(value).__name__, value.name]}
        if isinstance(value, numpy.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._kept(value.detach().cpu().numpy())}
        if isinstance(value, numpy.ndarray):
            return {"$array": self._kept(value)}
        if isinstance(value, list):
            return [self.plain(one) for one in value]
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, frozenset):
            return {"$set": [self.plain(one) for one in sorted(value)]}
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return {"$tuple": [self.plain(one) for one in value]}
        fields = self.known.fields(value)
        return {"$record": type(value).__name__, "fields": {name: self.plain(one) for name, one in fields.items()}}

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self.plain(one) for key, one in value.items()}
        return {"$items": [[self.plain(key), self.plain(one)] for key, one in value.items()]}

    def _kept(self, array: Any) -> list[Any]:
        if array.dtype.kind not in "fiub":
            raise TypeError(f"a file of a fit holds no arrays of {array.dtype}")
        name, before = array.dtype.name, self.sizes.get(array.dtype.name, 0)
        self.parts.setdefault(name, []).append(array.ravel())
        self.sizes[name] = before + array.size
        return [name, before, list(array.shape)]


class _Reader:
    """Makes values of JSON and arrays by dtype."""

    def __init__(self, known: Known, arrays: Mapping[str, Any]) -> None:
        self.known, self.arrays = known, arrays
        self.tags: dict[str, Callable[[Any], Any]] = {
            "$float": float,
            "$enum": lambda at: self.known.named(at[0])[at[1]],
            "$tensor": lambda at: torch.from_numpy(self._array(*at)),
            "$array": lambda at: self._array(*at),
            "$tuple": lambda at: tuple(map(self.value, at)),
            "$set": lambda at: frozenset(map(self.value, at)),
            "$items": lambda at: {self.value(key): self.value(one) for key, one in at},
        }

    def value(self, plain: Any) -> Any:
        """Return what a piece of JSON stands for."""
        if isinstance(plain, list):
            return [self.value(one) for one in plain]
        if not isinstance(plain, dict):
            return plain
        if "$record" in plain:
            return self.known.built(plain["$record"], {name: self.value(one) for name, one in plain["fields"].items()})
        tag = next(iter(plain), "")
        return self.tags[tag](plain[tag]) if tag.startswith("$") else {key: self.value(plain[key]) for key in plain}

    def _array(self, dtype: str, begin: int, shape: list[int]) -> Any:
        size = math.prod(shape)
        found = self.arrays[dtype][begin : begin + size]
        if begin < 0 or len(found) != size:
            raise ValueError("numbers are missing")
        return found.reshape(shape).copy()


def write(path: str | Path, content: Mapping[str, Any], known: Known) -> None:
    """Write a file, all of it or, where that fails, none: what was there before stays.

    :param path: of the file.
    :param content: values by name.
    :param known: classes of the objects in it.
    :raises TypeError: if something in it is none that a file can hold.
    :raises OSError: if there is no such directory, no room, or no permission.
    """
    writer = _Writer(known)
    text = {"format": _FORMAT, "version": _VERSION, "content": writer.plain(content)}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr(_TEXT, json.dumps(text, allow_nan=False))
        for name, parts in writer.parts.items():
            with members.open(f"{name}.npy", "w") as member:
                npy.write_array(member, numpy.concatenate(parts), allow_pickle=False)
    _replace(Path(os.path.realpath(path)), packed.getvalue())


def _replace(path: Path, data: bytes) -> None:
    """Write beside a file, then put it in the place of that."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no file, and a fit would take its place")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | Path, known: Known) -> dict[str, Any]:
    """Return the content of a file that :func:`write` has written. Nothing in it is executed.

    :param path: of the file.
    :param known: classes of the objects in it.
    :raises OSError: if there is none, or it cannot be read.
    :raises ResumeError: if it is another file, is damaged, or of another version.
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        with zipfile.ZipFile(data) as members:
            _refuse_others(path, members)
            text = json.loads(members.read(_TEXT))
            if text["format"] != _FORMAT:
                raise ValueError(f"its format is {text['format']!r}")
            if text["version"] != _VERSION:
                raise ResumeError(
                    f"{path} is of version {text['version']} of the format of fits, and this package reads version "
                    f"{_VERSION}. Read it with the package that wrote it, or fit again:\n{_AGAIN}"
                )
            arrays = {name.removesuffix(".npy"): _array(members, name) for name in members.namelist() if name != _TEXT}
            content = _Reader(known, arrays).value(text["content"])
            return dict(content)
    except ResumeError:
        raise
    except _DAMAGE as error:
        raise ResumeError(
            f"{path} was not written by FitResult.save, or it is damaged ({type(error).__name__}: {error}). Fit "
            f"again:\n{_AGAIN}"
        ) from error


def _array(members: zipfile.ZipFile, name: str) -> Any:
    with members.open(name) as member:
        return npy.read_array(member, allow_pickle=False)


def _refuse_others(path: str | Path, members: zipfile.ZipFile) -> None:
    """Refuse files of torch.save by what they are, without reading the objects in them."""
    pickled = [name for name in members.namelist() if name.endswith("data.pkl")]
    if _TEXT in members.namelist() or not pickled:
        return
    older = re.search(rb"laplace_amort fit \d+", members.read(pickled[0]))
    if older:
        raise ResumeError(
            f"{path} was written by FitResult.save of an earlier version ('{older[0].decode()}'), whose files held "
            f"code, and it is not read. Fit again:\n{_AGAIN}"
        )
    raise ResumeError(f"{path} was not written by FitResult.save, but by torch.save. Fit again:\n{_AGAIN}")
