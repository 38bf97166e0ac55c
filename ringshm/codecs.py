"""Codecs: objects to buffers and back. They know no slots.

An encoded message is `(meta, data, description)`: the length of the payload, the length of its description and its
kind in one word; the payload as a buffer or as Parts; and, for a bare array, what its bytes mean. Common kinds need no
pickle: None, bool, int, float, str, bytes, bytearray and arrays. Everything else is a container, made by the channel's
codec: an inline stream, which refers to out-of-band buffers behind it.

    CONTAINER        the inline stream, and nothing else
    CONTAINER_OOB    n, length of the stream (4 + 8 bytes); n times the length of a buffer << 1 | read-only (8 bytes);
                     the stream; the buffers, each aligned to 64 bytes

    TYPED            a message of the channel's spec: see specs.py
    ARRAYS           what a loan made: arrays where the table says, then the table: for each its offset, length of its
                     description (8 + 1 bytes), and that; the payload's description says where the table starts

An array's bytes are copied once into the slot and once out of it, whatever its strides, order and dtype; only dtypes
that hold objects go through pickle. So are those of PyTorch's CPU tensors and of JAX's arrays (tensors.py). A decoded
message owns its memory. Nothing read from a slot is trusted: each length is compared with what is there, and under
"plain" no stream can run code.
"""

from __future__ import annotations

import ast
import math
import pickle
import re
import struct
import sys
import types
from collections import Counter
from collections.abc import Callable
from copyreg import dispatch_table as _copyreg_table
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .annotations import Buffer, T
from .buffers import ALIGNMENT, Parts
from .layout import DESCRIPTION_NBYTES
from .pool import LEAST_NBYTES, Pool, owned_copy
from .tensors import bits_of, is_dense, is_jax_array, is_tensor, restore_tensor

Encoded: TypeAlias = tuple[int, Any, bytes]

(
    CONTAINER,
    CONTAINER_OOB,
    CUSTOM,
    NONE,
    FALSE,
    TRUE,
    INT,
    FLOAT,
    STR,
    BYTES,
    BYTEARRAY,
    ARRAY,
    ARRAYS,
    TYPED,
) = range(14)

_loads = pickle.loads
_forking_table: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_OOB_HEAD = struct.Struct("<IQ")
#: References to an object that one local variable and the call of `getrefcount` hold.
_UNSHARED = sys.getrefcount(object()) + 1
#: The longest text of a dtype. Python's parser takes some hundred times the text's size, and recurses in C.
_DTYPE_LENGTH = 64 * 1024
#: Up to this size a stream is copied out before it is decoded: cheaper than a memoryview and its release.
_COPY_NBYTES = 64 * 1024


@runtime_checkable
class Codec(Protocol[T]):
    """A codec of one's own for messages of type T: any object with these members.

    Every message of the channel goes through it, bare arrays and `bytes` too, except what a loan made. Handles are
    pickled with their codec, so it must be picklable for `spawn`; a process that attaches by name passes one of the
    same name to `Channel.attach`.

    >>> import json, ringshm
    >>> class Json:
    ...     name = "json"
    ...     def encode(self, obj: object) -> bytes:
    ...         return json.dumps(obj).encode()
    ...     def decode(self, data: memoryview) -> object:
    ...         return json.loads(bytes(data))
    >>> with ringshm.Channel(4, "1KiB", codec=Json()) as channel:
    ...     channel.put({"reward": [1, None]})
    ...     channel.get()
    {'reward': [1, None]}
    """

    @property
    def name(self) -> str:
        """At most 48 bytes of UTF-8; recorded in the segment and compared on attach."""

    def encode(self, obj: T, /) -> Buffer | NDArray[Any]:
        """The object as one C-contiguous buffer: `bytes`, `bytearray`, a `memoryview`, an array.

        Its bytes are copied once, into the slot. It may raise anything: `put` raises it, and nothing is sent.

        Args:
            obj: what was given to `put`.
        """

    def decode(self, data: memoryview, /) -> T:
        """The object again.

        What it raises arrives as the cause of an UndecodableMessage; the message counts as received.

        Args:
            data: the bytes of `encode`: read-only, one-dimensional, of format "B".

        Ownership:
            Under `get`, `data` lies in the slot: if the result refers to it, `decode` is called again with a copy, and
            that result is returned. Under `borrow` the result may refer to the slot, which it then keeps. Of a message
            larger than a slot, `data` is this process's own.
        """


class Decodable(Protocol):
    """What a channel asks of its codec, built in or wrapped."""

    def encode(self, obj: Any) -> Encoded:
        """The object as meta, payload and description."""

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The object whose payload lies at `offset` and whose description lies at `description`."""

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object, with arrays that are views of the payload, which is read-only."""

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object, with arrays that are views of the payload, which is the caller's own, and writable."""


# --- arrays


class _ArrayForm:
    """What a bare array's bytes mean, as told by a description."""

    __slots__ = ("dtype", "nbytes", "order", "readonly", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], order: Any, readonly: bool) -> None:
        self.shape = shape
        self.dtype = dtype
        self.order = order
        self.readonly = readonly
        self.nbytes = math.prod(shape) * dtype.itemsize


_FORTRAN, _READONLY = 1, 2
_CACHE_SIZE = 1024
_descriptions: dict[tuple[np.dtype[Any], tuple[int, ...], int], bytes] = {}
_forms: dict[bytes, _ArrayForm] = {}


def describe_dtype(dtype: np.dtype[Any]) -> str | None:
    """A dtype as text from which `parse_dtype` makes an equal one; None if there is no such text."""
    if dtype.hasobject or dtype.metadata:
        return None
    if dtype.type.__module__ == "ml_dtypes":
        return f"ml_dtypes.{dtype.name}"
    if dtype.names is None and dtype.subdtype is None:
        texts = [dtype.str]
    else:
        texts = [repr(_literal(dtype, spell_out)) for spell_out in (False, True)]
    for text in texts:
        try:
            parsed = parse_dtype(text)
        except (ValueError, TypeError):
            continue
        if parsed == dtype and parsed.isalignedstruct == dtype.isalignedstruct:
            return text
    return None


def _literal(dtype: np.dtype[Any], spell_out: bool) -> Any:
    """A dtype as a literal: of strings, tuples for subarrays, and lists of fields that follow each other, or dicts."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return _literal(base, spell_out), shape
    if dtype.names is None:
        return dtype.str
    fields: list[tuple[Any, ...]] = [dtype.fields[name] for name in dtype.names]  # type: ignore[index]
    titles = [field[2] if len(field) > 2 else None for field in fields]
    formats = [_literal(field[0], spell_out) for field in fields]
    if not spell_out:
        names = [name if title is None else (title, name) for title, name in zip(titles, dtype.names, strict=True)]
        return [(name, *(f if isinstance(f, tuple) else (f,))) for name, f in zip(names, formats, strict=True)]
    literal = {
        "names": list(dtype.names),
        "formats": formats,
        "offsets": [field[1] for field in fields],
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
    }
    return {**literal, "titles": titles} if any(title is not None for title in titles) else literal


#: What `dtype.str` can be. NumPy's own parser takes more, and ends the process by a division by zero at "M8[s/0]".
_DTYPE_STR = re.compile(r"[<>|][biufcSUVMm][0-9]{1,10}(\[([1-9][0-9]{0,8})?[A-Za-zμ]{1,7}\])?")
_DTYPE_KEYS = {"names", "formats", "offsets", "itemsize", "aligned", "titles"}


def _from_literal(literal: Any) -> np.dtype[Any]:
    """The dtype of a literal of `_literal`, or of whatever else a stream holds: NumPy sees nothing unknown."""
    if isinstance(literal, tuple):
        base, shape = literal
        return np.dtype((_from_literal(base), _shape(shape)))
    if isinstance(literal, dict):
        if not literal.keys() <= _DTYPE_KEYS:
            raise ValueError(f"dtype with unknown keys {[*literal.keys() - _DTYPE_KEYS]!r:.80}")
        return np.dtype({**literal, "formats": [_from_literal(field) for field in literal["formats"]]})  # type: ignore[call-overload, no-any-return]
    if isinstance(literal, list):
        return np.dtype([(name, _from_literal(field), *map(_shape, shape)) for name, field, *shape in literal])
    if isinstance(literal, str) and literal.startswith("ml_dtypes."):
        return _from_extension(literal)
    if not isinstance(literal, str) or not _DTYPE_STR.fullmatch(literal):
        raise ValueError(f"{literal!r:.80} is no dtype")
    return np.dtype(literal)


def _from_extension(text: str) -> np.dtype[Any]:
    """A dtype that ml_dtypes adds to NumPy, if this process has imported that; nothing is imported or called."""
    found = _find_class(text.replace(".", ":"))
    if not issubclass(type(found), type) or not issubclass(found, np.generic):
        raise ValueError(f"dtype {text:.80} is not known here: import ml_dtypes in this process first")
    return np.dtype(found)  # type: ignore[no-any-return]


def _shape(shape: Any) -> tuple[int, ...]:
    """The shape of a subarray; anything else in its place might be another dtype."""
    if not isinstance(shape, tuple) or any(type(length) is not int for length in shape):
        raise ValueError(f"{shape!r:.80} is no shape")
    return shape


def parse_dtype(text: str) -> np.dtype[Any]:
    """The dtype of a text of `describe_dtype`; ValueError or TypeError if it is none."""
    if len(text) > _DTYPE_LENGTH:
        raise ValueError(f"dtype of {len(text)} characters is longer than {_DTYPE_LENGTH}")
    try:
        dtype = _from_literal(ast.literal_eval(text) if text[:1] in ("[", "(", "{") else text)
    except (SyntaxError, MemoryError, RecursionError, LookupError) as error:  # MemoryError: the parser's stack
        raise ValueError(f"{text[:80]!r} is no dtype: {error}") from None
    if dtype.hasobject:
        raise ValueError(f"dtype {text[:80]} holds objects")
    return dtype


def _describe(dtype: np.dtype[Any], shape: tuple[int, ...], flags: int) -> bytes | None:
    text = describe_dtype(dtype)
    if text is None:
        return None
    description = struct.pack(f"<BB{len(shape)}Q", flags, len(shape), *shape) + text.encode()
    if len(description) > min(DESCRIPTION_NBYTES, 255):
        return None
    if len(_descriptions) >= _CACHE_SIZE:
        _descriptions.clear()
    _descriptions[dtype, shape, flags] = description
    return description


def _parse_description(description: bytes) -> _ArrayForm:
    if len(description) > DESCRIPTION_NBYTES:
        raise ValueError(f"description of {len(description)} bytes is longer than {DESCRIPTION_NBYTES}")
    flags, ndim = description[:2]
    end = 2 + 8 * ndim
    shape = struct.unpack(f"<{ndim}Q", description[2:end])
    dtype = parse_dtype(description[end:].decode())
    form = _ArrayForm(shape, dtype, "F" if flags & _FORTRAN else "C", bool(flags & _READONLY))
    if len(_forms) >= _CACHE_SIZE:
        _forms.clear()
    _forms[description] = form
    return form


def _contiguous(array: NDArray[Any]) -> tuple[Any, int]:
    """An array's bytes as a part of a message, and whether they are in Fortran order.

    The source is a buffer if the array is contiguous in either order, else the array, for Parts to copy by strides.
    """
    flags = array.flags
    if flags.c_contiguous:
        return array, 0
    if flags.f_contiguous:
        return array.T, _FORTRAN
    return array, 0


def _as_part(array: NDArray[Any]) -> Any:
    """A C-contiguous array as a buffer of bytes; a dtype such as datetime64 does not export one itself."""
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def _add_array(parts: Parts, array: NDArray[Any]) -> None:
    """Append an array that is C-contiguous or strided."""
    if array.nbytes:
        parts.add(_as_part(array) if array.flags.c_contiguous else array, array.nbytes)


def _encode_array(array: NDArray[Any]) -> Encoded | None:
    """A bare array: its bytes are the payload, so one of exactly the slot's size fits."""
    source, flags = _contiguous(array)
    if not array.flags.writeable:
        flags |= _READONLY
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


def _form_of(description: bytes, nbytes: int) -> _ArrayForm:
    form = _forms.get(description) or _parse_description(description)
    if form.nbytes != nbytes:
        raise ValueError(f"array of {nbytes} bytes is described as one of {form.nbytes}")
    return form


def _decode_array(memory: Any, offset: int, meta: int, description: int, pool: Pool | None) -> NDArray[Any]:
    form = _form_of(memory[description : description + (meta >> 8 & 0xFF)], meta >> 16)
    if form.nbytes:
        array = owned_copy(np.ndarray(form.shape, form.dtype, memory, offset, None, form.order), pool, form.order)
    else:  # to copy countless items of no size takes for ever, and `empty` gives those of "S0" one byte each
        array = _restore_array(bytearray(), form.dtype, form.shape, form.order)
    if form.readonly:
        array.flags.writeable = False
    return array


def _view_array(payload: NDArray[np.uint8], description: bytes) -> NDArray[Any]:
    form = _form_of(description, payload.nbytes)
    if not form.nbytes:
        return np.empty(form.shape, form.dtype, form.order)
    return np.ndarray(form.shape, form.dtype, payload.data, 0, None, form.order)


# --- what a loan made

_TABLE_AT = struct.Struct("<QI")
_TABLE_ENTRY = struct.Struct("<QB")


def describe_loaned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The description of a C-contiguous array; TypeError if its dtype, or its shape, has none."""
    description = _descriptions.get((dtype, shape, 0)) or _describe(dtype, shape, 0)
    if description is None or dtype.metadata:
        raise TypeError(f"an array of shape {shape} and dtype {dtype!r} cannot be loaned: send it by put")
    return description


def encode_loaned(arrays: list[tuple[int, int, bytes]]) -> tuple[int, bytes, bytes]:
    """What arrays in a slot, as (offset, nbytes, description), are as a message: meta, description, and the table that
    goes right behind them. One alone at the start needs no table.
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


# --- kinds without a container


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


_BARE: dict[type, Callable[[Any], Encoded | None]] = {
    type(None): lambda _: (NONE, b"", b""),
    bool: lambda value: (TRUE if value else FALSE, b"", b""),
    int: _encode_int,
    float: lambda value: (8 << 16 | FLOAT, _F64.pack(value), b""),
    str: _encode_str,
    bytes: lambda value: (len(value) << 16 | BYTES, value, b""),
    bytearray: lambda value: (len(value) << 16 | BYTEARRAY, value, b""),
    np.ndarray: _encode_array,
}


def _decode_bare(memory: Any, offset: int, meta: int, description: int, pool: Pool | None = None) -> Any:
    kind, end = meta & 0xFF, offset + (meta >> 16)
    if kind == ARRAY:
        return _decode_array(memory, offset, meta, description, pool)
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


def _adopt_bare(payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
    if meta & 0xFF == ARRAY:
        array = _view_array(payload, description)
        array.flags.writeable = not _form_of(description, payload.nbytes).readonly
        return array
    return _decode_bare(payload.tobytes(), 0, meta, 0)


def _adopt_buffers(payload: NDArray[np.uint8], buffers: list[tuple[int, int, bool]]) -> list[Any]:
    return [payload[start:end].tobytes() if readonly else payload[start:end] for start, end, readonly in buffers]


def _view_bare(payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
    kind = meta & 0xFF
    if kind == ARRAY:
        return _view_array(payload, description)
    if kind in (BYTES, BYTEARRAY):
        return payload.data
    if kind == ARRAYS:
        return _view_arrays(payload, description)
    return _decode_bare(payload.tobytes(), 0, meta, 0)


# --- containers


def _pack_container(stream: list[Any], buffers: list[tuple[Any, int, bool]]) -> Encoded:
    """A container of an inline stream, in pieces, and of (source, nbytes, readonly) buffers."""
    length = sum(map(len, stream))
    if not buffers:
        if len(stream) == 1:
            return length << 16 | CONTAINER, stream[0], b""
        parts, kind = Parts(), CONTAINER
    else:
        parts, kind = Parts(), CONTAINER_OOB
        table = struct.pack(f"<{len(buffers)}Q", *(nbytes << 1 | readonly for _, nbytes, readonly in buffers))
        head = _OOB_HEAD.pack(len(buffers), length) + table
        parts.add(head, len(head))
    for piece in stream:
        parts.add(piece, len(piece))
    for source, nbytes, _ in buffers:
        parts.align()
        if isinstance(source, np.ndarray):
            _add_array(parts, source)
        else:
            parts.add(source, nbytes)
    return parts.nbytes << 16 | kind, parts, b""


def _unpack_container(memory: Any, offset: int, nbytes: int) -> tuple[tuple[int, int], list[tuple[int, int, bool]]]:
    """Where the inline stream and the buffers of a CONTAINER_OOB lie: (start, end) and (start, end, readonly)."""
    end = offset + nbytes
    if nbytes < _OOB_HEAD.size:
        raise ValueError(f"container of {nbytes} bytes has no head")
    count, length = _OOB_HEAD.unpack(memory[offset : offset + _OOB_HEAD.size])
    start = offset + _OOB_HEAD.size
    if count * 8 + length > end - start:
        raise ValueError(f"container of {nbytes} bytes claims {count} buffers and a stream of {length} bytes")
    table = struct.unpack(f"<{count}Q", memory[start : start + 8 * count])
    start += 8 * count
    stream = (start, start + length)
    start += length
    buffers = []
    for entry in table:
        start = offset + -(-(start - offset) // ALIGNMENT) * ALIGNMENT
        if entry >> 1 > end - start:
            raise ValueError(f"container of {nbytes} bytes claims a buffer of {entry >> 1} bytes")
        buffers.append((start, start + (entry >> 1), bool(entry & 1)))
        start += entry >> 1
    return stream, buffers


def _owned_buffers(view: memoryview, buffers: list[tuple[int, int, bool]], pool: Pool | None) -> list[Any]:
    return [
        bytes(view[start:end])
        if readonly
        else bytearray(view[start:end])
        if pool is None or end - start < LEAST_NBYTES
        else owned_copy(np.frombuffer(view, np.uint8, end - start, start), pool)
        for start, end, readonly in buffers
    ]


# --- pickle


def _restore_array(buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    """An array over the buffer that the unpickler was given."""
    return np.ndarray(shape, dtype, buffer, 0, None, order)


class _Reducers(dict[type, Callable[[Any], Any]]):
    """The pickler's dispatch table: arrays and tensors our way, everything else as multiprocessing (whose connections
    and sockets are more than their bytes) or copyreg has it at the time.
    """

    def __init__(self, array: Callable[[Any], Any], tensor: Callable[[Any], Any]) -> None:
        super().__init__({np.ndarray: array})
        self._array, self._tensor = array, tensor

    def __missing__(self, key: type) -> Any:
        if is_tensor(key):
            return self._tensor
        if is_jax_array(key):
            return self._array
        forking = _forking_table.get(key)
        return _copyreg_table[key] if forking is None else forking


class _Pickling:
    """A pickler that is used again and again, with what it collects: stream pieces and out-of-band buffers.

    Given a file to write to, CPython's pickler passes `bytes` and `bytearray` objects of 64 KiB and more through as
    they are, so that those too are copied once.
    """

    __slots__ = ("__weakref__", "_arrays", "buffers", "clear_memo", "dump", "stream", "write")

    def __init__(self) -> None:
        self.stream: list[Any] = []
        self.write = self.stream.append
        self.buffers: list[pickle.PickleBuffer] = []
        self._arrays: dict[int, NDArray[Any]] = {}
        pickler = pickle.Pickler(self, 5, buffer_callback=self.buffers.append)
        pickler.dispatch_table = _Reducers(self._reduce_array, self._reduce_tensor)
        self.dump = pickler.dump
        self.clear_memo = pickler.clear_memo

    def _out_of_band(self, array: NDArray[Any], readonly: bool) -> pickle.PickleBuffer:
        """An empty buffer that stands for the array, which takes its place in `buffers`: PickleBuffer wants what not
        every dtype exports and no strided array is.
        """
        placeholder = pickle.PickleBuffer(b"" if readonly else bytearray())
        self._arrays[id(placeholder)] = array
        return placeholder

    def _reduce_tensor(self, tensor: Any) -> Any:
        if not is_dense(tensor):
            return tensor.__reduce_ex__(5)  # to dense ones, or by PyTorch's own means
        dtype = str(tensor.dtype).removeprefix("torch.")
        return restore_tensor, (self._out_of_band(bits_of(tensor), False), dtype, tuple(tensor.shape))

    def _reduce_array(self, given: Any) -> Any:
        array: NDArray[Any] = np.asarray(given)
        dtype = array.dtype
        if dtype.hasobject:
            return array.__reduce_ex__(5)
        source, order = _contiguous(array)
        placeholder = self._out_of_band(source, array is given and not array.flags.writeable)
        told = dtype.str if dtype.isbuiltin == 1 and not dtype.metadata else dtype
        return _restore_array, (placeholder, told, array.shape, "F" if order else "C")

    def container(self) -> Encoded:
        """What was dumped, in pieces or with buffers, as a container."""
        buffers: list[tuple[Any, int, bool]] = []
        for buffer in self.buffers:
            raw = buffer.raw()
            array = self._arrays.get(id(buffer))
            buffers.append((raw, raw.nbytes, raw.readonly) if array is None else (array, array.nbytes, raw.readonly))
        encoded = _pack_container(self.stream[:], buffers)
        self.forget()
        return encoded

    def forget(self) -> None:
        """Let go of what was dumped so far: not only once the garbage collector has found this cycle."""
        self.clear_memo()
        self.buffers.clear()
        self._arrays.clear()
        self.stream.clear()


class PickleCodec:
    """Any picklable object, protocol 5, large buffers beside the pickle. Unpickling runs what the sender says."""

    def __init__(self, pool: Pool | None = None) -> None:
        self._pool = pool
        self._idle: list[_Pickling] = []  # taken and put back in one step each: threads and nested calls get their own

    def encode(self, obj: Any) -> Encoded:
        """The object as meta, payload and description; raises what pickling it raises."""
        bare = _BARE.get(obj.__class__)
        if bare is not None:
            encoded = bare(obj)
            if encoded is not None:
                return encoded
        try:
            pickling = self._idle.pop()
        except IndexError:
            pickling = _Pickling()
        try:
            pickling.dump(obj)
        except BaseException:
            pickling.forget()  # and it is not used again
            raise
        stream = pickling.stream
        if len(stream) == 1 and not pickling.buffers:
            data = stream.pop()
            pickling.clear_memo()
            self._idle.append(pickling)
            return len(data) << 16 | CONTAINER, data, b""
        encoded = pickling.container()
        self._idle.append(pickling)
        return encoded

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The object, which owns all its memory; raises what unpickling it raises."""
        kind, nbytes = meta & 0xFF, meta >> 16
        if kind == CONTAINER and nbytes <= _COPY_NBYTES:
            return _loads(memory[offset : offset + nbytes])
        if kind == ARRAY:
            return _decode_array(memory, offset, meta, description, self._pool)
        if kind > CUSTOM:
            return _decode_bare(memory, offset, meta, description, self._pool)
        with memoryview(memory) as view:
            if kind == CONTAINER:
                with view[offset : offset + nbytes] as stream:
                    return pickle.loads(stream)
            (start, end), buffers = _unpack_container(memory, offset, nbytes)
            with view[start:end] as stream:
                return pickle.loads(stream, buffers=_owned_buffers(view, buffers, self._pool))

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object, with arrays, and whatever else protocol 5 sends out of band, that are views of the payload."""
        kind = meta & 0xFF
        if kind > CUSTOM:
            return _view_bare(payload, meta, description)
        view: Any = payload.data
        if kind == CONTAINER:
            return pickle.loads(view)
        (start, end), buffers = _unpack_container(view, 0, payload.nbytes)
        return pickle.loads(view[start:end], buffers=[view[start:end] for start, end, _ in buffers])

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object, with arrays that are views of the payload, which is the caller's own, and writable."""
        kind = meta & 0xFF
        if kind > CUSTOM:
            return _adopt_bare(payload, meta, description)
        if kind == CONTAINER:
            return pickle.loads(payload.data)
        (start, end), buffers = _unpack_container(payload.data, 0, payload.nbytes)
        return pickle.loads(payload.data[start:end], buffers=_adopt_buffers(payload, buffers))


# --- a codec of the user's

_LOANED = (BYTES, ARRAY, ARRAYS)  # what a loan makes, whatever the codec


class CustomCodec:
    """A user's codec in the channel's terms: everything goes through it, bare kinds too."""

    def __init__(self, codec: Codec[Any]) -> None:
        self.codec = codec

    def encode(self, obj: Any) -> Encoded:
        """What the user's `encode` gives, as one buffer."""
        data: Any = self.codec.encode(obj)
        if data.__class__ is bytes:
            return len(data) << 16 | CUSTOM, data, b""
        try:
            view = memoryview(data).cast("B")
        except TypeError as error:
            raise TypeError(
                f"codec {self.codec.name!r} encoded to a {type(data).__name__}, no C-contiguous buffer: {error}"
            ) from None
        return view.nbytes << 16 | CUSTOM, view, b""

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """What the user's `decode` makes of the payload, made anew from a copy if it refers to the slot."""
        if meta & 0xFF in _LOANED:
            return _decode_bare(memory, offset, meta, description)
        if meta & 0xFF != CUSTOM:
            raise ValueError(f"payload of kind {meta & 0xFF} was not made by codec {self.codec.name!r}")
        end = offset + (meta >> 16)
        owner = np.frombuffer(memory, np.uint8, end - offset, offset)
        value = self.codec.decode(memoryview(owner).toreadonly())  # type: ignore[arg-type]
        if sys.getrefcount(owner) > _UNSHARED:  # the view, slices of it, and whatever exports them hold it
            return self.codec.decode(memoryview(memory[offset:end]))
        return value

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """What the user's `decode` makes of the payload; it may refer to it."""
        if meta & 0xFF in _LOANED:
            return _view_bare(payload, meta, description)
        if meta & 0xFF != CUSTOM:
            raise ValueError(f"payload of kind {meta & 0xFF} was not made by codec {self.codec.name!r}")
        return self.codec.decode(payload.data)

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """What the user's `decode` makes of the payload, which is the caller's own; it may refer to it."""
        if meta & 0xFF != CUSTOM:
            raise ValueError(f"payload of kind {meta & 0xFF} was not made by codec {self.codec.name!r}")
        return self.codec.decode(payload.data.toreadonly())


# --- plain


(
    _T_NONE,
    _T_FALSE,
    _T_TRUE,
    _T_INT,
    _T_BIG_INT,
    _T_FLOAT,
    _T_STR,
    _T_BYTES,
    _T_BYTES_OOB,
    _T_TUPLE,
    _T_NAMED_TUPLE,
    _T_LIST,
    _T_DICT,
    _T_SET,
    _T_ARRAY,
    _T_SCALAR,
    _T_DTYPE,
) = range(17)

_MAX_DEPTH = 100
#: How many keys of one dict or set may have the same hash. Numbers with equal hashes are easily made, and each is then
#: compared with all others: a megabyte of them would take minutes.
_MAX_ALIKE = 100
_U32 = struct.Struct("<I")


class _PlainWriter:
    """One message on its way into a "plain" container."""

    def __init__(self) -> None:
        self.stream = bytearray()
        self.buffers: list[tuple[Any, int, bool]] = []

    def _tagged(self, tag: int, raw: bytes) -> None:
        self.stream.append(tag)
        self.stream += _U32.pack(len(raw))
        self.stream += raw

    def write(self, obj: Any, path: str, depth: int) -> None:
        """Append an object; `path` says where in the message it is."""
        if depth > _MAX_DEPTH:
            raise ValueError(
                f"codec 'plain' cannot send what nests deeper than {_MAX_DEPTH} or holds itself: {path[:80]}…"
            )
        kind = obj.__class__
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
            if len(obj) < _COPY_NBYTES:
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
            if _find_class(name) is not kind:
                raise TypeError(
                    f"codec 'plain' cannot send the NamedTuple {name} at {path}: its class is not to be found under "
                    "that name; define it at the top of a module"
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
        source, flags = _contiguous(array)
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
                f"codec 'plain' cannot send dtype {dtype!r} at {path}: it holds objects or is no plain dtype"
            )
        return text.encode()


class _PlainReader:
    """One "plain" container on its way out. Raises ValueError (or a TypeError for unhashable keys) on bad bytes."""

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
        """Check that everything was used."""
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
            return _make_named_tuple(self._raw().decode(), self._items(depth, exactly=True))
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

    def _items(self, depth: int, exactly: bool = False) -> list[Any]:
        return [self.read(depth + 1) for _ in range(self._count())]

    def _array(self) -> NDArray[Any]:
        flags, ndim = self._take(2)
        shape = struct.unpack(f"<{ndim}Q", self._take(8 * ndim))
        dtype = parse_dtype(self._raw().decode())
        buffer = self._buffer()
        if math.prod(shape) * dtype.itemsize != len(buffer):
            raise ValueError(f"array of shape {shape} and dtype {dtype} has {len(buffer)} bytes")
        return _restore_array(buffer, dtype, shape, "F" if flags & _FORTRAN else "C")


def _hashable(keys: list[Any]) -> list[Any]:
    """`keys`, if few of them have the same hash."""
    if len(keys) > _MAX_ALIKE and max(Counter(map(hash, keys)).values()) > _MAX_ALIKE:
        raise ValueError(f"more than {_MAX_ALIKE} keys of a dict or set have the same hash")
    return keys


def _is_named_tuple(kind: type) -> bool:
    """Whether a class is made by `namedtuple` or `NamedTuple` (also a generic one), and not derived from such."""
    if type(kind) is not type or kind.__bases__ not in ((tuple,), (tuple, Generic)):
        return False
    fields = vars(kind).get("_fields")
    return isinstance(fields, tuple) and all(isinstance(name, str) for name in fields)


_vars_of_module: Any = vars(types.ModuleType)["__dict__"].__get__
_vars_of_class: Any = vars(type)["__dict__"].__get__


def _find_class(name: str) -> Any:
    """What "module:Outer.Inner" names among what is imported; None if nothing. Nothing found on the way is asked
    anything: a lazy module, or a metaclass, would run code.
    """
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        if issubclass(type(found), types.ModuleType):
            found = _vars_of_module(found).get(part)
        elif issubclass(type(found), type):
            found = _vars_of_class(found).get(part)
        else:
            return None
    return found


def _make_named_tuple(name: str, items: list[Any]) -> Any:
    """An instance of a NamedTuple class that this process has imported already; nothing is imported or called."""
    found = _find_class(name)
    if found is None:
        raise ValueError(f"NamedTuple class {name} is not known here: import its module in the receiver first")
    if not issubclass(type(found), type) or not _is_named_tuple(found):
        raise ValueError(f"{name} is no NamedTuple class in this process")
    if len(items) != len(found._fields):
        raise ValueError(f"NamedTuple class {name} takes other fields here than in the sender")
    return tuple.__new__(found, items)


class PlainCodec:
    """`bytes int float bool str None`, arrays, NumPy scalars and dtypes, nested in tuples, NamedTuples, lists, dicts
    and sets. Decoding runs no code and imports nothing, whatever the bytes are.
    """

    def __init__(self, pool: Pool | None = None) -> None:
        self._pool = pool

    def encode(self, obj: Any) -> Encoded:
        """The object as meta, payload and description; TypeError names the place of what it cannot send."""
        bare = _BARE.get(obj.__class__)
        if bare is not None:
            encoded = bare(obj)
            if encoded is not None:
                return encoded
        writer = _PlainWriter()
        writer.write(obj, "message", 0)
        return _pack_container([writer.stream], writer.buffers)

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The object, which owns all its memory."""
        kind, nbytes = meta & 0xFF, meta >> 16
        if kind > CUSTOM:
            return _decode_bare(memory, offset, meta, description, self._pool)
        with memoryview(memory) as view:
            return self._read(view[offset : offset + nbytes], kind, partial(_owned_buffers, pool=self._pool))

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object, with arrays that are views of the payload."""
        kind = meta & 0xFF
        if kind > CUSTOM:
            return _view_bare(payload, meta, description)
        return self._read(payload.data, kind, lambda view, buffers: [view[start:end] for start, end, _ in buffers])

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object, with arrays that are views of the payload, which is the caller's own, and writable."""
        kind = meta & 0xFF
        if kind > CUSTOM:
            return _adopt_bare(payload, meta, description)
        return self._read(payload.data, kind, lambda _, buffers: _adopt_buffers(payload, buffers))

    def _read(self, view: memoryview, kind: int, buffers_of: Callable[[memoryview, Any], list[Any]]) -> Any:
        if kind == CUSTOM:
            raise ValueError("payload was not made by codec 'plain'")
        start, end = 0, view.nbytes
        buffers: list[tuple[int, int, bool]] = []
        if kind == CONTAINER_OOB:
            (start, end), buffers = _unpack_container(view, 0, view.nbytes)
        reader = _PlainReader(bytes(view[start:end]), buffers_of(view, buffers))
        value = reader.read()
        reader.finish()
        return value
