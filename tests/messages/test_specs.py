"""Specs: what is accepted and refused, and what becomes of messages between a mapping and a slot's bytes."""

from __future__ import annotations

import collections
import copy
import json
import math
import pickle
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from support.payloads import read_only

from ringshm.errors import SpecMismatch
from ringshm.messages.codecs import TYPED
from ringshm.messages.fields import UpTo
from ringshm.messages.spec_like import spec_like
from ringshm.messages.specs import MAX_UP_TO, Spec
from ringshm.messages.typed import Batch, SpecCodec, borrowed, loaned

FIRST = 4096
DESCRIPTION = 64
ATARI = {"obs": ("uint8", (84, 84, 4)), "action": "int64", "reward": "float32", "done": "bool"}


class Slots:
    """Memory as a segment has it: descriptions of records, then slots, all filled with one byte."""

    def __init__(self, spec: Spec, capacity: int = 3, fill: int = 0xA5) -> None:
        self.spec = spec
        self.capacity = capacity
        self.stride = -(-spec.slot_size // 64) * 64 + 64
        self.memory = bytearray([fill]) * (FIRST + capacity * self.stride)
        self.codec = SpecCodec(spec, self.memory, FIRST, self.stride, capacity)
        self.metas: dict[int, int] = {}

    def offset(self, slot: int) -> int:
        return FIRST + slot * self.stride

    def describe(self, slot: int, meta: int, description: bytes) -> None:
        """What the ring writes into the slot's record."""
        assert meta & 0xFF == TYPED
        assert meta >> 8 & 0xFF == len(description) <= 192
        assert meta >> 16 <= self.spec.slot_size
        self.memory[DESCRIPTION + 200 * slot : DESCRIPTION + 200 * slot + len(description)] = description
        self.metas[slot] = meta

    def put(self, message: Any, slot: int = 1) -> None:
        meta, row, description = self.codec.encode(message)
        row.write(self.memory, self.offset(slot))
        self.describe(slot, meta, description)

    def get(self, slot: int = 1, decode: Any = None) -> Any:
        decode = decode or self.codec.decode
        return decode(self.memory, self.offset(slot), self.metas[slot], DESCRIPTION + 200 * slot)

    def lengths(self, slots: list[int]) -> list[tuple[int, ...]]:
        return [self.spec.lengths(self.memory, self.metas[slot], DESCRIPTION + 200 * slot) for slot in slots]

    def gather(self, slots: list[int], out: Any = None) -> Batch:
        arrays = self.codec.batch_arrays(len(slots), out)
        metas = [self.metas[slot] for slot in slots]
        return self.codec.stack(slots, metas, lambda slot: DESCRIPTION + 200 * slot, arrays)

    def scatter(self, batch: Any, slots: list[int]) -> None:
        encoded = self.codec.encode_batch(batch)
        for slot, (meta, row, description) in zip(slots, encoded, strict=True):
            row.write(self.memory, self.offset(slot))
            self.describe(slot, meta, description)


def through(declaration: Any, message: Any) -> Any:
    """A message through a slot."""
    slots = Slots(Spec(declaration))
    slots.put(message)
    return slots.get()


def same(one: Any, other: Any) -> None:
    """Assert that two values have the same type, dtype, shape and bytes."""
    if isinstance(other, Mapping):
        assert list(one) == list(other)
        for name in other:
            same(one[name], other[name])
        return
    assert type(one) is type(other)
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


RECORD = np.dtype([("x", "f4"), ("label", "S3"), ("at", "<i2", (2,))])

# --- declarations

DECLARATIONS: list[tuple[Any, list[tuple[str, str, tuple[int, ...], bool]]]] = [
    (ATARI, [("obs", "|u1", (84, 84, 4), False), ("action", "<i8", (), False), ("reward", "<f4", (), False),
             ("done", "|b1", (), False)]),
    ({"a": ("f4", 3), "b": (np.float64, ()), "c": np.int16, "d": bool}, [
        ("a", "<f4", (3,), False), ("b", "<f8", (), False), ("c", "<i2", (), False), ("d", "|b1", (), False)]),
    ({"a": {"b": {"c": "i4"}, "d": ("i4", [2, 3])}, "e": "i4"}, [
        ("a.b.c", "<i4", (), False), ("a.d", "<i4", (2, 3), False), ("e", "<i4", (), False)]),
    ({"a": ("i4", UpTo(5)), "b": ("i4", (UpTo(5),)), "c": ("i4", (UpTo(7), 2))}, [
        ("a", "<i4", (5,), True), ("b", "<i4", (5,), True), ("c", "<i4", (7, 2), True)]),
    ({"u": "U5", "s": ("S3", 2), "t": "M8[ns]", "d": "m8[25s]", "v": "V8", "big": (">f4", 2)}, [
        ("u", "<U5", (), False), ("s", "|S3", (2,), False), ("t", "<M8[ns]", (), False), ("d", "<m8[25s]", (), False),
        ("v", "|V8", (), False), ("big", ">f4", (2,), False)]),
    (np.dtype([("x", "f4", (2,)), ("y", "i8"), ("z", RECORD)]), [
        ("x", "<f4", (2,), False), ("y", "<i8", (), False), ("z", RECORD.str, (), False)]),
    ({"r": RECORD, "rs": (RECORD, 4), "l": [("x", "f4")]}, [
        ("r", RECORD.str, (), False), ("rs", RECORD.str, (4,), False), ("l", "|V4", (), False)]),
    ({"sub": np.dtype(("i4", (2, 3))), "steps": (np.dtype(("f4", (2,))), UpTo(9))}, [
        ("sub", "<i4", (2, 3), False), ("steps", "<f4", (9, 2), True)]),
    ({"empty": ("f4", (0, 3)), "x": "i1"}, [("empty", "<f4", (0, 3), False), ("x", "|i1", (), False)]),
    (Spec({"a": Spec({"b": "i4"})}), [("a.b", "<i4", (), False)]),
    ({"with space, ünï.cödé": "i4"}, [("with space, ünï.cödé", "<i4", (), False)]),
    (collections.OrderedDict(a="i4"), [("a", "<i4", (), False)]),
]  # fmt: skip


@pytest.mark.parametrize(("declaration", "fields"), DECLARATIONS)
def test_a_declaration_becomes_fields_at_aligned_offsets(declaration: Any, fields: Any) -> None:
    spec = Spec(declaration)
    assert [(f.name, f.dtype.str, f.shape, f.up_to) for f in spec.fields] == fields
    end = 0
    for field in spec.fields:
        assert field.offset % 64 == 0
        assert end <= field.offset < end + 64
        assert field.nbytes == math.prod(field.shape) * field.dtype.itemsize
        end = field.offset + field.nbytes
    assert spec.slot_size == end
    assert spec.nbytes == sum(field.nbytes for field in spec.fields)
    for field in spec.fields:
        assert f"{field.name} " in spec.describe()
        assert field.describe() in spec.describe()


@pytest.mark.parametrize("declaration", [declaration for declaration, _ in DECLARATIONS])
def test_a_spec_survives_text_pickle_copy_and_itself(declaration: Any) -> None:
    spec = Spec(declaration)
    for again in (
        Spec.from_text(spec.to_text()), pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec), Spec(spec),
        Spec(spec.declaration()),
    ):  # fmt: skip
        assert again == spec
        assert hash(again) == hash(spec)
        assert again.fields == spec.fields
        assert repr(again) == repr(spec)
    assert all(ord(character) < 128 for character in spec.to_text())


def test_specs_differ_by_name_order_dtype_shape_and_nesting() -> None:
    specs = [
        Spec(declaration)
        for declaration in (
            {"a": "i4", "b": "i4"}, {"b": "i4", "a": "i4"}, {"a": "i4", "c": "i4"}, {"a": "i4", "b": ">i4"},
            {"a": "i4", "b": ("i4", 1)}, {"a": "i4", "b": ("i4", UpTo(1))}, {"a": {"b": "i4"}}, {"a.b": "i4"},
            {"a": np.dtype([("b", "i4")])}, {"a": np.dtype([("b", "i1"), ("c", "i4")])},
            {"a": np.dtype([("b", "i1"), ("c", "i4")], align=True)}, {"a": np.dtype((np.record, [("b", "i4")]))},
        )
    ]  # fmt: skip
    assert len(set(specs)) == len(specs)
    assert specs[0] != {"a": "i4", "b": "i4"}


def test_a_repr_reads_like_the_declaration() -> None:
    spec = Spec({"obs": {"pixels": ("uint8", (84, 84, 4))}, "steps": ("f4", (UpTo(20), 2)), "at": "M8[s]"})
    told = "Spec({'obs': {'pixels': ('uint8', (84, 84, 4))}, 'steps': ('float32', (UpTo(20), 2)), 'at': '<M8[s]'})"
    assert repr(spec) == told
    assert eval(told) == spec
    assert spec.describe().splitlines() == [
        "    obs.pixels  uint8 (84, 84, 4)",
        "    steps       float32 (up to 20, 2)",
        "    at          <M8[s] ()",
    ]
    assert repr(Spec({"r": RECORD})) == f"Spec({{'r': np.dtype({RECORD.descr!r})}})"
    for dtype in (np.dtype((np.record, RECORD)), np.dtype([("n", np.dtype((np.record, RECORD)))])):
        spec = Spec({"r": (dtype, 2)})
        assert eval(repr(spec)) == spec


class Custom:
    """No dtype."""


REFUSED: list[tuple[Any, Any, str]] = [
    ({}, ValueError, "spec is empty"), ({"a": {}}, ValueError, "field 'a' is empty"),
    (None, TypeError, "spec=None must be a mapping"), ([("a", "i4")], TypeError, "must be a mapping"),
    ("i4", TypeError, "must be a mapping"), (np.dtype("i4"), TypeError, "no structured dtype"),
    (np.zeros(3), TypeError, "spec_like"), ({1: "i4"}, TypeError, "field name 1"),
    ({"a": {b"x": "i4"}}, TypeError, "field 'a' has the field name b'x'"), ({"": "i4"}, ValueError, "field name ''"),
    ({"a\n": "i4"}, ValueError, r"'a\\n'"), ({"a\x1b[2J": "i4"}, ValueError, "printable"),
    ({"\ud800": "i4"}, ValueError, "printable"), ({"a": "O"}, TypeError, "field 'a' .* objects"),
    ({"a": Custom}, TypeError, "field 'a' .* objects"),
    ({"a": {"b": np.dtype([("x", "O")])}}, TypeError, "field 'a.b' .* objects"),
    ({"a": np.dtype("i4", metadata={"b": 1})}, TypeError, "field 'a' .* metadata"),
    ({"a": "U"}, ValueError, "field 'a' .* without a width"),
    ({"a": bytes}, ValueError, "field 'a' .* without a width"),
    ({"a": "V0"}, ValueError, "field 'a' .* without a width"),
    ({"a": np.datetime64}, (ValueError, TypeError), "field 'a' .*unit"),
    ({"a": "nonsense"}, TypeError, "field 'a' has 'nonsense'"), ({"a": None}, TypeError, "field 'a' has None"),
    ({"a": 3}, TypeError, "field 'a' has 3"), ({"a": np.zeros(3)}, TypeError, "spec_like"),
    ({"a": np.float32(3)}, TypeError, "spec_like"), ({"a": ("i4", 1, 2)}, TypeError, r"field 'a' is \('i4', 1, 2\)"),
    ({"a": ("i4", "3")}, TypeError, "field 'a' has shape '3'"),
    ({"a": ("i4", 1.5)}, TypeError, "field 'a' has shape 1.5"),
    ({"a": ("i4", True)}, TypeError, "field 'a' has shape True"),
    ({"a": ("i4", None)}, TypeError, "field 'a' has shape None"),
    ({"a": ("i4", (2, -1))}, ValueError, r"field 'a' has shape \(2, -1\)"),
    ({"a": ("i4", (2, UpTo(3)))}, ValueError, "field 'a' .* first"),
    ({"a": ("i4", (UpTo(2), UpTo(3)))}, ValueError, "field 'a' .* first"),
    ({"a": ("i4", (1,) * 32)}, ValueError, "field 'a' has 32 dimensions"),
    ({"a": ("i4", (0, 5))}, ValueError, "holds no bytes"),
    ({"a": ("i1", 1 << 47)}, ValueError, "field 'a' is too large"),
    ({"a": ("i1", 1 << 90)}, ValueError, "field 'a' is too large"),
    ({"a": ("i1", (0, 1 << 90)), "b": "i1"}, ValueError, "field 'a' is too large"),
    ({"a": ("i1", 1 << 46), "b": ("i1", 1 << 46)}, ValueError, "field 'a'"),
    ({f"f{i}": ("i1", UpTo(2)) for i in range(MAX_UP_TO + 1)}, ValueError, f"field 'f{MAX_UP_TO}'"),
]  # fmt: skip


@pytest.mark.parametrize(("declaration", "error", "told"), REFUSED)
def test_a_bad_declaration_is_refused_with_a_word(declaration: Any, error: Any, told: str) -> None:
    with pytest.raises(error, match=told):
        Spec(declaration)


def test_nesting_is_bounded() -> None:
    declaration: Any = "i4"
    for _ in range(33):
        declaration = {"a": declaration}
    with pytest.raises(ValueError, match="nests deeper"):
        Spec(declaration)
    with pytest.raises(ValueError, match="nests deeper"):
        spec_like(declaration)
    assert Spec(declaration["a"]).slot_size == 4


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)])
def test_up_to_takes_a_positive_int(n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="UpTo"):
        UpTo(n)
    assert (UpTo(3), hash(UpTo(3)), repr(UpTo(3))) == (UpTo(np.int64(3)), hash(UpTo(3)), "UpTo(3)")


# --- texts

FIELD = '[["a","<i4",[3],false]]'
HOSTILE = [
    "", "null", "1", "[]", "{}", '"a"', "[[]]", '[["a"]]', '[["a","<i4"]]', "[" * 100_000, '[["a",' * 5000, FIELD + " ",
    FIELD.replace("a", "a\\n"), FIELD.replace("<i4", "|O"), FIELD.replace("<i4", "O"), FIELD.replace("<i4", "i4"),
    FIELD.replace("<i4", "i4,i4"), FIELD.replace("<i4", "a5"), FIELD.replace("<i4", "(" * 5000),
    FIELD.replace("<i4", "[('x', __import__('os').abort())]"), FIELD.replace("<i4", "{'names':[]}"),
    FIELD.replace("<i4", "{'names': ['x'], 'formats': ['<i4'], 'offsets': [4611686018427387904]}"),
    FIELD.replace("3", "-3"), FIELD.replace("3", "3.0"), FIELD.replace("3", "NaN"), FIELD.replace("3", "true"),
    FIELD.replace("3", "9" * 500_000), FIELD.replace("3", "1e999"), FIELD.replace("3", "140737488355328"),
    FIELD.replace("[3]", "3"), FIELD.replace("false", "0"), FIELD.replace("false", "null"),
    FIELD.replace("[3]", "[]").replace("false", "true"), FIELD.replace("[3]", "[0]").replace("false", "true"),
    '[["a","<i4",[3],false],["a","<i4",[3],false]]', '[["a",[["b",[]]]]]', "x" * (2 << 20), "\ud800", "[" + "1," * 9999,
    '[["a","<U",[],false]]', '[["a","|V0",[],false]]', '[["a",{"b":1},[],false]]', '[[1,"<i4",[],false]]',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_text_that_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no spec"):
        Spec.from_text(text)


@settings(max_examples=100)
@given(st.data())
def test_a_damaged_text_is_refused_or_another_spec(data: st.DataObject) -> None:
    text = Spec({"a": {"b": ("U5", (2, 3))}, "c": (RECORD, UpTo(3)), "d": ">f4"}).to_text()
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from(["", "0", "9", '"', "[", "]", ",", "<", "-", "O"])) + text[at + 1 :]
    try:
        assert Spec.from_text(damaged).to_text() == damaged
    except ValueError as error:
        assert "is no spec" in str(error)


def test_a_text_is_json() -> None:
    assert json.loads(Spec({"a": ("f4", 3), "b": {"c": ("i1", UpTo(2))}}).to_text()) == [
        ["a", "<f4", [3], False],
        ["b", [["c", "|i1", [2], True]]],
    ]


# --- messages


@st.composite
def declared_messages(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A declaration, and a message for it as arrays with whatever strides."""
    dtypes = st.one_of(
        npst.boolean_dtypes(), npst.integer_dtypes(endianness="?"), npst.unsigned_integer_dtypes(endianness="?"),
        npst.floating_dtypes(endianness="?"), npst.complex_number_dtypes(endianness="?"),
        npst.datetime64_dtypes(endianness="?"), npst.timedelta64_dtypes(endianness="?"),
        npst.byte_string_dtypes(min_len=1, max_len=4), npst.unicode_string_dtypes(min_len=1, max_len=4),
        st.just(RECORD), st.just(np.dtype("V5")),
    )  # fmt: skip
    shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    declaration: dict[str, Any] = {"byte": "u1"}
    message: dict[str, Any] = {"byte": np.uint8(7)}
    for name in ["a", "b", "c"][: draw(st.integers(1, 3))]:
        dtype, shape = draw(dtypes), draw(shapes)
        raw = draw(st.binary(min_size=1, max_size=8)) * (math.prod(shape) * dtype.itemsize + 1)
        array = np.ndarray(shape, dtype, bytearray(raw)) if math.prod(shape) else np.zeros(shape, dtype)
        if dtype.kind == "b":
            array = np.asarray(array.view(np.uint8) > 100)
        if dtype.kind == "U":  # any bytes are no code points
            array = np.full(shape, draw(st.text("ab\u20ac", max_size=dtype.itemsize // 4)), dtype)
        form = draw(st.sampled_from(["C", "F", "stepped", "reversed", "read-only"]))
        if form == "F":
            array = np.asfortranarray(array).reshape(shape)
        elif form == "stepped" and shape:
            array = np.repeat(array, 2, axis=0)[::2]
        elif form == "reversed" and shape:
            array = array[::-1].copy()[::-1]
        elif form == "read-only":
            array.flags.writeable = False
        up_to = shape and shape[0] and draw(st.booleans())
        declared: Any = (UpTo(shape[0] + draw(st.integers(0, 3))), *shape[1:]) if up_to else shape
        target, values = (declaration, message) if draw(st.booleans()) else ({}, {})
        target[name], values[name] = (dtype, declared), array
        if target is not declaration:
            declaration[f"in {name}"], message[f"in {name}"] = target, values
    return declaration, message


@settings(max_examples=150)
@given(declared_messages())
def test_a_message_arrives_as_it_was_sent(declared: tuple[dict[str, Any], dict[str, Any]]) -> None:
    declaration, message = declared
    slots = Slots(Spec(declaration))
    before = bytes(slots.memory)
    slots.put(message)
    assert slots.memory[FIRST : slots.offset(1)] == before[FIRST : slots.offset(1)]
    assert slots.memory[slots.offset(2) :] == before[slots.offset(2) :]
    arrived = slots.get()
    slots.memory[FIRST:] = bytes(len(slots.memory) - FIRST)  # what is decoded is owned

    def compare(got: Any, sent: Any) -> None:
        if isinstance(sent, dict):
            assert list(got) == list(sent)
            for name in sent:
                compare(got[name], sent[name])
        elif sent.shape:
            same(got, np.array(sent, order="C"))
            assert got.flags.writeable
        else:
            assert isinstance(got, np.generic)
            assert np.array(got, sent.dtype).tobytes() == np.array(sent).tobytes()

    compare(arrived, message)


SCALARS: list[tuple[str, Any, Any]] = [
    ("i1", -128, np.int8(-128)), ("u8", 2**64 - 1, np.uint64(2**64 - 1)), ("i8", True, np.int64(1)),
    ("i4", np.uint8(200), np.int32(200)), ("i4", np.int64(-5), np.int32(-5)), ("u1", np.array(255), np.uint8(255)),
    ("f4", 1, np.float32(1)), ("f4", 0.1, np.float32(0.1)), ("f4", np.float64(0.1), np.float32(0.1)),
    ("f4", float("inf"), np.float32("inf")), ("f4", float("nan"), np.float32("nan")),
    ("f4", 2**100, np.float32(2**100)), ("f8", 2**70, np.float64(2**70)), ("f2", np.int64(3), np.float16(3)),
    ("c8", 1 + 2j, np.complex64(1 + 2j)), ("c16", 3, np.complex128(3)), ("?", True, np.True_),
    ("?", np.False_, np.False_), ("U3", "abc", np.str_("abc")), ("U3", "", np.str_("")),
    ("U3", np.str_("é"), np.str_("é")), ("S3", b"ab", np.bytes_(b"ab")),
    ("M8[ns]", np.datetime64("2020-01-01", "D"), np.datetime64("2020-01-01", "ns")),
    ("M8[D]", np.datetime64("NaT", "s"), np.datetime64("NaT", "D")),
    ("m8[s]", np.timedelta64(1, "m"), np.timedelta64(60, "s")), (">i4", 5, np.int32(5)),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "given_value", "arrives"), SCALARS)
def test_a_scalar_arrives_as_a_numpy_scalar(dtype: str, given_value: Any, arrives: Any) -> None:
    got = through({"a": dtype}, {"a": given_value})["a"]
    assert type(got) is type(arrives)
    assert got.dtype == arrives.dtype
    assert got == arrives or (got != got and arrives != arrives)


def test_a_structured_scalar_arrives_owned() -> None:
    slots = Slots(Spec({"a": RECORD}))
    sent = np.array([(1.5, b"xy", (3, 4))], RECORD)[0]
    slots.put({"a": sent})
    got = slots.get()["a"]
    slots.memory[:] = bytes(len(slots.memory))
    assert isinstance(got, np.void)
    assert got.tolist()[:2] == (1.5, b"xy")
    assert got["at"].tolist() == [3, 4]


def test_a_field_of_records_arrives_as_such() -> None:
    dtype = np.dtype((np.record, RECORD))
    slots = Slots(Spec.from_text(Spec({"one": dtype, "three": (dtype, 3)}).to_text()))
    slots.put({"one": np.ones((), dtype), "three": np.ones(3, RECORD)})
    got = slots.get()
    assert got["one"].x == 1 and got["three"][2].x == 1
    assert [*slots.gather([1])["three"][0, 0].at] == [1, 1]


ARRAYS: list[tuple[Any, Any, Any]] = [
    (("f4", 2), [1, 2.5], np.array([1, 2.5], "f4")),
    (("u1", 2), [0, 255], np.array([0, 255], "u1")),
    (("f4", 2), np.array([1e30, 0.1]), np.array([1e30, 0.1], "f4")),
    (("i4", 2), np.array([True, False]), np.array([1, 0], "i4")),
    (("i4", UpTo(3)), [], np.zeros(0, "i4")),
    (("i4", UpTo(3)), np.zeros(0, "U5"), np.zeros(0, "i4")),
    (("U3", 2), ["a", "bcd"], np.array(["a", "bcd"])),
    (("U3", 1), np.array(["a"], "U9"), np.array(["a"], "U3")),
    (("M8[s]", 1), np.array(["2020-01-01T00"], "M8[h]"), np.array(["2020-01-01T00"], "M8[s]")),
    (("M8[h]", 1), np.array(["2020-01-01T01"], "M8[s]"), np.array(["2020-01-01T01"], "M8[h]")),
    (("f4", 2), np.array([1, 2], ">f4"), np.array([1, 2], "f4")),
]


@pytest.mark.parametrize(("declared", "given_value", "arrives"), ARRAYS)
def test_what_loses_nothing_is_converted(declared: Any, given_value: Any, arrives: Any) -> None:
    same(through({"a": declared}, {"a": given_value})["a"], arrives)


BAD: list[tuple[Any, Any, str]] = [
    ("i1", 128, "int 128"), ("i1", -129, "int -129"), ("u1", -1, "int -1"),
    ("u4", np.int64(2**32), "beyond 0 to 4294967295"), ("i8", 2**63, "beyond"),
    ("i8", 2**70, "object|does not convert"), ("i4", 1.0, "float 1.0"),
    ("i4", np.float32(1), "float32 does not convert to int32"), ("i4", "1", "str '1'"), ("i4", None, "NoneType None"),
    ("i4", [1], r"its shape is \(1,\)"), ("f4", np.zeros(1), r"float64 \(1,\).*its shape is \(1,\)"),
    ("f4", 1e300, "float 1e\\+300"), ("f4", -1e300, "float -1e"), ("f4", 10**400, "int 1000"),
    ("f4", np.float64(1e300), "overflow"), ("f2", np.int64(10**6), "overflow"),
    ("f4", 1j, "complex128 does not convert to float32"), ("?", 1, "int64 does not convert to bool"),
    ("?", 0.0, "float"), ("?", None, "None"), ("U3", "abcd", "str 'abcd': it would be cut"), ("U3", "ab\0", "NUL"),
    ("U3", b"abc", "does not convert"), ("U3", 3, "does not convert"), ("S3", "abc", "does not convert"),
    ("S3", b"abcd", "it would be cut"), ("S3", b"ab\0", "NUL"), (("S3", (2,)), [b"ab\0", b"abc"], "NUL"),
    (("U3", (1, 2)), [["ab", "a\0"]], "NUL"), ("M8[D]", np.datetime64("2020-01-01T01", "s"), "it would be cut"),
    ("M8[ns]", np.datetime64("9000-01-01", "D"), "it would be cut|[Oo]verflow"), ("M8[D]", 3, "does not convert"),
    ("M8[D]", np.timedelta64(1, "D"), "does not convert"), ("V4", b"abcd", "does not convert"),
    (RECORD, (1, b"x", (1, 2)), "makes no array"),
    (RECORD, np.zeros((), [("x", "f4"), ("other", "S3")]), "does not convert"),
    (("f4", (2, 3)), np.zeros((3, 2), "f4"), r"its shape is \(3, 2\)"),
    (("f4", (2, 3)), np.zeros((1, 2, 3), "f4"), "shape"), (("f4", (2, 3)), 0.0, "shape"),
    (("f4", (2, 3)), np.zeros((1, 3), "f4"), "shape"), (("u1", 3), [0, 256, 0], "beyond 0 to 255"),
    (("u1", 3), np.array([0, -1, 0]), "beyond 0 to 255"), (("u1", 3), np.zeros(3), "float64 does not convert to uint8"),
    (("f4", 2), [[1], [1, 2]], "makes no array"), (("f4", 2), {"x": 1}, "shape"),
    (("f4", 2), np.ma.masked_array([1, 2], [0, 1]), "mask"), (("U3", 2), ["a", "abcd"], "it would be cut"),
    (("f4", (UpTo(3), 2)), np.zeros((4, 2), "f4"), r"up to 3, 2.*its shape is \(4, 2\)"),
    (("f4", (UpTo(3), 2)), np.zeros((3, 1), "f4"), "shape"), (("f4", UpTo(3)), np.float32(1), "shape"),
]  # fmt: skip


@pytest.mark.parametrize(("declared", "value", "told"), BAD)
def test_what_does_not_fit_is_refused_and_nothing_is_written(declared: Any, value: Any, told: str) -> None:
    spec = Spec({"first": "i4", "in": {"x": declared}, "last": "i4"})
    slots = Slots(spec)
    before = bytes(slots.memory)
    with pytest.raises(SpecMismatch, match=rf"(?s)field 'in\.x' holds .*{told}"):
        slots.codec.encode({"first": 1, "in": {"x": value}, "last": 2})
    loan = loaned(spec, memoryview(slots.memory), slots.offset(0), "c")
    for name, given_value in (("in", {"x": value}), ("x", value)):
        with pytest.raises(SpecMismatch, match=rf"(?s)field 'in\.x' holds .*{told}"):
            (loan if name == "in" else loan["in"])[name] = given_value
    assert slots.memory == before


NAMES: list[tuple[Any, str]] = [
    ({}, "field 'first' is missing.*given was nothing"),
    ({"first": 1}, "field 'in' is missing: message holds 'first', 'in'; given was 'first'"),
    ({"first": 1, "in": {}}, r"field 'in\.x' is missing"),
    ({"first": 1, "in": {"x": 1}, "more": 2}, "message has no field 'more': it holds 'first', 'in'"),
    ({"first": 1, "in": {"x": 1, 3: 2}}, "field 'in' has no field 3: it holds 'x'"),
    ({"first": 1, "in": 5}, "field 'in' is a mapping of 'x', not int 5"),
    ({"first": 1, "in": [5]}, "field 'in' is a mapping"),
    ({"first": 1, "in.x": 5}, "field 'in' is missing"),
    (collections.defaultdict(int, {"first": 1}), "field 'in' is missing"),
    (np.zeros(3), r"message is a mapping of 'first', 'in', not ndarray of float64 \(3,\)"),
    (None, "message is a mapping"),
    ([1, {"x": 1}], "message is a mapping"),
    (b"first", "message is a mapping"),
]


@pytest.mark.parametrize(("message", "told"), NAMES)
def test_missing_and_unknown_fields_are_named(message: Any, told: str) -> None:
    slots = Slots(Spec({"first": "i4", "in": {"x": "i4"}}))
    with pytest.raises(SpecMismatch, match=told):
        slots.codec.encode(message)
    if isinstance(message, dict):
        assert "in" in message or len(message) < 3  # a defaultdict was not made to grow


def test_a_structured_value_is_a_message_and_a_batch() -> None:
    records = np.array([(1.5, b"xy", (3, 4)), (2.5, b"z", (5, 6))], RECORD)
    slots = Slots(Spec(RECORD))
    slots.put(records[1])
    assert {name: value.tolist() for name, value in slots.get().items()} == {"x": 2.5, "label": b"z", "at": [5, 6]}
    slots.scatter(records, [0, 1])
    assert slots.gather([0, 1])["at"].tolist() == records["at"].tolist()


def test_messages_of_another_kind_or_with_impossible_lengths_are_refused() -> None:
    slots = Slots(Spec({"a": ("i4", UpTo(4)), "b": "i4"}))
    slots.put({"a": [1, 2], "b": 3})
    meta = slots.metas[1]
    for wrong in (meta - 1, meta + 256, meta & 0xFF, 0):
        with pytest.raises(ValueError, match="not typed"):
            slots.codec.decode(slots.memory, slots.offset(1), wrong, DESCRIPTION + 200)
    for length in (5, 2**40, 2**64 - 1):
        slots.memory[DESCRIPTION + 200 : DESCRIPTION + 208] = length.to_bytes(8, sys.byteorder)
        with pytest.raises(ValueError, match=f"field 'a' .* length {length}"):
            slots.get()
    fixed = Slots(Spec({"b": "i4"}))
    fixed.put({"b": 1})
    with pytest.raises(ValueError, match="not typed"):
        fixed.codec.decode(fixed.memory, fixed.offset(1), meta, DESCRIPTION)


def test_a_message_counts_the_bytes_that_it_has() -> None:
    spec = Spec({"a": ("i4", (UpTo(4), 3)), "b": "i8"})
    codec = Slots(spec).codec
    assert [codec.encode({"a": np.zeros((n, 3), "i4"), "b": 0})[0] >> 16 for n in (0, 1, 4)] == [8, 20, 56]
    assert spec.nbytes == 56


def test_a_field_of_its_own_dtype_is_copied_once_straight_into_the_slot() -> None:
    spec = Spec({"a": ("f8", (100, 1000)), "b": ("f8", (100, 1000))})
    slots = Slots(spec)
    source = np.arange(100_000.0).reshape(1000, 100)
    other = np.ones((100, 2000))[:, ::2]
    _, row, _ = slots.codec.encode({"a": source.T, "b": other})
    source[0, 5] = -1  # nothing was copied yet
    row.write(slots.memory, slots.offset(2))
    assert np.ndarray((100, 1000), "f8", slots.memory, slots.offset(2))[5, 0] == -1


# --- into the caller's memory


def out_for(spec: Spec, n: int | None = None) -> dict[str, Any]:
    """Arrays for all fields, those of a batch for `n`."""
    rows = () if n is None else (n,)
    return spec.root.nest(iter([np.full(rows + f.shape, 1, f.dtype) for f in spec.fields]))


def test_a_message_lands_in_the_arrays_that_the_caller_has() -> None:
    slots = Slots(Spec({"obs": {"x": ("f4", (2, 3))}, "steps": ("i4", UpTo(4)), "reward": "f4", "r": RECORD}))
    sent = {"obs": {"x": np.arange(6).reshape(2, 3)}, "steps": [7, 8], "reward": 1.5, "r": np.zeros((), RECORD)}
    slots.put(sent)
    x, steps = np.zeros((3, 2), "f4").T, np.zeros(4, "i4")
    for more in ({}, {"reward": np.zeros((), "f4"), "r": np.ones((), RECORD)}):
        x[...], steps[...] = 0, 0
        got = slots.get(decode=slots.codec.into({"obs": {"x": x}, "steps": steps, **more}))
        assert got["obs"]["x"] is x
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert got["steps"].base is steps
        assert (got["steps"].tolist(), steps.tolist()) == ([7, 8], [7, 8, 0, 0])
        assert got["reward"] == 1.5
        assert got["r"] == np.zeros((), RECORD)
        if more:
            assert got["reward"] is more["reward"]


BAD_OUT: list[tuple[dict[str, Any], str]] = [
    ({"a": np.zeros((2, 2), "f4")}, "field 'a' holds float32 \\(2, 3\\), not ndarray of float32 \\(2, 2\\).*shape"),
    ({"a": np.zeros((2, 3), "f8")}, "field 'a' .* dtype float32"),
    ({"a": read_only(np.zeros((2, 3), "f4"))}, "field 'a' .* can be written"),
    ({"a": [[0.0] * 3] * 2}, "field 'a' .* out takes arrays"),
    ({"b": np.zeros((), "i4")}, "field 'b' .* dtype"),
    ({"b": 3}, "field 'b' .* arrays"),
    ({"c": np.zeros(3, "i4")}, "field 'c' .* shape"),
    ({"more": np.zeros(3)}, "no field 'more'"),
]


@pytest.mark.parametrize(("wrong", "told"), BAD_OUT)
def test_a_bad_out_is_refused(wrong: dict[str, Any], told: str) -> None:
    spec = Spec({"a": ("f4", (2, 3)), "b": "i8", "c": ("i4", UpTo(4))})
    codec = Slots(spec).codec
    with pytest.raises(SpecMismatch, match=told):
        codec.into({**out_for(spec), **wrong})
    stacked = {name: np.array([x] * 5) if isinstance(x, np.ndarray) else x for name, x in wrong.items()}
    for name, array in stacked.items():
        if name in wrong and isinstance(array, np.ndarray) and not wrong[name].flags.writeable:
            array.flags.writeable = False
    with pytest.raises(SpecMismatch, match=told.split(" ")[0]):
        codec.batch_arrays(5, {**out_for(spec, 5), **stacked})


def test_an_out_lacks_no_array() -> None:
    spec = Spec({"a": ("f4", 2), "b": "i8"})
    codec = Slots(spec).codec
    with pytest.raises(SpecMismatch, match=r"field 'a' .* no array"):
        codec.into({"b": np.zeros((), "i8")})
    with pytest.raises(SpecMismatch, match="field 'b' is missing"):
        codec.batch_arrays(2, {"a": np.zeros((2, 2), "f4")})
    with pytest.raises(SpecMismatch, match=r"field 'b' .* \(3 or more\)"):
        codec.batch_arrays(3, {"a": np.zeros((3, 2), "f4"), "b": np.zeros(2, "i8")})


# --- views


def test_a_loan_is_written_in_place() -> None:
    spec = Spec({"obs": {"x": ("u1", (4, 4)), "y": "f4"}, "reward": "f4", "steps": ("i4", (UpTo(5), 2)), "r": RECORD})
    slots = Slots(spec)
    loan = loaned(spec, memoryview(slots.memory)[slots.offset(1) :], 0, "c")
    assert list(loan) == ["obs", "reward", "steps", "r"]
    assert list(loan["obs"]) == ["x", "y"]
    x = loan["obs"]["x"]
    assert x is loan["obs"]["x"]
    assert x.shape == (4, 4)
    assert x.flags.writeable
    x[...] = 7
    assert slots.memory[slots.offset(1) : slots.offset(1) + 16] == b"\x07" * 16
    loan["obs"]["y"][...] = 2.5
    loan["reward"] = 1
    loan["steps"][:3] = [[1, 2], [3, 4], [5, 6]]
    loan.set_length("steps", 3)
    loan["r"]["label"] = b"abc"
    steps = loan["steps"]
    assert steps.shape == (5, 2)
    slots.describe(1, *loan.end())
    for array in (x, steps, loan["reward"], loan["r"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(ValueError, match="loan has ended"):
        loan["reward"] = 2
    with pytest.raises(ValueError, match="loan has ended"):
        loan.set_length("steps", 1)
    message = slots.get()
    assert message["obs"]["x"].tolist() == [[7] * 4] * 4
    assert (message["obs"]["y"], message["reward"], message["r"]["label"]) == (2.5, 1, b"abc")
    assert message["steps"].tolist() == [[1, 2], [3, 4], [5, 6]]


def test_assignment_sets_the_length_of_an_up_to_field_which_is_full_otherwise() -> None:
    spec = Spec({"in": {"a": ("i4", UpTo(5))}, "b": ("i4", UpTo(3))})
    slots = Slots(spec, fill=0)
    loan = loaned(spec, memoryview(slots.memory), slots.offset(1), "c")
    loan["in"] = {"a": [1, 2]}
    slots.describe(1, *loan.end())
    assert {name: value.tolist() for name, value in slots.get()["in"].items()} == {"a": [1, 2]}
    assert slots.get()["b"].tolist() == [0, 0, 0]


def test_a_loan_refuses_unknown_names_and_lengths() -> None:
    spec = Spec({"a": ("i4", UpTo(5)), "b": {"c": "i4"}})
    loan = loaned(spec, bytearray(spec.slot_size), 0, "c")
    for call, told in (
        (lambda: loan["x"], "message has no field 'x': it holds 'a', 'b'"),
        (lambda: loan["b"]["a"], "field 'b' has no field 'a'"),
        (lambda: loan.__setitem__("x", 1), "no field 'x'"),
        (lambda: loan["b"].__setitem__("x", 1), "no field 'x'"),
        (lambda: loan.__setitem__("b", {}), r"field 'b\.c' is missing"),
        (lambda: loan.set_length("a", 6), "field 'a' .* length 6"),
        (lambda: loan.set_length("a", -1), "field 'a' .* length -1"),
        (lambda: loan.set_length("b", 1), "field 'b' has no UpTo"),
        (lambda: loan["b"].set_length("c", 1), r"field 'b\.c' has no UpTo"),
    ):
        with pytest.raises(SpecMismatch, match=told):
            call()  # type: ignore[no-untyped-call]


def test_a_borrow_gives_read_only_views_cut_to_their_length() -> None:
    spec = Spec(
        {"obs": {"x": ("u1", (4, 4))}, "steps": ("i4", UpTo(5)), "reward": "f4", "r": RECORD, "rs": (RECORD, 2)}
    )
    slots = Slots(spec)
    slots.put({"obs": {"x": np.ones((4, 4), "u1")}, "steps": [1, 2, 3], "reward": 1.5, "r": np.zeros((), RECORD),
               "rs": np.zeros(2, RECORD)})  # fmt: skip
    base = np.frombuffer(memoryview(slots.memory)[slots.offset(1) :], "u1")
    message = borrowed(spec, base, 0, slots.lengths([1])[0])
    assert message["steps"].tolist() == [1, 2, 3]
    assert isinstance(message["reward"], np.float32)
    for array in (message["obs"]["x"], message["steps"], message["rs"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        assert np.shares_memory(array, base)
    slots.memory[slots.offset(1) : slots.offset(2)] = b"\x02" * slots.stride
    assert message["obs"]["x"].tolist() == [[2] * 4] * 4
    assert message["reward"] == 1.5  # scalars are copies
    assert message["r"] == np.zeros((), RECORD)


def test_views_keep_their_base_alive() -> None:
    spec = Spec({"a": ("u1", (4, 4)), "in": {"b": ("i4", UpTo(5))}, "c": "f4", "r": RECORD})
    memory = bytearray(spec.slot_size)
    for look in (
        lambda m: m["a"],
        lambda m: m["a"].reshape(2, 8)[1:].T,
        lambda m: memoryview(m["a"]),
        lambda m: m["in"]["b"],
    ):
        for views in (lambda base: borrowed(spec, base, 0, [3]), lambda base: loaned(spec, base, 0, "c")):
            base = np.frombuffer(memory, "u1")
            alive = weakref.ref(base)
            kept = look(views(base))  # type: ignore[no-untyped-call]
            del base
            assert alive() is not None
            del kept
            assert alive() is None
    base = np.frombuffer(memory, "u1")
    alive = weakref.ref(base)
    message = borrowed(spec, base, 0, [3])
    scalars = message["c"], message["r"]
    del base, message
    assert alive() is None
    assert scalars[0] == 0


# --- batches

BATCHED = Spec({"obs": {"x": ("f4", (2, 3)), "tag": "U3"}, "steps": ("i2", (UpTo(4), 2)), "n": "i8", "r": (RECORD, 2)})


def message_of(n: int) -> dict[str, Any]:
    """A message that differs from others in each field."""
    return {
        "obs": {"x": np.arange(6, dtype="f4").reshape(2, 3) + n, "tag": str(n)},
        "steps": np.full((n % 5, 2), n, "i2"),
        "n": n,
        "r": np.full(2, np.array((n, b"r", (n, n)), RECORD)),
    }


def padded(array: Any) -> Any:
    return np.concatenate([array, np.zeros((4 - len(array), 2), array.dtype)])


SLOT_LISTS = [[0], [3], [0, 1, 2, 3], [2, 3, 4, 7, 0, 1], [7, 6, 5], [0, 2, 4, 6], list(range(8)), []]


@pytest.mark.parametrize("slots", SLOT_LISTS)
@pytest.mark.parametrize("form", ["new", "out", "strided out"])
def test_gathering_stacks_what_each_slot_holds(slots: list[int], form: str) -> None:
    ring = Slots(BATCHED, capacity=8)
    for slot in range(8):
        ring.put(message_of(slot), slot)
    out = None if form == "new" else out_for(BATCHED, len(slots) + (form == "strided out"))
    if form == "strided out":
        assert out is not None
        out["obs"]["x"] = np.ones((2, 3, 2 * len(slots) + 4), "f4").transpose(2, 0, 1)[::2]
    batch = ring.gather(slots, out)
    messages = [message_of(slot) for slot in slots]
    same(batch["obs"]["x"].copy(), np.array([m["obs"]["x"] for m in messages], "f4").reshape(-1, 2, 3))
    same(batch["obs"]["tag"].copy(), np.array([m["obs"]["tag"] for m in messages], "U3"))
    same(batch["n"].copy(), np.array([m["n"] for m in messages], "i8"))
    same(batch["r"].copy(), np.array([m["r"] for m in messages], RECORD).reshape(-1, 2))
    same(batch["steps"].copy(), np.array([padded(m["steps"]) for m in messages], "i2").reshape(-1, 4, 2))
    assert list(batch.lengths) == ["steps"]
    assert batch.lengths["steps"].tolist() == [slot % 5 for slot in slots]
    if out is not None and slots:
        assert np.shares_memory(batch["n"], out["n"])
        assert np.shares_memory(batch["obs"]["x"], out["obs"]["x"])
    if form == "strided out":
        assert out is not None
        assert out["n"][len(slots)] == 1


@pytest.mark.parametrize("slots", SLOT_LISTS)
def test_scattering_a_batch_is_the_mirror_of_gathering_it(slots: list[int]) -> None:
    source, target = Slots(BATCHED, capacity=8), Slots(BATCHED, capacity=8)
    for slot in range(8):
        source.put(message_of(slot), slot)
    batch = source.gather(slots)
    target.scatter(pickle.loads(pickle.dumps(batch)), slots)
    for slot in slots:
        same(target.get(slot), source.get(slot))


def test_a_batch_without_lengths_has_the_length_of_its_array() -> None:
    spec = Spec({"a": ("i4", UpTo(5)), "b": "f4"})
    slots = Slots(spec)
    slots.scatter({"a": np.arange(6).reshape(2, 3), "b": [1, 2]}, [1, 2])
    assert [slots.get(slot)["a"].tolist() for slot in (1, 2)] == [[0, 1, 2], [3, 4, 5]]
    batch = slots.gather([2, 1])
    assert batch["a"].tolist() == [[3, 4, 5, 0, 0], [0, 1, 2, 0, 0]]
    assert batch["b"].tolist() == [2, 1]


BAD_BATCHES: list[tuple[Any, str]] = [
    ({"b": np.zeros(3)}, "field 'b' .* 3 messages, the fields before it have 2"),
    ({"a": np.zeros((2, 6), "i4")}, r"field 'a' .* shape is \(2, 6\)"),
    ({"a": np.int32(1)}, "field 'a' .* shape"),
    ({"b": 1.0}, "field 'b' .* shape"),
    ({"a": np.full((2, 3), 2**40)}, "field 'a' .* beyond"),
    ({"a": np.zeros((2, 3))}, "field 'a' .* does not convert"),
    ({"c": 1}, "no field 'c'"),
    (Batch({}, {"b": [1, 1]}), "lengths are given for field 'b'"),
    (Batch({}, {"a": [1]}), "lengths of field 'a'"),
    (Batch({}, {"a": [1, 4]}), "lengths of field 'a' run from 1 to 4: its array has 3 steps"),
    (Batch({}, {"a": [-1, 3]}), "lengths of field 'a'"),
    (Batch({}, {"a": [1.0, 3.0]}), "lengths of field 'a'"),
    (Batch({}, {"x": [1, 3]}), "no field 'x'"),
]


@pytest.mark.parametrize(("wrong", "told"), BAD_BATCHES)
def test_a_bad_batch_is_refused(wrong: Any, told: str) -> None:
    slots = Slots(Spec({"a": ("i4", UpTo(5)), "b": "f4"}))
    before = bytes(slots.memory)
    batch = Batch({"a": np.zeros((2, 3), "i4"), "b": np.zeros(2, "f4"), **wrong}, getattr(wrong, "lengths", None))
    with pytest.raises(SpecMismatch, match=told):
        slots.codec.encode_batch(batch)
    with pytest.raises(SpecMismatch, match="field 'b' is missing"):
        slots.codec.encode_batch({"a": np.zeros((2, 3), "i4")})
    assert slots.memory == before


def test_large_arrays_of_a_batch_start_on_a_cache_line() -> None:
    codec = Slots(Spec(ATARI), capacity=1).codec
    for array in [codec.batch_arrays(n)[0] for n in (8, 31, 32, 33)]:
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable


# --- specs of examples

EXAMPLES: list[tuple[Any, Any]] = [
    ({"obs": np.zeros((2, 3), "u1"), "a": np.int32(1)}, {"obs": ("u1", (2, 3)), "a": "i4"}),
    ({"a": 1, "b": 1.0, "c": True, "d": 1j}, {"a": "i8", "b": "f8", "c": "?", "d": "c16"}),
    ({"a": [1.0, 2.0], "b": [[True]], "c": (1, 2, 3)}, {"a": ("f8", 2), "b": ("?", (1, 1)), "c": ("i8", 3)}),
    ({"a": ("f4", (2, 3)), "b": np.float32, "c": np.dtype("U5")}, {"a": ("f4", (2, 3)), "b": "f4", "c": "U5"}),
    ({"a": ("f4", (UpTo(3), 2)), "b": (np.float32, 2)}, {"a": ("f4", (UpTo(3), 2)), "b": ("f4", 2)}),
    ({"a": {"b": np.zeros(3), "c": {"d": 1}}}, {"a": {"b": ("f8", 3), "c": {"d": "i8"}}}),
    ({"a": np.array(["x", "yz"]), "t": np.datetime64("2020", "s")}, {"a": ("U2", 2), "t": "M8[s]"}),
    (RECORD, RECORD),
    (np.zeros(3, "f4"), {"value": ("f4", 3)}),
    (Spec({"a": "i4"}), {"a": "i4"}),
    ({"a": Spec({"b": "i4"})}, {"a": {"b": "i4"}}),
]


@pytest.mark.parametrize(("example", "declaration"), EXAMPLES)
def test_a_spec_is_like_its_example(example: Any, declaration: Any) -> None:
    assert spec_like(example) == Spec(declaration)


BAD_EXAMPLES: list[tuple[Any, type[Exception], str]] = [
    ({"a": "text"}, TypeError, "field 'a' is 'text', which says no width"),
    ({"a": b"text"}, TypeError, "field 'a' .* width"),
    ({"a": {"b": None}}, TypeError, r"field 'a\.b' is NoneType None"),
    ({"a": np.zeros(2, object)}, TypeError, "field 'a' is ndarray of"),
    ({"a": [[1], [1, 2]]}, TypeError, "field 'a' .* no array"), ({"a": object()}, TypeError, "field 'a'"),
    ({"a": []}, ValueError, "no bytes"), ({}, ValueError, "empty"), ({1: 2}, TypeError, "names are strings"),
    (object(), TypeError, "example is"),
]  # fmt: skip


@pytest.mark.parametrize(("example", "error", "told"), BAD_EXAMPLES)
def test_an_example_without_a_fixed_size_is_refused(example: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        spec_like(example)


def test_samples_of_gymnasium_spaces_fit_their_specs() -> None:
    spaces = pytest.importorskip("gymnasium").spaces
    table = [
        (spaces.Box(0, 255, (4, 3), np.uint8), {"value": ("u1", (4, 3))}),
        (spaces.Box(-1, 1, (), np.float64), {"value": "f8"}),
        (spaces.Discrete(5), {"value": "i8"}),
        (spaces.MultiBinary((2, 3)), {"value": ("i1", (2, 3))}),
        (spaces.MultiDiscrete([3, 4]), {"value": ("i8", 2)}),
        (spaces.Dict({"b": spaces.Discrete(3), "a": spaces.Dict({"x": spaces.Box(0, 1, (2,))})}),
         {"a": {"x": ("f4", 2)}, "b": "i8"}),
        (spaces.Tuple([spaces.Discrete(3), spaces.Tuple([spaces.Box(0, 1, (2,)), spaces.MultiBinary(2)])]),
         {"0": "i8", "1": {"0": ("f4", 2), "1": ("i1", 2)}}),
        ({"obs": spaces.Box(0, 1, (2,)), "action": spaces.Discrete(3), "reward": np.float32, "done": False},
         {"obs": ("f4", 2), "action": "i8", "reward": "f4", "done": "?"}),
    ]  # fmt: skip
    for space, declaration in table:
        spec = spec_like(space)
        if isinstance(space, spaces.Dict):  # it keeps an order of its own
            declaration = {name: declaration[name] for name in space.spaces}
        assert spec == Spec(declaration)
        slots = Slots(spec)
        for _ in range(3):
            if isinstance(space, dict):
                sampled = {name: space[name].sample() for name in ("obs", "action")}
                sample: Any = {**sampled, "reward": 1, "done": True}
            else:
                sample = space.sample()
            slots.put({"value": sample} if "value" in declaration else sample)
            got = slots.get()
            if "value" in declaration:
                assert np.array_equal(got["value"], sample)
    for space in (spaces.Text(3), spaces.Sequence(spaces.Discrete(3)), spaces.Graph(spaces.Discrete(3), None)):
        with pytest.raises(TypeError, match=r"field 'a\.0' is a .* no fixed size"):
            spec_like({"a": spaces.Tuple([space])})


def test_thousands_of_fields_are_no_trouble() -> None:
    spec = Spec({f"layer{i}": ("f4", 1) for i in range(3000)})
    assert Spec.from_text(spec.to_text()) == spec
    assert len(through(spec, {f"layer{i}": [i] for i in range(3000)})) == 3000
