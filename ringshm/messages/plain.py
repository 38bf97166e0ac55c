"""`codec="plain"`: data without code. Decoding runs no code and imports nothing, whatever the bytes are.

The stream is a tag for each object, then what that object needs: lengths, bytes, items. Large `bytes` objects and all
arrays are buffers behind the stream. An object of a NamedTuple class travels with the name of its class, which the
receiver looks up among what it has imported already.

Two limits keep the time and the stack that bytes from anywhere can take: how deep objects nest, and how many keys of
one dict or set have the same hash.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from .bare import ENCODERS, FORTRAN, array_over, contiguous, decode_bare
from .codecs import CONTAINER_OOB, CUSTOM, Encoded
from .containers import LARGE_NBYTES, ContainerCodec, Places, owned_buffers, pack_container, unpack_container
from .dtypes import describe_dtype, find_class, parse_dtype

_T_NONE, _T_FALSE, _T_TRUE, _T_INT, _T_BIG_INT, _T_FLOAT, _T_STR, _T_BYTES, _T_BYTES_OOB = range(9)
_T_TUPLE, _T_NAMED_TUPLE, _T_LIST, _T_DICT, _T_SET, _T_ARRAY, _T_SCALAR, _T_DTYPE = range(9, 17)

_MAX_DEPTH = 100
#: How many keys of one dict or set may have the same hash. Numbers with equal hashes are easily made, and Python
#: compares each of them with all others: a megabyte of them would take minutes.
_MAX_ALIKE = 100
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")


class _PlainWriter:
    """Writes one message into a "plain" container."""

    def __init__(self) -> None:
        self.stream = bytearray()
        self.buffers: list[tuple[Any, int, bool]] = []

    def _tagged(self, tag: int, raw: bytes) -> None:
        self.stream.append(tag)
        self.stream += _U32.pack(len(raw))
        self.stream += raw

    def write(self, obj: Any, path: str, depth: int) -> None:
        """Append an object. Errors name its path in the message; the depth is how deep it nests."""
        if depth > _MAX_DEPTH:
            raise ValueError(
                f"codec 'plain' cannot send what nests deeper than {_MAX_DEPTH} or holds itself: {path[:80]}…; "
                'send its parts, or use codec="pickle"'
            )
        kind: Any = type(obj)
        stream = self.stream
        if obj is None:
            stream.append(_T_NONE)
        elif kind is bool:
            stream.append(_T_TRUE if obj else _T_FALSE)
        elif kind is int:
            self._write_int(obj)
        elif kind is float:
            stream.append(_T_FLOAT)
            stream += _F64.pack(obj)
        elif kind is str:
            self._tagged(_T_STR, obj.encode("utf-8", "surrogatepass"))
        elif kind is bytes:
            if len(obj) < LARGE_NBYTES:
                self._tagged(_T_BYTES, obj)
            else:
                stream.append(_T_BYTES_OOB)
                self.buffers.append((obj, len(obj), True))
        elif kind in (tuple, list, set):
            stream.append({tuple: _T_TUPLE, list: _T_LIST, set: _T_SET}[kind])
            self._write_items(obj, path, depth)
        elif kind is dict:
            stream.append(_T_DICT)
            stream += _U32.pack(len(obj))
            for key, value in obj.items():
                self.write(key, f"{path} key", depth + 1)
                self.write(value, f"{path}[{key!r:.40}]", depth + 1)
        elif kind is np.ndarray:
            self._write_array(obj, path)
        elif isinstance(obj, np.generic):
            self._tagged(_T_SCALAR, self._dtype_text(obj.dtype, path))
            raw = obj.tobytes()[: obj.dtype.itemsize]  # more for an empty str_
            stream += _U32.pack(len(raw))
            stream += raw
        elif isinstance(obj, np.dtype):
            self._tagged(_T_DTYPE, self._dtype_text(obj, path))
        elif isinstance(obj, tuple) and _is_named_tuple(kind):
            name = f"{kind.__module__}:{kind.__qualname__}"
            if find_class(name) is not kind:
                raise TypeError(
                    f"codec 'plain' cannot send the NamedTuple {name} at {path}: no module has its class under that "
                    "name; define it at the top of a module"
                )
            self._tagged(_T_NAMED_TUPLE, name.encode())
            self._write_items(obj, path, depth)
        else:
            raise TypeError(
                f"codec 'plain' cannot send a {kind.__module__}.{kind.__qualname__} at {path}: it takes bytes, int, "
                "float, bool, str, None, arrays, NumPy scalars and dtypes in tuples, lists, dicts and sets; "
                'use codec="pickle"'
            )

    def _write_items(self, items: Any, path: str, depth: int) -> None:
        self.stream += _U32.pack(len(items))
        for index, item in enumerate(items):
            self.write(item, f"{path}[{index}]", depth + 1)

    def _write_int(self, number: int) -> None:
        if -(1 << 63) <= number < 1 << 63:
            self.stream.append(_T_INT)
            self.stream += _I64.pack(number)
        else:
            self._tagged(_T_BIG_INT, number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True))

    def _write_array(self, array: NDArray[Any], path: str) -> None:
        source, flags = contiguous(array)
        self.stream.append(_T_ARRAY)
        self.stream += struct.pack(f"<BB{array.ndim}Q", flags, array.ndim, *array.shape)
        text = self._dtype_text(array.dtype, path)
        self.stream += _U32.pack(len(text))
        self.stream += text
        self.buffers.append((source, array.nbytes, not array.flags.writeable))

    def _dtype_text(self, dtype: np.dtype[Any], path: str) -> bytes:
        text = describe_dtype(dtype)
        if text is None:
            raise TypeError(
                f"codec 'plain' cannot send dtype {dtype!r} at {path}: it holds objects, has metadata or has no text "
                'that makes it again; use codec="pickle"'
            )
        return text.encode()


class _PlainReader:
    """Reads one "plain" container. Bad bytes raise ValueError, or TypeError for keys without a hash."""

    def __init__(self, stream: bytes, buffers: list[Any]) -> None:
        self._stream = stream
        self._at = 0
        self._buffers = iter(buffers)

    def _take(self, nbytes: int) -> bytes:
        start = self._at
        end = start + nbytes
        if end > len(self._stream):
            raise ValueError(f"stream of {len(self._stream)} bytes ends within an object of {nbytes}")
        self._at = end
        return self._stream[start:end]

    def _count(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def _raw(self) -> bytes:
        return self._take(self._count())

    def _buffer(self) -> Any:
        try:
            return next(self._buffers)
        except StopIteration:
            raise ValueError("stream refers to more buffers than there are") from None

    def finish(self) -> None:
        """Check that all of the stream and all buffers were used."""
        if self._at != len(self._stream) or next(self._buffers, None) is not None:
            raise ValueError("stream or buffers are left over")

    def read(self, depth: int = 0) -> Any:
        """The next object."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"stream nests deeper than {_MAX_DEPTH}")
        tag = self._take(1)[0]
        if tag == _T_NONE:
            return None
        if tag in (_T_FALSE, _T_TRUE):
            return tag == _T_TRUE
        if tag == _T_INT:
            return _I64.unpack(self._take(8))[0]
        if tag == _T_BIG_INT:
            return int.from_bytes(self._raw(), "little", signed=True)
        if tag == _T_FLOAT:
            return _F64.unpack(self._take(8))[0]
        if tag == _T_STR:
            return self._raw().decode("utf-8", "surrogatepass")
        if tag == _T_BYTES:
            return self._raw()
        if tag == _T_BYTES_OOB:
            return bytes(self._buffer())
        if tag == _T_TUPLE:
            return tuple(self._items(depth))
        if tag == _T_LIST:
            return self._items(depth)
        if tag == _T_SET:
            return set(_hashable(self._items(depth)))
        if tag == _T_NAMED_TUPLE:
            return _make_named_tuple(self._raw().decode(), self._items(depth))
        if tag == _T_DICT:
            pairs = [(self.read(depth + 1), self.read(depth + 1)) for _ in range(self._count())]
            _hashable([key for key, _ in pairs])
            return dict(pairs)
        if tag == _T_ARRAY:
            return self._array()
        if tag == _T_SCALAR:
            dtype = parse_dtype(self._raw().decode())
            raw = self._raw()
            if len(raw) != dtype.itemsize:
                raise ValueError(f"scalar of dtype {dtype} has {len(raw)} bytes")
            return np.ndarray((), dtype, raw).copy()[()] if raw else np.zeros((), dtype)[()]
        if tag == _T_DTYPE:
            return parse_dtype(self._raw().decode())
        raise ValueError(f"stream holds an unknown tag {tag}")

    def _items(self, depth: int) -> list[Any]:
        return [self.read(depth + 1) for _ in range(self._count())]

    def _array(self) -> NDArray[Any]:
        flags, ndim = self._take(2)
        shape = struct.unpack(f"<{ndim}Q", self._take(8 * ndim))
        dtype = parse_dtype(self._raw().decode())
        buffer = self._buffer()
        if math.prod(shape) * dtype.itemsize != len(buffer):
            raise ValueError(f"array of shape {shape} and dtype {dtype} has {len(buffer)} bytes")
        return array_over(buffer, dtype, shape, "F" if flags & FORTRAN else "C")


def _hashable(keys: list[Any]) -> list[Any]:
    """The keys, if at most _MAX_ALIKE of them have the same hash."""
    if len(keys) > _MAX_ALIKE and max(Counter(map(hash, keys)).values()) > _MAX_ALIKE:
        raise ValueError(f"more than {_MAX_ALIKE} keys of a dict or set have the same hash")
    return keys


def _is_named_tuple(kind: type) -> bool:
    """Whether `namedtuple` or `NamedTuple` made this class, a generic one included; not a class derived from such."""
    if type(kind) is not type or kind.__bases__ not in ((tuple,), (tuple, Generic)):
        return False
    fields = vars(kind).get("_fields")
    return isinstance(fields, tuple) and all(isinstance(name, str) for name in fields)


def _make_named_tuple(name: str, items: list[Any]) -> Any:
    """An instance of a NamedTuple class that this process has imported already. Nothing is imported or called."""
    found = find_class(name)
    if found is None:
        raise ValueError(f"NamedTuple class {name} is not known here: import its module in the receiver first")
    if not issubclass(type(found), type) or not _is_named_tuple(found):
        raise ValueError(f"{name} is no NamedTuple class in this process")
    if len(items) != len(found._fields):
        raise ValueError(f"NamedTuple class {name} has other fields here than in the sender")
    return tuple.__new__(found, items)


class PlainCodec(ContainerCodec):
    """`bytes int float bool str None`, arrays, NumPy scalars and dtypes, in tuples, NamedTuples, lists, dicts, sets."""

    def encode(self, obj: Any) -> Encoded:
        """The object as meta, payload and description.

        Raises:
            TypeError, ValueError: if it holds an object that cannot be sent; names the place of that.
        """
        bare = ENCODERS.get(type(obj))
        encoded = bare(obj) if bare is not None else None
        if encoded is not None:
            return encoded
        writer = _PlainWriter()
        try:
            writer.write(obj, "message", 0)
        except (TypeError, ValueError) as error:
            if type(error) not in (TypeError, ValueError):
                raise
            raise type(error)(f"channel {self._name!r}: {error}") from None
        return pack_container([writer.stream], writer.buffers)

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The object, which owns all its memory."""
        kind, nbytes = meta & 0xFF, meta >> 16
        if kind > CUSTOM:
            return decode_bare(memory, offset, meta, description, self._pool)
        with memoryview(memory) as view:
            return self._read(view[offset : offset + nbytes], kind, partial(owned_buffers, pool=self._pool))

    def _read(self, view: memoryview, kind: int, buffers_of: Callable[[memoryview, Places], list[Any]]) -> Any:
        if kind == CUSTOM:
            raise ValueError("payload was not made by codec 'plain'")
        start, end = 0, view.nbytes
        buffers: Places = []
        if kind == CONTAINER_OOB:
            (start, end), buffers = unpack_container(view, 0, view.nbytes)
        reader = _PlainReader(bytes(view[start:end]), buffers_of(view, buffers))
        value = reader.read()
        reader.finish()
        return value
