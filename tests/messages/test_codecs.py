"""Codecs: one table of messages, encoded and decoded by each; copies counted; bytes that nobody trusts."""

from __future__ import annotations

import collections
import gc
import math
import os
import pickle
import random
import signal
import struct
import sys
import tracemalloc
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import payloads
from support.payloads import read_only
from support.workers import in_threads, switching_often

import ringshm
from ringshm.messages import codecs, plain
from ringshm.messages.buffers import ALIGNMENT
from ringshm.messages.codecs import Codec
from ringshm.messages.custom import CustomCodec
from ringshm.messages.dtypes import parse_dtype
from ringshm.messages.pickled import PickleCodec
from ringshm.messages.plain import PlainCodec

MIB = 1 << 20

T = TypeVar("T")


Pair = collections.namedtuple("Pair", "left right")

if sys.version_info >= (3, 11):

    class Box(NamedTuple, Generic[T]):
        """A generic one."""

        content: T


def there_and_back(codec: codecs.Decodable, obj: Any) -> Any:
    """The object as it arrives, after its slot has been written again."""
    encoded = codec.encode(obj)
    slot = payloads.Slot(encoded[0] >> 16)
    value = codec.decode(*slot.write(encoded))
    slot.overwrite()
    return value


def assert_same(a: Any, b: Any, path: str = "message") -> None:
    """Equal in type, dtype, shape, order, writability, bits, class and order of keys, all the way down."""
    if isinstance(a, np.dtype):  # NumPy itself pickles `longlong` as `int64`, which is equal
        assert a == b and (a.metadata or None) == (b.metadata or None) and a.isalignedstruct == b.isalignedstruct, path
        assert a.kind != "V" or a.type is b.type, path
        if a.subdtype is not None and b.subdtype is not None:
            assert_same(a.subdtype[0], b.subdtype[0], f"{path} item")
        for name in a.names or ():
            assert_same(a[name], b[name], f"{path}[{name!r}]")
        return
    assert type(a) is type(b), path
    if isinstance(a, np.ndarray):
        assert_same(a.dtype, b.dtype, f"{path} dtype")
        assert a.shape == b.shape, path
        assert a.flags.writeable == b.flags.writeable, path
        assert b.flags.c_contiguous or b.flags.f_contiguous, path
        if a.flags.c_contiguous or a.flags.f_contiguous:
            assert (a.flags.c_contiguous, a.flags.f_contiguous) == (b.flags.c_contiguous, b.flags.f_contiguous), path
        if a.dtype.hasobject:
            for left, right in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
                assert_same(left, right, f"{path} item")
        elif a.dtype.names:
            for name in a.dtype.names:
                assert_same(np.array(a[name], order="C"), np.array(b[name], order="C"), f"{path}[{name!r}]")
        else:
            assert a.tobytes() == b.tobytes(), path
        if isinstance(a, np.ma.MaskedArray):
            assert np.array_equal(a.mask, b.mask), path
    elif isinstance(a, np.generic):
        assert a.dtype == b.dtype, path
        assert a.tobytes() == b.tobytes() if not a.dtype.hasobject else a == b, path
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b), path
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}[{index}]")
    elif isinstance(a, dict):
        assert_same(list(a), list(b), f"{path} keys")
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (set, frozenset)):
        assert {(type(item), item) for item in a} == {(type(item), item) for item in b}, path
    else:
        assert a == b, path


RAW = np.random.default_rng(7).integers(0, 256, 4096, np.uint8)


def of(dtype: Any, shape: Any = (3, 4)) -> np.ndarray:
    """Some array of that dtype, of arbitrary bits where any bits will do."""
    dtype = np.dtype(dtype)
    if dtype.kind in "US" and dtype.itemsize:
        return np.resize(np.array(["ä", "bc", "", "xyz"] if dtype.kind == "U" else [b"a", b"bc", b""], dtype), shape)
    if dtype.kind == "b":
        return np.resize(np.array([True, False, True]), shape)
    if dtype.kind in "g" or dtype.char in "gG":
        return np.resize(np.arange(-5, 7), shape).astype(dtype)
    return np.ndarray(shape, dtype, np.resize(RAW, math.prod(shape) * dtype.itemsize).tobytes()).copy()


STRUCTURED = np.dtype([("a", "<i2"), ("b", ">f8", (2, 3)), ("c", [("d", "S3"), ("e", "?")])])
PADDED = np.dtype([("a", "i1"), ("b", "f8")], align=True)
OFFSETS = np.dtype({"names": ["x", "y"], "formats": ["<f4", "<i2"], "offsets": [8, 2], "itemsize": 24})
TITLED = np.dtype([(("a title", "name"), "<i4"), ("other", "<f4")])

#: Of scalars whose fields are attributes, at the top and within.
RECORDS = [
    np.dtype((np.record, STRUCTURED)), np.dtype((np.record, PADDED)), np.dtype((np.record, OFFSETS)),
    np.dtype([("n", np.dtype((np.record, [("record", "<i4")]))), ("k", "<i2")]),
    np.dtype((np.record, [("n", np.dtype((np.record, [("a", "<i4")])), (2, 1))])),
]  # fmt: skip
DTYPES = [
    *["?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "g", "F", "D", "G"],
    *[">i2", ">u8", ">f4", ">c16", "=f8", "<f2"], *["M8[ns]", "M8[D]", "M8[25s]", "m8[us]", "m8[h]", ">M8[ms]"],
    *["S5", "U7", ">U3", "V6"], STRUCTURED, PADDED, OFFSETS, TITLED, *RECORDS,
]  # fmt: skip

BASE = np.arange(240, dtype=np.int32).reshape(4, 5, 12)

ARRAYS: dict[str, np.ndarray] = {
    **{f"dtype {dtype}": of(dtype) for dtype in DTYPES}, "0-d": np.array(3.5), "0-d structured": of(STRUCTURED, ()),
    "0-d datetime": np.array("2024-02-29", "M8[s]"), "zero size": np.zeros((0, 3), np.float32),
    "zero size in the middle": np.zeros((2, 0, 3), "M8[ns]"), "zero itemsize": np.zeros((2, 3), "V0"),
    "zero itemsize strings": np.empty((3,), np.dtype("U0")) if np.dtype("U0").itemsize == 0 else np.zeros(3, "U1"),
    "one item": np.ones((1, 1, 1)), "Fortran": np.asfortranarray(BASE),
    "Fortran datetime": np.asfortranarray(of("M8[ns]")), "Fortran structured": np.asfortranarray(of(STRUCTURED)),
    "transposed": BASE.T, "strided": BASE[:, ::2, ::3], "negative strides": BASE[::-1, :, ::-1],
    "axes swapped": BASE.swapaxes(1, 2), "strided structured": of(STRUCTURED, (6, 4))[::2],
    "strided datetime": of("m8[us]", (6, 4))[:, ::2], "strided big-endian": of(">c16", (6, 4))[:, 1::2],
    "field of a structured array": of(STRUCTURED, (5,))["b"], "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "broadcast scalar": np.broadcast_to(np.float32(2), (3, 3)), "read-only": read_only(np.arange(5)),
    "read-only Fortran": read_only(np.asfortranarray(BASE)), "read-only strided": read_only(np.arange(10)[::2]),
    "over bytes": np.frombuffer(b"abcdefgh", "<u2"),
    "unaligned": np.frombuffer(bytearray(17), np.uint8)[1:].view("<f8"),
    "signalling NaN": np.array([0x7FF4000000000001, 0xFFF4000000000001], np.uint64).view(np.float64),
    "32 dimensions": np.arange(4).reshape((1,) * 15 + (2,) + (1,) * 15 + (2,)), "more than a page": np.arange(5000.0),
}  # fmt: skip

PLAIN: dict[str, Any] = {
    "None": None, "True": True, "False": False,
    **{f"int {n}": n for n in (0, -1, 255, 1 << 62, (1 << 63) - 1, -(1 << 63))},
    **{f"int of {n.bit_length()} bits": n for n in (1 << 63, -(1 << 63) - 1, 1 << 64, -(1 << 5000), 3**50_000)},
    **{f"float {x}": x for x in (0.0, -0.0, 1e308, -5e-324, math.inf, -math.inf, math.nan)}, "str": "häß\0𝄞",
    "empty str": "", "lone surrogates": "a\ud800\udfff\udc80z", "bytes": bytes(range(256)), "empty bytes": b"",
    "1 MiB of bytes": random.Random(3).randbytes(MIB),
    **{f"{n} bytes in a list": [b"x" * n, b"y" * n] for n in (65535, 65536, 65537, 200_000)},
    "empty containers": [(), [], {}, set()],
    "nested five deep": {"a": [({"b": (payloads.Point([{1, 2}], {"c": np.arange(3)}),)},)]},
    "NamedTuple": payloads.Point(1, "two"), "namedtuple": Pair([1], (2,)),
    "NamedTuple in a class": payloads.Outer.Inner({"k": Pair(None, payloads.Point(1))}),
    "keys of all kinds": {1: "int", "1": "str", b"1": "bytes", (1,): "tuple", None: 0, 1.5: 1, payloads.Point(1, 2): 2},
    "order of keys": dict.fromkeys([3, 1, 2, "z", "a"]),
    "set of all kinds": {1, "1", b"1", (1, (2,)), None, 2.5, np.int64(9)},
    "surrogates in a container": ["\ud800", {"\udfff": "\udc80"}],
    "big ints in a container": [1 << 63, -(1 << 63), -(1 << 63) - 1, 7**9000, 0],
    "floats in a container": [math.nan, -0.0, math.inf],
    "arrays in containers": {"list": [np.arange(3), np.zeros((2, 0))], "tuple": (np.float32([1, 2]), of(STRUCTURED))},
    "all arrays at once": list(ARRAYS.values()), "an array twice": [BASE, BASE],
    "many small arrays": [np.full(n % 7, n) for n in range(300)],
    "scalars": [np.float32(1.5), np.int8(-3), np.bool_(True), np.complex64(1 + 2j), np.uint64(1 << 63), np.half(2)],
    "longdouble scalar": np.longdouble("1.1"),
    "datetime scalars": [np.datetime64("2020-01-01T00:00:01", "ns"), np.timedelta64(5, "h"), np.datetime64("NaT", "s")],
    "string scalars": [np.str_("häß"), np.bytes_(b"ab"), np.str_(""), np.bytes_(b"")],
    "structured scalar": of(STRUCTURED, (2,))[1], "record scalar": of(RECORDS[0], (2,))[1],
    "void scalar": np.void(b"abc"), "bare scalar": np.float64(2.5),
    "bare int64": np.int64(7), "dtype": np.dtype("f4"), "dtypes": [np.dtype(dtype) for dtype in DTYPES],
}  # fmt: skip
if sys.version_info >= (3, 11):
    PLAIN["generic NamedTuple"] = Box(Box("in a box"))
PLAIN |= {f"array: {name}": array for name, array in ARRAYS.items()}
PLAIN |= {f"array in a list: {name}": [array, 1, array] for name, array in ARRAYS.items()}

OBJECTS = np.array([1, "two", None, [3.0], {"four": np.arange(4)}], object)
WITH_METADATA = np.dtype("i4", metadata={"unit": "m"})

PICKLE_ONLY: dict[str, Any] = {
    "bytearray": bytearray(b"abc"), "empty bytearray": bytearray(),
    "200,000 bytes of bytearray": bytearray(random.Random(5).randbytes(200_000)),
    "nested bytearrays": [bytearray(65535), [bytearray(b"z" * 65536)], bytearray(65537), bytearray()],
    "complex": 1 + 2j, "frozenset": frozenset({1, 2}), "range and slice": [range(5), Ellipsis],
    "subclasses": [collections.OrderedDict(a=1), collections.Counter("aab"), collections.deque([1, 2], 5)],
    "object array": OBJECTS, "object array in a list": [OBJECTS, OBJECTS.reshape(5, 1)],
    "structured array with objects": np.array([(1, [2]), (3, None)], [("a", "i4"), ("b", "O")]),
    "subclass of ndarray": np.arange(6).reshape(2, 3).view(payloads.Labelled),
    "matrix-like recarray": np.rec.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "masked array": np.ma.masked_array(np.arange(4.0), [0, 1, 0, 1]), "dtype with metadata": WITH_METADATA,
    "array whose dtype has metadata": np.arange(3, dtype=WITH_METADATA),
    "arrays with and without metadata": [np.arange(3, dtype="i4"), np.arange(3, dtype=WITH_METADATA)],
    "object dtype": np.dtype("O"), "PickleBuffers' data": [pickle.PickleBuffer(b"abc").raw().tobytes()],
    "a scalar type of one's own": np.zeros(2, (payloads.Row, [("a", "<i4")])),
    "metadata within": np.zeros(2, [("a", WITH_METADATA)]),
    "500 fields": np.zeros(3, [(f"field {n}", "<f4") for n in range(500)]),
}  # fmt: skip
if hasattr(np, "dtypes") and hasattr(np.dtypes, "StringDType"):
    PICKLE_ONLY["variable strings"] = np.array(["a", "bcd" * 30, ""], np.dtypes.StringDType())

CASES = [
    *(
        pytest.param(codec, value, id=f"{codec.__name__}-{name}")
        for name, value in PLAIN.items()
        for codec in (PickleCodec, PlainCodec)
    ),
    *(pytest.param(PickleCodec, value, id=f"PickleCodec-{name}") for name, value in PICKLE_ONLY.items()),
]


@pytest.mark.parametrize(("codec", "value"), CASES)
def test_every_message_arrives_as_it_was_sent(codec: Any, value: Any) -> None:
    arrived = there_and_back(codec(), value)
    assert_same(value, arrived)
    again = there_and_back(codec(), arrived)
    assert_same(value, again)


@pytest.mark.parametrize("value", ["bare", "nested"])
def test_a_wide_dtype_is_sent_by_the_plain_codec_too(value: str) -> None:
    array = PICKLE_ONLY["500 fields"]
    message = array if value == "bare" else [array]
    assert_same(message, there_and_back(PlainCodec(), message))


def test_metadata_of_a_dtype_do_not_depend_on_what_was_sent_before() -> None:
    codec = PickleCodec()
    for _ in range(2):
        for array in (np.arange(3, dtype="i4"), np.arange(3, dtype=WITH_METADATA)):
            assert_same(array, there_and_back(codec, array))


@pytest.mark.parametrize("codec", [PickleCodec, PlainCodec])
def test_equal_dtypes_keep_the_types_of_their_scalars_whatever_was_sent_before(codec: Any) -> None:
    plain, both = codec(), [STRUCTURED, RECORDS[0], np.dtype([("n", STRUCTURED)]), np.dtype([("n", RECORDS[0])])]
    for dtype in both * 2:
        array = np.zeros(3, dtype)
        assert_same(array, there_and_back(plain, array))


@pytest.mark.parametrize("text", ["('record', '<i4')", "('record', 3)", "('record', ('<i4', (3,)))", "('record',)"])
def test_a_record_without_fields_is_no_dtype(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_dtype(text)


def test_the_plain_codec_refuses_a_dtype_with_metadata_also_after_one_without() -> None:
    codec = PlainCodec()
    there_and_back(codec, np.arange(3, dtype="i4"))
    with pytest.raises(TypeError, match="dtype"):
        codec.encode(np.arange(3, dtype=WITH_METADATA))


@pytest.mark.parametrize("codec", [PickleCodec, PlainCodec])
def test_the_class_of_a_namedtuple_is_the_very_same(codec: Any) -> None:
    arrived = there_and_back(codec(), [payloads.Point(1), Pair(2, 3), payloads.Outer.Inner(4)])
    assert [type(item) for item in arrived] == [payloads.Point, Pair, payloads.Outer.Inner]
    assert arrived[0].x == 1


def test_objects_are_sent_whose_class_has_no_name_for_its_module() -> None:
    """As those that Cython makes of functions, to which a pickled random number generator leads."""

    class Nameless:
        __module__ = property(lambda self: "")  # type: ignore[assignment]

        def __reduce__(self) -> Any:
            return complex, (1, 2)

    generator = np.random.default_rng(3)
    with ringshm.Channel(1, "4KiB") as channel:
        channel.put(Nameless())
        assert channel.get() == complex(1, 2)
        channel.put(generator)
        assert channel.get().random() == generator.random()


def test_one_array_sent_twice_in_a_message_is_one_array_on_arrival() -> None:
    first, second = there_and_back(PickleCodec(), [BASE, BASE])
    assert first is second


def test_cycles_are_pickled() -> None:
    loop: list[Any] = [np.arange(3)]
    loop.append(loop)
    arrived = there_and_back(PickleCodec(), loop)
    assert arrived[1] is arrived


# --- ownership


@pytest.mark.parametrize("codec", [PickleCodec, PlainCodec])
@pytest.mark.parametrize("name", list(ARRAYS))
def test_nothing_that_arrives_points_into_the_slot(codec: Any, name: str) -> None:
    for message in (ARRAYS[name], [ARRAYS[name], b"x" * 70_000]):
        codec_ = codec()
        encoded = codec_.encode(message)
        slot = payloads.Slot(encoded[0] >> 16)
        value = codec_.decode(*slot.write(encoded))
        whole = np.frombuffer(slot.memory, np.uint8)
        arrays = [value] if isinstance(value, np.ndarray) else [value[0]]
        assert not any(np.shares_memory(array.view(np.ndarray), whole) for array in arrays if array.nbytes)
        del whole, encoded
        slot.memory.close()  # BufferError if anything still looks at it


@pytest.mark.parametrize("codec", [PickleCodec, PlainCodec])
def test_what_arrives_outlives_the_array_that_was_sent(codec: Any) -> None:
    array = np.arange(1000)
    arrived = there_and_back(codec(), [array])
    array[:] = 0
    assert arrived[0].tolist() == list(range(1000))


@pytest.mark.parametrize("codec", [PickleCodec, PlainCodec])
def test_arrays_lie_aligned_in_the_slot(codec: Any) -> None:
    meta, parts, _ = codec().encode([b"abc", np.arange(5, dtype=np.int8), np.arange(7.0), BASE[:, ::2]])
    assert meta & 0xFF == codecs.CONTAINER_OOB
    starts = [start for start, source in parts._parts if not isinstance(source, (bytes, bytearray))]
    assert len(starts) == 3
    assert all(start % ALIGNMENT == 0 for start in starts)


@pytest.mark.parametrize(
    "bare", [np.arange(1000.0), b"x" * 8000, bytearray(8000), BASE.T, of("M8[ns]", (1000,))], ids=type
)
@pytest.mark.parametrize("codec", [PickleCodec, PlainCodec])
def test_a_bare_array_or_bytes_takes_exactly_its_own_size(codec: Any, bare: Any) -> None:
    meta, _, description = codec().encode(bare)
    assert meta >> 16 == memoryview(bare if isinstance(bare, (bytes, bytearray)) else bare.tobytes()).nbytes
    assert len(description) <= 192


# --- copies, counted

BIG = 50 * MIB
BIG_MESSAGES: dict[str, Callable[[], Any]] = {
    "array": lambda: np.ones(BIG, np.uint8),
    "datetime array": lambda: np.zeros(BIG // 8, "M8[ns]"),
    "strided array": lambda: np.ones((2, BIG), np.uint8)[:, ::2],
    "Fortran array": lambda: np.ones((BIG // 1000, 1000), np.uint8, "F"),
    "array in a dict": lambda: {"a": np.ones(BIG, np.uint8)},
    "strided array in a dict": lambda: {"a": np.ones((2, BIG), np.uint8)[:, ::2]},
    "read-only array in a dict": lambda: {"a": read_only(np.ones(BIG, np.uint8))},
    "structured array in a dict": lambda: {"a": np.zeros(BIG // 26, [("a", "S18"), ("b", "f8")])},
    "bytes": lambda: bytes(BIG),
    "bytes in a list": lambda: [bytes(BIG)],
    "bytearray": lambda: bytearray(BIG),
    "bytearray in a list": lambda: [bytearray(BIG)],
    "many arrays": lambda: [np.ones(BIG // 50, np.uint8) for _ in range(50)],
}


@pytest.mark.parametrize(
    ("codec", "name"),
    [(PickleCodec, name) for name in BIG_MESSAGES]
    + [(PlainCodec, name) for name in BIG_MESSAGES if name != "bytearray in a list"],
)
def test_large_data_are_copied_once_in_and_once_out(codec: Any, name: str) -> None:
    message = BIG_MESSAGES[name]()
    codec_ = codec()
    slot = payloads.Slot(BIG + MIB)
    tracemalloc.start()
    try:
        where = slot.write(codec_.encode(message))
        _, peak_in = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        value = codec_.decode(*where)
        after, peak_out = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_same(message, value)
    assert peak_in < MIB, "the copy into the slot is the only one"
    assert 0.99 * BIG < after - before < BIG + MIB
    assert peak_out - before < BIG + MIB, "the copy out of the slot is the only one"


# --- what is refused


class Unpicklable:
    """Raises while it is pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not this one")


UNSUPPORTED: list[tuple[Any, str]] = [
    (Unpicklable(), "message"), ({"a": [1, (2, 1j)]}, r"message\['a'\]\[1\]\[1\]"),
    ([bytearray(b"x")], r"bytearray at message\[0\]"), ({(1, frozenset()): 1}, r"frozenset at message key\[1\]"),
    (payloads.Point(1, object()), r"object at message\[1\]"), ([memoryview(b"abc")], r"memoryview at message\[0\]"),
    ({"deep": {"obj": OBJECTS}}, r"dtype\('O'\) at message\['deep'\]\['obj'\]"), (np.dtype("O"), "message"),
    (OBJECTS, "message"), (np.arange(3).view(payloads.Labelled), "Labelled at message"),
    ([np.ma.masked_array([1], [True])], r"MaskedArray at message\[0\]"),
    (collections.OrderedDict(), "OrderedDict at message"), ([range(3)], r"range at message\[0\]"),
    (lambda: 0, "function at message"), (type("SubInt", (int,), {})(3), "SubInt at message"),
    ([signal.SIGTERM], r"Signals at message\[0\]"), (type("Local", (payloads.Point,), {})(1), "Local at message"),
]  # fmt: skip


@pytest.mark.parametrize(("obj", "says"), UNSUPPORTED, ids=[says for _, says in UNSUPPORTED])
def test_the_plain_codec_refuses_what_it_cannot_send_and_names_the_place(obj: Any, says: str) -> None:
    codec = PlainCodec()
    with pytest.raises(TypeError, match=says) as caught:
        codec.encode(obj)
    assert "'plain'" in str(caught.value)
    assert_same([1], there_and_back(codec, [1]))


def test_the_plain_codec_refuses_a_local_namedtuple_where_it_is_sent() -> None:
    Hidden = collections.namedtuple("Hidden", "a")
    with pytest.raises(TypeError, match=r"Hidden.* at message\[0\]"):
        PlainCodec().encode([Hidden(1)])


def test_the_plain_codec_refuses_cycles_and_endless_depth() -> None:
    loop: list[Any] = []
    loop.append({"again": loop})
    with pytest.raises(ValueError, match=r"deeper than 100 or holds itself: message\[0\]\['again'\]"):
        PlainCodec().encode(loop)
    deep: Any = 0
    for _ in range(100):
        deep = [deep]
    assert_same(deep, there_and_back(PlainCodec(), deep))
    with pytest.raises(ValueError, match="deeper than 100"):
        PlainCodec().encode([deep])


def test_a_pickle_that_fails_half_way_leaves_the_codec_as_it_was() -> None:
    codec = PickleCodec()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="not this one"):
            codec.encode([np.arange(10_000), bytes(100_000), Unpicklable()])
        message = [np.arange(5), "after"]
        assert_same(message, there_and_back(codec, message))
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        codec.encode(lambda: 0)
    with pytest.raises((BufferError, ValueError, pickle.PicklingError)):
        codec.encode([pickle.PickleBuffer(memoryview(b"abcdef")[::2])])
    assert_same([1], there_and_back(codec, [1]))


def test_a_codec_keeps_nothing_of_what_it_has_encoded() -> None:
    codec = PickleCodec()

    watched = []
    for wrap in (lambda array: [array], lambda array: {"a": array}):
        array = np.arange(100_000)
        watched.append(weakref.ref(array))
        there_and_back(codec, wrap(array))
        del array
    array = np.arange(100_000)
    watched.append(weakref.ref(array))
    with pytest.raises(RuntimeError):
        codec.encode([array, Unpicklable()])
    del array
    assert [ref() for ref in watched] == [None, None, None], "not only once the garbage collector has run"


# --- re-entrant and in threads


class Nested:
    """While it is pickled, the same codec is used again."""

    def __init__(self, codec: PickleCodec, depth: int, seen: list[Any]) -> None:
        self.codec, self.depth, self.seen = codec, depth, seen

    def __reduce__(self) -> Any:
        if self.depth:
            inner = [np.arange(self.depth), Nested(self.codec, self.depth - 1, self.seen)]
            self.seen.append(there_and_back(self.codec, inner))
        return str, (f"depth {self.depth}",)


def test_an_object_may_use_the_codec_while_it_is_pickled() -> None:
    codec = PickleCodec()
    seen: list[Any] = []
    outer = there_and_back(codec, [np.arange(9), Nested(codec, 3, seen), b"z" * 70_000])
    assert_same([np.arange(9), "depth 3", b"z" * 70_000], outer)
    assert [item[1] for item in seen] == ["depth 0", "depth 1", "depth 2"]
    assert [item[0].size for item in seen] == [1, 2, 3]


def test_threads_share_a_codec() -> None:
    codec = PickleCodec()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for n in range(150):
                size, nbytes = int(rng.integers(0, 3000)), int(rng.integers(0, 70_000))
                message = {"n": n, "a": rng.random(size), "b": bytes(nbytes)}
                assert_same(message, there_and_back(codec, message))
        except BaseException as error:
            failures.append(error)

    with switching_often(), in_threads(*(partial(work, seed) for seed in range(4))):
        pass
    assert not failures


# --- bytes that nobody trusts


SOUND = [payloads.encoded_bytes(value) for name, value in PLAIN.items() if "MiB" not in name and "65" not in name]
SMALL_SOUND = [item for item in SOUND if len(item[1]) < 4000]

kinds_of_edit = st.sampled_from(["flip", "insert", "delete", "copy", "zero", "ones"])
mutations = st.lists(st.tuples(st.floats(0, 1), kinds_of_edit, st.integers(0, 255)), max_size=6)


def mutate(data: bytes, edits: list[tuple[float, str, int]]) -> bytes:
    raw = bytearray(data)
    for where, edit, byte in edits:
        at = int(where * len(raw))
        if edit == "insert":
            raw[at:at] = bytes([byte]) * (byte % 9)
        elif edit == "delete":
            del raw[at : at + byte % 9]
        elif edit == "copy":
            raw[at:at] = raw[at // 2 : at // 2 + byte]
        elif edit == "zero":
            raw[at : at + 8] = bytes(len(raw[at : at + 8]))
        elif edit == "ones":
            raw[at : at + 4] = b"\xff" * len(raw[at : at + 4])
        elif raw:
            raw[min(at, len(raw) - 1)] ^= byte or 1
    return bytes(raw)


def assert_harmless(kind: int, payload: bytes, description: bytes) -> None:
    """Decodes or raises an Exception that says the bytes are bad; imports nothing; takes memory for what is there."""
    modules = dict(sys.modules)
    tracemalloc.start()
    try:
        value = payloads.decode_plain(kind, payload, description)
    except MemoryError:
        raise AssertionError("bad bytes are no lack of memory") from None
    except Exception:
        pass
    else:
        del value
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MIB + 300 * (len(payload) + len(description))
    assert sys.modules == modules


@settings(max_examples=1000)
@given(st.integers(0, 15), st.binary(max_size=300), st.binary(max_size=60))
def test_random_bytes_do_no_harm_under_the_plain_codec(kind: int, payload: bytes, description: bytes) -> None:
    assert_harmless(kind, payload, description)


@pytest.mark.slow(seconds=60)
@settings(max_examples=2000)
@given(st.sampled_from(SMALL_SOUND), mutations, mutations)
def test_damaged_messages_do_no_harm_under_the_plain_codec(sound: Any, payload: Any, description: Any) -> None:
    kind, data, described = sound
    assert_harmless(kind, mutate(data, payload), mutate(described, description)[:255])


@pytest.mark.parametrize("cut", range(0, 100, 7))
def test_a_message_cut_short_is_refused(cut: int) -> None:
    refused = 0
    for kind, data, description in SMALL_SOUND:
        if len(data) < 2 or kind in (codecs.BYTES, codecs.STR, codecs.BYTEARRAY):
            continue
        with pytest.raises((ValueError, TypeError, struct.error, IndexError)):
            payloads.decode_plain(kind, data[: len(data) * cut // 100], description)
        refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", list(payloads.HOSTILE))
def test_crafted_bytes_do_no_harm_under_the_plain_codec(name: str) -> None:
    assert_harmless(*payloads.HOSTILE[name], b"")


@pytest.mark.parametrize("count", payloads.HUGE)
def test_a_bare_array_of_countless_items_of_no_size_takes_no_time(count: int) -> None:
    assert_harmless(codecs.ARRAY, b"", struct.pack("<BBQ", 0, 1, count) + b"|V0")


@pytest.mark.parametrize("name", payloads.NOT_NAMEDTUPLES)
def test_crafted_class_names_import_and_call_nothing(name: str) -> None:
    stream = payloads.tagged(plain._T_NAMED_TUPLE, name.encode()) + struct.pack("<I", 1) + bytes([plain._T_NONE])
    before = set(sys.modules)
    with pytest.raises(ValueError, match="NamedTuple"):
        payloads.decode_plain(codecs.CONTAINER, stream)
    assert set(sys.modules) == before


SPRUNG: list[str] = []


class Trap(types.ModuleType):
    """A module, or an object in one, that acts when it is looked at, as lazy loaders do."""

    def __getattribute__(self, name: str) -> Any:
        SPRUNG.append(name)
        return super().__getattribute__(name)


class TrapMeta(type):
    """A metaclass that acts when its classes are looked at."""

    def __getattribute__(cls, name: str) -> Any:
        SPRUNG.append(name)
        return super().__getattribute__(name)


@pytest.fixture
def traps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    module = Trap("lazy")
    holder = types.ModuleType("holder")
    holder.instance = Trap("inner")  # type: ignore[attr-defined]
    holder.Class = TrapMeta("Class", (tuple,), {"_fields": ("a",)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lazy_trap", module)
    monkeypatch.setitem(sys.modules, "holder_of_traps", holder)
    SPRUNG.clear()
    yield SPRUNG


@pytest.mark.parametrize("name", ["lazy_trap:Point", "holder_of_traps:instance.x", "holder_of_traps:Class"])
def test_looking_for_a_class_runs_no_code_of_what_it_passes(name: str, traps: list[str]) -> None:
    stream = payloads.tagged(plain._T_NAMED_TUPLE, name.encode()) + struct.pack("<I", 1) + bytes([plain._T_NONE])
    with pytest.raises(ValueError, match="NamedTuple"):
        payloads.decode_plain(codecs.CONTAINER, stream)
    assert traps == []


class Guarded(NamedTuple):
    """A NamedTuple; `__new__` would be its own code."""

    a: Any


def test_a_namedtuple_of_another_length_is_refused() -> None:
    kind, data, description = payloads.encoded_bytes([Guarded(1)])
    longer = data.replace(b"Guarded", b"Point\0\0")
    with pytest.raises(ValueError):
        payloads.decode_plain(kind, longer, description)
    two = payloads.tagged(plain._T_NAMED_TUPLE, f"{__name__}:Guarded".encode()) + struct.pack("<I", 2) + bytes(2)
    with pytest.raises(ValueError, match="other fields"):
        payloads.decode_plain(codecs.CONTAINER, two)


def test_a_pickle_does_not_run_under_the_plain_codec(tmp_path: Any) -> None:
    target = tmp_path / "ran"

    payload = pickle.dumps(payloads.Unpickles(os.mkdir, str(target)), 5)
    for kind in range(12):
        assert_harmless(kind, payload, b"")
    assert not target.exists()


# --- codecs of the user's own


class MsgPack:
    """MessagePack by msgspec."""

    name = "msgpack"

    def __init__(self) -> None:
        msgpack = pytest.importorskip("msgspec").msgpack
        self.encode: Callable[[Any], bytes] = msgpack.encode
        self.decode: Callable[[memoryview], Any] = msgpack.decode


class Keeper:
    """A codec whose results refer to what it was given."""

    def __init__(self, name: str, result: Callable[[memoryview], Any], buffer: Callable[[bytes], Any] = bytes) -> None:
        self.name = name
        self.result = result
        self.buffer = buffer

    def encode(self, obj: Any) -> Any:
        return self.buffer(obj)

    def decode(self, data: memoryview) -> Any:
        assert data.readonly
        return self.result(data)


KEEPERS = {
    "the view": lambda data: data, "a slice of it": lambda data: data[2:], "another view": memoryview,
    "a cast": lambda data: data.cast("B"), "an array over it": lambda data: np.frombuffer(data, np.uint8),
    "views in a list": lambda data: [data[:3], data[3:]],
    "an array over a slice": lambda data: {"a": np.frombuffer(data[1:], np.uint8)},
    "a pickle buffer": pickle.PickleBuffer, "an iterator over it": iter,
}  # fmt: skip


@pytest.mark.parametrize("name", list(KEEPERS))
def test_what_a_codec_keeps_of_the_slot_is_made_anew_from_a_copy(name: str) -> None:
    def flat(value: Any) -> bytes:
        if isinstance(value, (list, dict)):
            return b"".join(flat(item) for item in (value.values() if isinstance(value, dict) else value))
        return bytes(value)

    expected = flat(KEEPERS[name](memoryview(b"abcdefgh")))
    value = there_and_back(CustomCodec(Keeper("keeper", KEEPERS[name])), b"abcdefgh")
    assert flat(value) == expected


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview, lambda raw: np.frombuffer(raw, np.uint8).copy()])
def test_a_codec_may_encode_to_any_contiguous_buffer(buffer: Any) -> None:
    assert there_and_back(CustomCodec(Keeper("any", bytes, buffer)), b"some bytes") == b"some bytes"


@pytest.mark.parametrize("data", ["text", None, 3, memoryview(b"abcdef")[::2], [b"a"]], ids="abcde")
def test_what_is_no_buffer_is_refused_by_the_codecs_name(data: Any) -> None:
    with pytest.raises(TypeError, match="codec 'broken' encoded to a"):
        CustomCodec(Keeper("broken", bytes, lambda _: data)).encode(1)


def test_msgspec_is_a_codec() -> None:
    assert isinstance(MsgPack(), Codec)
    message = {"a": [1, 2.5, None, "x"], "b": b"bytes", "c": {"d": list(range(1000))}}
    with ringshm.Channel(3, "64KiB", codec=MsgPack()) as channel:
        channel.put(message)
        channel.put(3)
        assert channel.get(timeout=5) == message
        assert channel.get(timeout=5) == 3
        with pytest.raises(TypeError):
            channel.put(object())
        channel.put("after")
        attached = ringshm.Channel.attach(channel.name, codec=MsgPack())
        assert attached.get(timeout=5) == "after"
        attached.close()
        with pytest.raises(ringshm.IncompatibleChannel, match=r"'msgpack'.*none was given"):
            ringshm.Channel.attach(channel.name)
        with pytest.raises(ringshm.IncompatibleChannel, match=r"'msgpack'.*'other' was given"):
            ringshm.Channel.attach(channel.name, codec=Keeper("other", bytes))


# --- what cannot be decoded, on a real channel


class Trouble(Exception):
    """What a codec raises."""


def explode(what: str) -> Any:
    raise Trouble(what)


def test_a_message_that_cannot_be_decoded_says_why_and_gives_its_slot_back() -> None:
    with ringshm.Channel(2, 4096) as channel:
        for n in range(5):
            channel.put(payloads.Unpickles(explode, f"bomb {n}"))
            channel.put(n)
            with pytest.raises(ringshm.UndecodableMessage, match=f"bomb {n}") as caught:
                channel.get(timeout=5)
            assert isinstance(caught.value.__cause__, Trouble)
            assert channel.name in str(caught.value)
            assert channel.get(timeout=5) == n
        stats = channel.stats()
        assert (stats.sent, stats.received, stats.free) == (10, 10, 2)


def test_a_batch_returns_what_comes_before_a_bad_message_first() -> None:
    with ringshm.Channel(5, 4096) as channel:
        for message in (1, 2, payloads.Unpickles(explode, "three"), 4, 5):
            channel.put(message)
        assert channel.get_many(10, timeout=5) == [1, 2]
        assert channel.qsize() == 3
        with pytest.raises(ringshm.UndecodableMessage, match="three"):
            channel.get_many(10, timeout=5)
        assert channel.get_many(10, timeout=5) == [4, 5]
        assert channel.stats().free == 5


class Once:
    """A codec during whose decode a signal handler raises, once."""

    name = "once"

    def __init__(self, interrupt: Callable[[], None]) -> None:
        self.interrupt: Callable[[], None] | None = interrupt

    def encode(self, obj: bytes) -> bytes:
        return obj

    def decode(self, data: memoryview) -> bytes:
        interrupt, self.interrupt = self.interrupt, None
        if interrupt is not None:
            interrupt()
        return bytes(data)


class FromHandler(Exception):
    """What a handler raises: an Exception, as a time-out library's would be."""


def raise_signal() -> None:
    """Have the handler of SIGALRM run here and now. A timer's signal may come to another thread of the process, and the
    main thread, which runs handlers, then notices it late.
    """
    signal.raise_signal(signal.SIGALRM)
    raise AssertionError("the handler did not raise")


@pytest.mark.parametrize("many", [False, True], ids=["get", "get_many"])
def test_what_a_signal_handler_raises_is_not_taken_for_the_codecs_failure(many: bool) -> None:
    def handler(*_: Any) -> None:
        raise FromHandler

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        with ringshm.Channel(3, 64, codec=Once(raise_signal)) as channel:
            for message in (b"first", b"second"):
                channel.put(message)
            with pytest.raises(FromHandler):
                channel.get_many(5, timeout=5) if many else channel.get(timeout=5)
            assert channel.qsize() == 2, "both are back in their places"
            assert channel.get(timeout=5) == b"first"
            assert channel.get(timeout=5) == b"second"
            stats = channel.stats()
            assert (stats.received, stats.redelivered, stats.dropped, stats.free) == (2, 0, 0, 3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_lack_of_memory_is_not_the_messages_fault() -> None:
    def out_of_memory() -> None:
        raise MemoryError

    with ringshm.Channel(2, 64, codec=Once(out_of_memory)) as channel:
        channel.put(b"x")
        with pytest.raises(MemoryError):
            channel.get(timeout=5)
        assert channel.get(timeout=5) == b"x"


def test_a_put_within_a_put_goes_through() -> None:
    with ringshm.Channel(3, "64KiB") as channel:

        class Puts:
            def __reduce__(self) -> Any:
                channel.put(["inner", np.arange(5)])
                return str, ("outer",)

        channel.put([Puts(), np.arange(3)])
        assert channel.get(timeout=5)[0] == "inner"
        assert channel.get(timeout=5)[0] == "outer"


@pytest.mark.parametrize("codec", ["pickle", "plain"])
def test_the_whole_table_passes_through_one_real_channel(codec: str) -> None:
    table = PLAIN if codec == "plain" else {**PLAIN, **PICKLE_ONLY}
    with ringshm.Channel(4, "2MiB", codec=codec) as channel:
        for name, value in table.items():
            channel.put(value)
            assert_same(value, channel.get(timeout=5), name)
        for start in range(0, len(table), 4):
            batch = list(table.values())[start : start + 4]
            assert channel.put_many(batch, timeout=5) == len(batch)
            assert_same(batch, channel.get_many(4, timeout=5))
        assert channel.stats().free == 4


def receive_into(channel: ringshm.Channel[Any]) -> None:
    channel.get(out=np.zeros(3))


def borrow(channel: ringshm.Channel[Any]) -> None:
    with channel.borrow():
        pass


@pytest.mark.parametrize("roles_are_taken", [False, True])
@pytest.mark.parametrize(
    "receive", [lambda channel: channel.get(), lambda channel: channel.get_many(2), receive_into, borrow]
)
def test_a_message_that_cannot_be_decoded_leaves_no_cycle_that_keeps_the_channel(
    receive: Callable[[Any], Any], roles_are_taken: bool
) -> None:
    channel: ringshm.Channel[Any] = ringshm.Channel(2, 4096)
    name = channel.name
    if roles_are_taken:
        channel.put(0)
        channel.get()
    channel.put(payloads.Unpickles(explode, "bomb"))
    gc.collect()
    gc.disable()
    try:
        with suppress(ringshm.UndecodableMessage):
            receive(channel)
        del channel
        with pytest.raises(ringshm.ChannelNotFound):
            ringshm.Channel.attach(name)
    finally:
        gc.enable()


class Proxy:
    """It says that it is of another object's class, as mocks and lazy objects do."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject

    @property
    def __class__(self) -> Any:
        return type(self.subject)

    def __reduce__(self) -> Any:
        return Proxied, (self.subject,)


class Proxied(NamedTuple):
    subject: Any


@pytest.mark.parametrize("subject", [None, True, 1, 1.5, "a", b"a", bytearray(b"a")])
def test_a_proxy_is_not_taken_for_what_it_stands_for(subject: Any) -> None:
    with ringshm.Channel(2, 4096) as channel:
        for _ in range(2):
            channel.put(Proxy(subject))
            assert channel.get() == Proxied(subject)
    with ringshm.Channel(2, 4096, codec="plain") as channel:
        for message in (Proxy(subject), [Proxy(subject)]):
            with pytest.raises(TypeError, match="Proxy"):
                channel.put(message)
