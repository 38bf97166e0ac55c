"""Objects without a container: None, numbers, text, bytes, an array, and the arrays that a loan made.

The payload of each kind:

NONE, FALSE, TRUE     no payload
INT, FLOAT            8 bytes; a larger int goes into a container
STR                   UTF-8; a text with lone surrogates goes into a container
BYTES, BYTEARRAY      the bytes
ARRAY                 the array's bytes, in C or Fortran order; its description: flags, number of dimensions
                      (1 + 1 bytes), the length of each (8 bytes), and the dtype's text
ARRAYS                arrays, then a table: for each its offset, the length of its description (8 + 1 bytes), and
                      that description; the payload's own description says where the table starts (8 bytes), and
                      how many arrays there are (4)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..segment.layout import DESCRIPTION_NBYTES
from .buffers import Parts
from .codecs import ARRAY, ARRAYS, BYTEARRAY, BYTES, FALSE, FLOAT, INT, NONE, STR, TRUE, Encoded
from .dtypes import describe_dtype, parse_dtype
from .pool import Pool, owned_copy

_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_TABLE_AT = struct.Struct("<QI")
_TABLE_ENTRY = struct.Struct("<QB")

# --- an array


@dataclass(slots=True)
class _ArrayForm:
    """What a description says of a bare array's bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Any
    readonly: bool
    nbytes: int


FORTRAN, READONLY = 1, 2
_CACHE_SIZE = 1024
_descriptions: dict[tuple[np.dtype[Any], tuple[int, ...], int], bytes] = {}
#: The same of structured dtypes, which may be equal and differ (`np.record`): by their ids, with themselves.
_structured: dict[tuple[int, tuple[int, ...], int], tuple[np.dtype[Any], bytes]] = {}
_forms: dict[bytes, _ArrayForm] = {}


def contiguous(array: NDArray[Any]) -> tuple[Any, int]:
    """An array's bytes as a part of a message, and the flag FORTRAN or 0 for their order.

    The part is the array or its transpose if that is C-contiguous. Else it is the array itself, which Parts copies by
    its strides.
    """
    flags = array.flags
    if flags.c_contiguous:
        return array, 0
    if flags.f_contiguous:
        return array.T, FORTRAN
    return array, 0


def array_over(buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    """An array whose memory is the buffer. Pickles of arrays name this function."""
    return np.ndarray(shape, dtype, buffer, 0, None, order)


def _describe(dtype: np.dtype[Any], shape: tuple[int, ...], flags: int) -> bytes | None:
    """The description of an array that `_descriptions` does not know; None if it has none."""
    known = _structured.get((id(dtype), shape, flags))
    if known is not None:
        return known[1]
    text = describe_dtype(dtype)
    if text is None:
        return None
    description = struct.pack(f"<BB{len(shape)}Q", flags, len(shape), *shape) + text.encode()
    if len(description) > DESCRIPTION_NBYTES:
        return None
    if len(_descriptions) + len(_structured) >= _CACHE_SIZE:
        _descriptions.clear()
        _structured.clear()
    if dtype.kind == "V":
        _structured[id(dtype), shape, flags] = dtype, description
    else:
        _descriptions[dtype, shape, flags] = description
    return description


def _parse_description(description: bytes) -> _ArrayForm:
    if len(description) > DESCRIPTION_NBYTES:
        raise ValueError(f"description of {len(description)} bytes is longer than {DESCRIPTION_NBYTES}")
    flags, ndim = description[:2]
    end = 2 + 8 * ndim
    shape = struct.unpack(f"<{ndim}Q", description[2:end])
    dtype = parse_dtype(description[end:].decode())
    nbytes = math.prod(shape) * dtype.itemsize
    form = _ArrayForm(shape, dtype, "F" if flags & FORTRAN else "C", bool(flags & READONLY), nbytes)
    if len(_forms) >= _CACHE_SIZE:
        _forms.clear()
    _forms[description] = form
    return form


def form_of(description: bytes, nbytes: int) -> _ArrayForm:
    """The form of an array of so many bytes; ValueError if the description is of another, or of none."""
    form = _forms.get(description) or _parse_description(description)
    if form.nbytes != nbytes:
        raise ValueError(f"array of {nbytes} bytes is described as one of {form.nbytes}")
    return form


def _encode_array(array: NDArray[Any]) -> Encoded | None:
    """The array's bytes as the payload, without a head: an array of exactly the slot's size fits."""
    source, flags = contiguous(array)
    if not array.flags.writeable:
        flags |= READONLY
    dtype, shape = array.dtype, array.shape
    description = _descriptions.get((dtype, shape, flags)) or _describe(dtype, shape, flags)
    if description is None or dtype.metadata:  # dtypes that differ in their metadata only are equal
        return None
    nbytes = array.nbytes
    meta = nbytes << 16 | len(description) << 8 | ARRAY
    if nbytes and not source.flags.c_contiguous:
        parts = Parts()
        parts.add(source, nbytes)
        return meta, parts, description
    return meta, source, description


def decode_array(memory: Any, offset: int, meta: int, description: int, pool: Pool | None) -> NDArray[Any]:
    """The array of an ARRAY, in memory of its own."""
    form = form_of(memory[description : description + (meta >> 8 & 0xFF)], meta >> 16)
    if form.nbytes:
        array = owned_copy(np.ndarray(form.shape, form.dtype, memory, offset, None, form.order), pool, form.order)
    else:  # to copy countless items of no size takes for ever, and `empty` gives those of "S0" one byte each
        array = array_over(bytearray(), form.dtype, form.shape, form.order)
    if form.readonly:
        array.flags.writeable = False
    return array


def _view_array(payload: NDArray[np.uint8], description: bytes) -> NDArray[Any]:
    form = form_of(description, payload.nbytes)
    if not form.nbytes:
        return np.empty(form.shape, form.dtype, form.order)
    return np.ndarray(form.shape, form.dtype, payload.data, 0, None, form.order)


# --- the arrays of a loan


def describe_loaned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The description of a C-contiguous array; TypeError if its dtype or shape has none."""
    description = _descriptions.get((dtype, shape, 0)) or _describe(dtype, shape, 0)
    if description is None or dtype.metadata:
        raise TypeError(f"an array of shape {shape} and dtype {dtype!r} cannot be loaned: send it by put")
    return description


def encode_loaned(arrays: list[tuple[int, int, bytes]]) -> tuple[int, bytes, bytes]:
    """Meta and description of a message of arrays that lie in a slot, and the table that goes right behind them.

    It takes (offset, nbytes, description) of each array. One array alone at the start needs no table.
    """
    ((offset, nbytes, description), *more) = arrays
    if not more and not offset:
        return nbytes << 16 | len(description) << 8 | ARRAY, description, b""
    end = max(offset + nbytes for offset, nbytes, _ in arrays)
    table = b"".join(_TABLE_ENTRY.pack(offset, len(text)) + text for offset, _, text in arrays)
    return (end + len(table)) << 16 | _TABLE_AT.size << 8 | ARRAYS, _TABLE_AT.pack(end, len(arrays)), table


def _view_arrays(payload: NDArray[np.uint8], description: bytes) -> tuple[NDArray[Any], ...]:
    at, count = _TABLE_AT.unpack(description)
    if at + count * _TABLE_ENTRY.size > payload.nbytes:
        raise ValueError(f"payload of {payload.nbytes} bytes claims a table of {count} arrays at {at}")
    table, arrays = payload[at:].tobytes(), []
    for _ in range(count):
        offset, length = _TABLE_ENTRY.unpack_from(table)
        text = table[_TABLE_ENTRY.size : _TABLE_ENTRY.size + length]
        table = table[_TABLE_ENTRY.size + length :]
        form = _forms.get(text) or _parse_description(text)
        if offset + form.nbytes > at:
            raise ValueError(f"array of {form.nbytes} bytes at {offset} reaches into the table at {at}")
        arrays.append(_view_array(payload[offset : offset + form.nbytes], text))
    return tuple(arrays)


# --- all of them


def _encode_int(number: int) -> Encoded | None:
    try:
        return 8 << 16 | INT, _I64.pack(number), b""
    except struct.error:
        return None  # more than 64 bits


def _encode_str(text: str) -> Encoded | None:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return None  # lone surrogates
    return len(raw) << 16 | STR, raw, b""


#: Encoders by the object's type (a proxy tells the class of another object). One gives None for an object that needs a
#: container.
ENCODERS: dict[type, Callable[[Any], Encoded | None]] = {
    type(None): lambda _: (NONE, b"", b""),
    bool: lambda value: (TRUE if value else FALSE, b"", b""),
    int: _encode_int,
    float: lambda value: (8 << 16 | FLOAT, _F64.pack(value), b""),
    str: _encode_str,
    bytes: lambda value: (len(value) << 16 | BYTES, value, b""),
    bytearray: lambda value: (len(value) << 16 | BYTEARRAY, value, b""),
    np.ndarray: _encode_array,
}


def decode_bare(memory: Any, offset: int, meta: int, description: int, pool: Pool | None = None) -> Any:
    """The object, which owns its memory; ValueError if its kind is none of these."""
    kind, end = meta & 0xFF, offset + (meta >> 16)
    if kind == ARRAY:
        return decode_array(memory, offset, meta, description, pool)
    if kind == BYTES:
        return memory[offset:end]
    if kind == STR:
        return memory[offset:end].decode()
    if kind == INT:
        return _I64.unpack(memory[offset:end])[0]
    if kind == FLOAT:
        return _F64.unpack(memory[offset:end])[0]
    if kind == NONE:
        return None
    if kind in (TRUE, FALSE):
        return kind == TRUE
    if kind == BYTEARRAY:
        return bytearray(memoryview(memory)[offset:end])
    if kind == ARRAYS:
        raw = memory[description : description + (meta >> 8 & 0xFF)]
        arrays = _view_arrays(np.frombuffer(memory, np.uint8, end - offset, offset), raw)
        return tuple(owned_copy(array, pool) for array in arrays)
    raise ValueError(f"payload of unknown kind {kind}")


def view_bare(payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
    """The object; arrays and bytes are views of the payload."""
    kind = meta & 0xFF
    if kind == ARRAY:
        return _view_array(payload, description)
    if kind in (BYTES, BYTEARRAY):
        return payload.data
    if kind == ARRAYS:
        return _view_arrays(payload, description)
    return decode_bare(payload.tobytes(), 0, meta, 0)


def adopt_bare(payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
    """The object; an array is a view of the payload, which is the caller's own, and writable as the sent one was."""
    if meta & 0xFF == ARRAY:
        array = _view_array(payload, description)
        array.flags.writeable = not form_of(description, payload.nbytes).readonly
        return array
    return decode_bare(payload.tobytes(), 0, meta, 0)
