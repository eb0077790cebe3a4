"""Reads the .bin files of torch.save without unpickling them.

A pickle is a program. This module interprets only the few opcodes that a dict of plain tensors needs. It builds
strings, numbers, tuples, lists, dicts and descriptions of tensors, and refuses everything else. The limits below bound
the work whatever the file says: a pickle of a few hundred bytes could otherwise run forever, or fill the memory.
Rejected: torch.load(weights_only=True). It hashes and prints the objects it has built, and trusts an archive's sizes.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import SourceError, one_line, short, shown
from ..files import open_input
from .dtypes import DTYPES

MOST_PICKLE = 16 << 20  # bytes of the pickle: enough for some 50,000 tensors
MOST_STEPS = 4_000_000  # opcodes of one pickle
MOST_DIMENSIONS = 16
_SLACK = 16 << 20  # bytes that a file's tensors may take beyond twice its size: tied tensors are written twice

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}
_TORCH = {dtype.torch: dtype.name for dtype in DTYPES.values() if dtype.torch}


_Step = Callable[["_Reader"], Any]


class _Refused(Exception):
    """The file is not a dict of plain tensors. The message says why."""


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to. It is never imported."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    """A block of `count` numbers that tensors are views of."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class BinTensor:
    """One tensor of a .bin file. start: byte offset of its storage in the file; offset, strides: in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    start: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * (DTYPES[self.dtype].bits // 8)

    def _plain(self) -> bool:
        """True if the values lie one after the other in the order of the shape."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True

    def read(self, path: Path) -> bytes:
        """The values in row-major order, as a safetensors file stores them."""
        if not self.nbytes:
            return b""
        width = DTYPES[self.dtype].bits // 8
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        with open_input(path) as file:
            file.seek(self.start + self.offset * width)
            raw = file.read((last + 1 - self.offset) * width)
        if len(raw) == self.nbytes and self._plain():
            return raw
        values = np.frombuffer(raw, f"V{width}")
        strides = [stride * width for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False).tobytes()


@dataclass(frozen=True)
class _Described:
    """A tensor as the pickle describes it, before its storage is located in the file."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_bin(path: Path) -> dict[str, BinTensor]:
    """The tensors of a .bin file, by name. Runs nothing of the file. Raises SourceError.

    Reads both formats of torch.save: zip archives, and the older format of torch before 1.6.
    """
    try:
        with open_input(path, SourceError) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            archived = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            table, places = _archive(file, size) if archived else _stream(file, size)
            return _placed(table, places, size)
    except SourceError:
        raise
    except (_Refused, zipfile.BadZipFile, struct.error, ValueError, IndexError, KeyError, TypeError) as error:
        raise SourceError(f"{path} cannot be read as plain weights ({short(error)}): nothing of it was run") from None
    except (NotImplementedError, RuntimeError, EOFError, OverflowError, AttributeError, OSError) as error:
        raise SourceError(f"{path} cannot be read as plain weights ({short(error)}): nothing of it was run") from None


# ------------------------------------------------------------------------------------------------------------- the file


def _archive(file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """(the object in data.pkl, {storage: (start, size) in the file}) of a zip archive."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    tables = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(tables) != 1:
        raise _Refused("an archive with exactly one data.pkl is expected")
    prefix = tables[0].filename.removesuffix("data.pkl")
    names = {entry.filename.removeprefix(prefix): entry for entry in entries if entry.filename.startswith(prefix)}
    if "constants.pkl" in names:
        raise _Refused("it is a TorchScript archive, which holds code")
    order = names.get("byteorder")
    if order and _raw(file, order, size, 16) != b"little":
        raise _Refused("its numbers are big-endian")
    table = _Reader(io.BytesIO(_raw(file, tables[0], size, MOST_PICKLE))).run()
    places = {
        name.removeprefix("data/"): (_start(file, entry, size), entry.file_size)
        for name, entry in names.items()
        if name.startswith("data/")
    }
    return table, places


def _start(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> int:
    """Where the bytes of an entry begin. Raises _Refused if they are compressed or truncated."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise _Refused(f"{shown(entry.filename)} is compressed, and torch.save never compresses")
    file.seek(entry.header_offset)
    head = file.read(30)
    if len(head) != 30 or head[:4] != b"PK\x03\x04":
        raise _Refused("its entries are damaged")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    if start + entry.file_size > size:
        raise _Refused("it is truncated")
    return start


def _raw(file: BinaryIO, entry: zipfile.ZipInfo, size: int, most: int) -> bytes:
    start = _start(file, entry, size)
    if entry.file_size > most:
        raise _Refused(f"{shown(entry.filename)} is larger than {most >> 20 or most} {'MB' if most >> 20 else 'bytes'}")
    file.seek(start)
    return file.read(entry.file_size)


def _stream(file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_archive`, for the format before torch 1.6: pickles, then the storages one after the other."""
    if _Reader(file).run() != 0x1950A86A20F9469CFC6C:
        raise _Refused("torch.save did not write it")
    if _Reader(file).run() != 1001:
        raise _Refused("its version of the torch.save format is unknown")
    info = _Reader(file).run()
    if isinstance(info, dict) and info.get("little_endian") is False:
        raise _Refused("its numbers are big-endian")
    reader = _Reader(file)
    table = reader.run()
    keys = _Reader(file).run()
    places = {}
    if not isinstance(keys, list) or len(keys) != len(set(keys)):
        raise _Refused("its list of storages is damaged")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        length = count * (DTYPES[reader.storages[key].dtype].bits // 8)
        start = file.tell()
        if count < 0 or start + length > size:
            raise _Refused("it is truncated")
        places[key] = (start, length)
        file.seek(start + length)
    return table, places


def _placed(table: Any, places: dict[str, tuple[int, int]], size: int) -> dict[str, BinTensor]:
    """The tensors with their positions in the file, all of them checked."""
    if not isinstance(table, dict) or not all(isinstance(value, _Described) for value in table.values()):
        raise _Refused("not a dict of tensors")
    result, total = {}, 0
    for name, tensor in table.items():
        start, length = places[tensor.storage.key]
        width = DTYPES[tensor.dtype].bits // 8
        count, last = 1, tensor.offset
        for n, stride in zip(tensor.shape, tensor.strides, strict=True):
            count = min(count * n, 8 * size + 1)
            last += (n - 1) * stride
        if count and (last + 1) * width > length:
            raise _Refused(f"{shown(name)} is larger than its storage")
        if count * width > size:
            raise _Refused(f"{shown(name)} has more values than the file")
        total += count * width
        if total > 2 * size + _SLACK:
            raise _Refused(f"its tensors take more than twice the file ({size} bytes): too many share a storage")
        result[name] = BinTensor(tensor.dtype, tensor.shape, tensor.strides, tensor.offset, start)
    return result


# ----------------------------------------------------------------------------------------------------------- the pickle


@dataclass
class _Reader:
    """Interprets one pickle of a dict of tensors. storages: those that it names, by key."""

    file: BinaryIO
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, _Storage] = field(default_factory=dict)

    def run(self) -> Any:
        """The object that the pickle describes. Raises _Refused, or a builtin exception if it is damaged."""
        start = self.file.tell()
        for _ in range(MOST_STEPS):
            code = self.file.read(1)
            if code == b".":
                return self.stack.pop()
            if self.file.tell() - start > MOST_PICKLE:
                raise _Refused(f"it is larger than {MOST_PICKLE >> 20} MB")
            step = _STEPS.get(code)
            if step is None:
                raise _Refused(f"its pickle has the opcode {code!r}, which a dict of tensors does not need")
            step(self)
        raise _Refused(f"its pickle has more than {MOST_STEPS} opcodes")

    def read(self, count: int) -> bytes:
        if count > MOST_PICKLE:
            raise _Refused("a string in its pickle is too long")
        data = self.file.read(count)
        if len(data) != count:
            raise _Refused("it is truncated")
        return data

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.read(struct.calcsize(form)))[0])

    def line(self) -> str:
        data = self.file.readline(200)
        if not data.endswith(b"\n"):
            raise _Refused("a name in its pickle is too long")
        return data[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        if at > len(self.stack):
            raise _Refused("its pickle is damaged")
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def put_all(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _Refused("it sets items of something that is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int)):  # hashing a nested tuple can take forever
                raise _Refused("a key of its dict is not a string")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _Refused("it appends to something that is not a list")
        self.stack[-1].extend(values)

    def storage(self) -> None:
        kind, storage, key, _, count, *_ = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Global) or storage.name not in _STORAGES:
            raise _Refused("it refers to something that is not a storage of plain numbers")
        if not isinstance(key, str) or not isinstance(count, int):
            raise _Refused("a storage is damaged")
        self.storages[key] = _Storage(key, _STORAGES[storage.name], count)
        self.push(self.storages[key])

    def call(self) -> None:
        """Imitate the few functions that rebuild tensors; none of them is called."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise _Refused("it calls something that is not a function")
        if function == _Global("collections", "OrderedDict") and not arguments:
            self.push({})
        elif function.module != "torch._utils" or function.name not in _REBUILDS:
            raise _Refused(f"it asks for {one_line(function.module[:60])}.{one_line(function.name[:60])}")
        elif function.name.startswith("_rebuild_parameter"):
            if not isinstance(arguments[0], _Described):
                raise _Refused("a parameter is not a tensor")
            self.push(arguments[0])
        else:
            self.push(_described(arguments, explicit_dtype=function.name == "_rebuild_tensor_v3"))

    def build(self) -> None:
        """Ignore the attributes of a dict, such as a module's versions: they hold no weights."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _Refused("it sets attributes of something that is not a dict")


_REBUILDS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)


def _described(arguments: tuple[Any, ...], explicit_dtype: bool) -> _Described:
    storage, offset, shape, strides, *rest = arguments
    dtype = storage.dtype
    if explicit_dtype:  # a dtype without a storage class: (requires_grad, hooks, dtype, metadata)
        named = rest.pop(2)
        dtype = _TORCH.get(named.name, "") if named.module == "torch" else ""
        if not dtype:
            raise _Refused(f"a tensor is of type {one_line(named.name[:60])}")
    if len(rest) > 2 and rest[2]:
        raise _Refused("a tensor has the conjugate or negative flag, which plain weights do not have")
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(shape) != len(strides):
        raise _Refused("the shape of a tensor is damaged")
    if len(shape) > MOST_DIMENSIONS:
        raise _Refused(f"a tensor has more than {MOST_DIMENSIONS} dimensions")
    return _Described(storage, dtype, offset, tuple(shape), tuple(strides))


def _tuple_of(count: int) -> _Step:
    def step(reader: _Reader) -> None:
        if len(reader.stack) < count:
            raise _Refused("its pickle is damaged")
        values = tuple(reader.stack[len(reader.stack) - count :])
        del reader.stack[len(reader.stack) - count :]
        reader.push(values)

    return step


def _constant(value: Any) -> _Step:
    return lambda reader: reader.push(value)


def _global(reader: _Reader) -> None:
    reader.push(_Global(reader.line(), reader.line()))


def _stack_global(reader: _Reader) -> None:
    name, module = reader.stack.pop(), reader.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise _Refused("its pickle is damaged")
    reader.push(_Global(module, name))


def _long(form: str) -> _Step:
    def step(reader: _Reader) -> None:
        size = reader.number(form)
        if not 0 <= size <= 64:
            raise _Refused("a number in its pickle is too long")
        reader.push(int.from_bytes(reader.read(size), "little", signed=True))

    return step


def _text(form: str) -> _Step:
    return lambda reader: reader.push(reader.read(reader.number(form)).decode("utf-8"))


def _number(form: str) -> _Step:
    return lambda reader: reader.push(reader.number(form))


def _put(form: str) -> _Step:
    def step(reader: _Reader) -> None:
        reader.memo[reader.number(form)] = reader.stack[-1]

    return step


def _get(form: str) -> _Step:
    return lambda reader: reader.push(reader.memo[reader.number(form)])


def _memoize(reader: _Reader) -> None:
    reader.memo[len(reader.memo)] = reader.stack[-1]


def _set_item(reader: _Reader) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    reader.put_all([key, value])


_STEPS: dict[bytes, _Step] = {
    b"\x80": lambda reader: reader.read(1),  # PROTO
    b"\x95": lambda reader: reader.read(8),  # FRAME
    b"}": lambda reader: reader.push({}),
    b"]": lambda reader: reader.push([]),
    b")": _constant(()),
    b"(": lambda reader: reader.marks.append(len(reader.stack)),
    b"t": lambda reader: reader.push(tuple(reader.since_mark())),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"K": _number("<B"),
    b"M": _number("<H"),
    b"J": _number("<i"),
    b"\x8a": _long("<B"),
    b"\x8b": _long("<i"),
    b"G": lambda reader: reader.push(struct.unpack(">d", reader.read(8))[0]),
    b"X": _text("<I"),
    b"\x8c": _text("<B"),
    b"\x8d": _text("<Q"),
    b"U": _text("<B"),  # written by Python 2
    b"T": _text("<I"),
    b"c": _global,
    b"\x93": _stack_global,
    b"q": _put("<B"),
    b"r": _put("<I"),
    b"\x94": _memoize,
    b"h": _get("<B"),
    b"j": _get("<I"),
    b"s": _set_item,
    b"u": lambda reader: reader.put_all(reader.since_mark()),
    b"a": lambda reader: reader.extend([reader.stack.pop()]),
    b"e": lambda reader: reader.extend(reader.since_mark()),
    b"Q": _Reader.storage,
    b"R": _Reader.call,
    b"b": _Reader.build,
}
