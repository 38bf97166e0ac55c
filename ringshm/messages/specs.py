"""Specs: the fields that a typed channel's messages have. They know dtypes, shapes and bytes, and no channel.

A spec is a tree of named fields. In a slot each field has its own place, aligned to 64 bytes, in the order given:

    obs      |############|......|      (84, 84, 4) bytes, then a gap
    action   |########|..........|      8 bytes, then a gap
    reward   |####|                     the last one ends the slot

No byte of a slot says what is in it. The spec says so; its text is recorded once, where the channel is made. Only the
lengths of UpTo dimensions travel with a message, as native 8-byte words in its description.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import itertools
import json
import math
import operator
import reprlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeAlias

import numpy as np

from ..annotations import M
from ..errors import SpecMismatch, check_fails_again
from ..segment.layout import DESCRIPTION_NBYTES
from .buffers import aligned
from .codecs import TYPED
from .dtypes import RECORD, describe_dtype, dtype_name, parse_dtype
from .fields import Converter, Field, UpTo, shown_value

#: UpTo fields of a spec: their lengths, 8 bytes each, have to fit into a description.
MAX_UP_TO = DESCRIPTION_NBYTES // 8
#: Dimensions of a field: NumPy 1's 32, less one for a batch.
MAX_NDIM = 31
MAX_DEPTH = 32
#: Bytes of a slot: meta keeps 48 bits for a length.
MAX_NBYTES = 1 << 47
#: Characters of a spec's text that is read.
MAX_TEXT = 1 << 20


class Node:
    """One mapping of names in a spec's tree: the spec itself, or a nested one."""

    __slots__ = ("entries", "flat", "path", "plan")

    def __init__(self, path: tuple[str, ...], entries: dict[str, Converter | Node]) -> None:
        self.path = path
        self.entries = entries
        self.flat = all(isinstance(entry, Converter) for entry in entries.values())
        #: one tuple for each entry, with all that `collect` looks at
        self.plan: list[tuple[str, Any, Any, frozenset[type], Any]] = [
            (name, entry.dtype, entry.exact_shape, entry.classes, entry.convert)
            if isinstance(entry, Converter)
            else (name, None, None, frozenset(), entry)
            for name, entry in entries.items()
        ]

    def where(self) -> str:
        """Its name in errors."""
        return f"field {'.'.join(self.path)!r}" if self.path else "message"

    def collect(self, message: Any, values: list[Any]) -> None:
        """Append a message's value for each field, in their order, checked and ready to be stored."""
        if message.__class__ is not dict:
            message = self.as_dict(message)
        try:
            for name, dtype, shape, classes, below in self.plan:
                value = message[name]
                kind = value.__class__
                if kind in classes or (kind is np.ndarray and value.dtype is dtype and value.shape == shape):
                    values.append(value)
                elif dtype is None:
                    below.collect(value, values)
                else:
                    values.append(below(value))
        except KeyError:
            self.check_names(message)
            raise
        if len(message) != len(self.plan):
            self.check_names(message)

    def as_dict(self, message: Any) -> dict[str, Any]:
        """A message as a dict: it may be a mapping, a structured value, or a tuple for fields "0", "1", …"""
        if isinstance(message, Mapping):
            return dict(message)
        if isinstance(message, (np.void, np.ndarray)) and message.dtype.names is not None:
            return {name: message[name] for name in message.dtype.names}
        if isinstance(message, (tuple, list)) and [*self.entries] == [*map(str, range(len(message)))]:
            return dict(zip(self.entries, message, strict=True))
        raise SpecMismatch(f"{self.where()} is a mapping of {self.names()}, not {shown_value(message)}")

    def names(self) -> str:
        """The names of its entries, for errors."""
        return ", ".join(map(repr, self.entries))

    def unknown(self, name: Any) -> str:
        """The text of the error for a name that is none of its entries'."""
        close = difflib.get_close_matches(name, self.entries, 1) if isinstance(name, str) else []
        meant = f", did you mean {close[0]!r}?" if close else ":"
        return f"{self.where()} has no field {reprlib.repr(name)}{meant} it holds {self.names()}"

    def check_names(self, message: Mapping[Any, Any], optional: bool = False) -> None:
        """Raise SpecMismatch if the message lacks one of the names (unless optional), or has another."""
        given = ", ".join(map(reprlib.repr, message)) or "nothing"
        others = [name for name in message if name not in self.entries]
        for name in self.entries:
            if name not in message and not optional:
                path = ".".join((*self.path, name))
                close = difflib.get_close_matches(name, [other for other in others if isinstance(other, str)], 1)
                meant = f"; did you mean it by {close[0]!r}?" if close else ""
                raise SpecMismatch(
                    f"field {path!r} is missing: {self.where()} holds {self.names()}; given was {given}{meant}"
                )
        for name in others:
            raise SpecMismatch(f"{self.unknown(name)}; given was {given}")

    def converters(self) -> Iterator[Converter]:
        """Those of all fields below, in their order."""
        for entry in self.entries.values():
            if isinstance(entry, Converter):
                yield entry
            else:
                yield from entry.converters()

    def nest(self, values: Iterator[Any]) -> dict[str, Any]:
        """Values in the fields' order, as nested dicts."""
        return {
            name: next(values) if isinstance(entry, Converter) else entry.nest(values)
            for name, entry in self.entries.items()
        }

    def flatten(self, message: Any, default: Any = None) -> list[Any]:
        """The values of nested mappings, in the fields' order; with a default, fields may be missing.

        Raises:
            SpecMismatch: names the field that is missing or unknown.
        """
        if message.__class__ is not dict:
            message = self.as_dict(message)
        if message.keys() != self.entries.keys():
            self.check_names(message, default is not None)
        if self.flat:
            return [*map(message.get, self.entries, itertools.repeat(default))]
        flat: list[Any] = []
        for name, entry in self.entries.items():
            if isinstance(entry, Node):
                flat += entry.flatten(message.get(name, {}), default)
            else:
                flat.append(message.get(name, default))
        return flat


class Spec(Generic[M]):
    """The fields that a typed channel's messages have, and where each lies in a slot. Immutable.

    `Spec[Step](…)` tells type checkers which TypedDict the messages are.

    >>> import numpy as np, ringshm
    >>> spec = ringshm.Spec({"obs": (np.uint8, (84, 84)), "info": {"reward": np.float32}})
    >>> spec.nbytes, [field.name for field in spec.fields]
    (7060, ['obs', 'info.reward'])

    Args:
        declaration: a mapping of field name to one of
            `(dtype, shape)`, with an int or a tuple of ints for the shape, the first of which may be an `UpTo(n)`;
            a dtype alone (`np.dtype`, a type, a string, or the list of a structured one), for a scalar;
            a mapping or a Spec, which nests.
            Or a structured `np.dtype`, whose fields become the spec's; or another Spec. A field whose own dtype is
            structured arrives as a structured array. A dimension may have length zero.

    Specs are equal if they have the same names, in the same order, and the same dtypes and shapes.

    Raises:
        TypeError, ValueError: name the field and what is wrong with it.

    Attributes:
        fields: all fields, nested ones too, in their order.
        slot_size: bytes that a slot needs.
        nbytes: bytes of all fields, UpTo dimensions at their longest, without the gaps between fields.
    """

    __slots__ = ("_fixed_nbytes", "_lengths", "_text", "converters", "fields", "nbytes", "root", "slot_size", "up_to")

    def __init__(self, declaration: SpecLike) -> None:
        if isinstance(declaration, Spec):
            declaration = declaration.declaration()
        elif isinstance(declaration, np.dtype):
            declaration = _fields_of_dtype(declaration)
        elif not isinstance(declaration, Mapping):
            raise TypeError(
                f"spec={declaration!r:.80} must be a mapping of name to (dtype, shape), or a structured np.dtype; "
                "ringshm.spec_like makes one from an example or a Gymnasium space"
            )
        fields: list[Field] = []
        self.root = _parse(declaration, (), fields)
        self.fields = tuple(fields)
        self.converters = [*self.root.converters()]
        self.slot_size = max(field.offset + field.nbytes for field in fields)
        self.nbytes = sum(field.nbytes for field in fields)
        if not self.nbytes:
            raise ValueError(f"spec {self!r} holds no bytes: give a field a shape without zeros")
        if self.slot_size >= MAX_NBYTES:
            largest = max(fields, key=lambda field: field.nbytes)
            raise ValueError(
                f"spec needs {self.slot_size} bytes a slot, {largest.nbytes} of them for field {largest.name!r}: "
                f"make it smaller, at most {MAX_NBYTES - 1} bytes are possible"
            )
        #: the UpTo fields; their lengths travel in this order
        self.up_to = tuple(field for field in fields if field.up_to)
        if len(self.up_to) > MAX_UP_TO:
            raise ValueError(
                f"spec has {len(self.up_to)} UpTo fields, and {MAX_UP_TO} are possible: give field "
                f"{self.up_to[MAX_UP_TO].name!r} and those behind it their full shape"
            )
        self._fixed_nbytes = self.nbytes - sum(field.nbytes for field in self.up_to)
        self._lengths = struct.Struct(f"={len(self.up_to)}Q")
        self._text = json.dumps(_to_lists(self.root), separators=(",", ":"))

    def declaration(self) -> dict[str, Any]:
        """The spec as nested dicts of `(dtype, shape)`."""
        return self.root.nest(
            (field.dtype, (UpTo(field.shape[0]), *field.shape[1:]) if field.up_to else field.shape)
            for field in self.fields
        )

    def to_text(self) -> str:
        """A text from which `from_text` makes an equal spec. Equal specs have the same text."""
        return self._text

    @classmethod
    def from_text(cls, text: str) -> Spec[M]:
        """The spec of a text that `to_text` gave. The text may come from anywhere: nothing in it is run as code.

        Args:
            text: of at most a million characters.

        Raises:
            ValueError: if the text is not exactly what `to_text` gives.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"text of {len(text)} characters is no spec")
        try:
            spec, sound = cls._read(text)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, Warning) as error:
            check_fails_again(partial(cls._read, text), error)
            raise ValueError(f"{text[:80]!r} is no spec: {error}") from None
        if not sound:
            raise ValueError(f"{text[:80]!r} is no spec as to_text gives it")
        return spec

    @classmethod
    def _read(cls, text: str) -> tuple[Spec[M], bool]:
        """The spec of a text, and whether the text is the one that it has."""
        spec = cls._of_json(json.loads(text, parse_int=_short_int))
        return spec, spec.to_text() == text

    @classmethod
    def _of_json(cls, value: Any) -> Spec[M]:
        """The spec of what was in a text. It may be wrong: then this raises anything that `from_text` expects."""
        return cls(_from_lists(value))

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Spec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_text, (self._text,)

    def __repr__(self) -> str:
        return f"Spec({_declared(self.declaration())})"

    def describe(self) -> str:
        """A line for each field, for errors."""
        width = max(len(field.name) for field in self.fields)
        return "\n".join(f"    {field.name:{width}}  {field.describe()}" for field in self.fields)

    # --- lengths

    def record(self, lengths: Sequence[int]) -> tuple[int, bytes]:
        """Meta and description of a message; for the codec.

        Args:
            lengths: of its UpTo fields, in their order.
        """
        nbytes = self._fixed_nbytes
        for field, length in zip(self.up_to, lengths, strict=True):
            nbytes += field.row_nbytes * length
        return nbytes << 16 | self._lengths.size << 8 | TYPED, self._lengths.pack(*lengths)

    def lengths(self, memory: Any, meta: int, description: int) -> tuple[int, ...]:
        """The lengths of the UpTo fields of a message; for the codec.

        Args:
            memory: what holds the message's description.
            meta: the message's meta.
            description: byte of `memory` at which its description lies.

        Raises:
            ValueError: if it is no message of this spec.
        """
        if meta & 0xFFFF != self._lengths.size << 8 | TYPED:
            raise ValueError(f"message of kind {meta & 0xFFFF:#x} is not typed")
        if not self.up_to:
            return ()
        lengths = self._lengths.unpack_from(memory, description)
        for field, length in zip(self.up_to, lengths, strict=True):
            if length > field.shape[0]:
                raise ValueError(
                    f"field {field.name!r} holds {field.describe()}, the message says it has length {length}"
                )
        return lengths


#: What declares a spec whose messages are plain dicts to a type checker.
Fields: TypeAlias = Mapping[str, Any] | np.dtype[Any]
#: What declares a spec.
SpecLike: TypeAlias = Spec[Any] | Fields


def as_spec(declaration: SpecLike) -> Spec[Any]:
    """The Spec itself, which never changes, or the one that is declared."""
    return declaration if isinstance(declaration, Spec) else Spec(declaration)


def _fields_of_dtype(dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.names is None or dtype.fields is None:
        raise TypeError(f"spec={dtype!r} is no structured dtype: give a mapping of name to (dtype, shape)")
    return {name: dtype.fields[name][0] for name in dtype.names}


def _parse(declaration: Mapping[Any, Any], path: tuple[str, ...], fields: list[Field]) -> Node:
    """The tree of a declaration. Its fields are appended to `fields`, each behind the last one."""
    where = f"field {'.'.join(path)!r}" if path else "spec"
    if not declaration:
        raise ValueError(f"{where} is empty: give at least one field")
    if len(path) >= MAX_DEPTH:
        raise ValueError(f"{where:.80} nests deeper than {MAX_DEPTH}")
    entries: dict[str, Converter | Node] = {}
    for name, value in declaration.items():
        if not isinstance(name, str):
            raise TypeError(f"{where} has the field name {name!r}: names are strings")
        if not name or not name.isprintable():
            raise ValueError(f"{where} has the field name {name!r}: names have at least one character, all printable")
        below = (*path, str(name))
        if isinstance(value, Spec):
            value = value.declaration()
        if isinstance(value, Mapping):
            entries[below[-1]] = _parse(value, below, fields)
        else:
            entries[below[-1]] = Converter(_parse_field(value, below, fields))
    return Node(path, entries)


def _parse_field(value: Any, path: tuple[str, ...], fields: list[Field]) -> Field:
    where = f"field {'.'.join(path)!r}"
    given, shape = value, ()
    if isinstance(value, tuple):
        if len(value) != 2:
            raise TypeError(f"{where} is {value!r:.80}: give (dtype, shape), a dtype, or a mapping")
        given, shape = value
    if not isinstance(given, (np.dtype, type, str, list)):
        raise TypeError(
            f"{where} has {given!r:.80} for a dtype: give (dtype, shape) or a dtype; ringshm.spec_like takes examples "
            "and Gymnasium spaces"
        )
    try:
        dtype = np.dtype(given)
    except (TypeError, ValueError, SyntaxError) as error:
        raise TypeError(f"{where} has {given!r:.80} for a dtype: {error}") from None
    inner: tuple[int, ...] = ()
    if dtype.subdtype is not None:
        dtype, inner = dtype.subdtype
    if dtype.hasobject:
        raise TypeError(f"{where} has dtype {dtype!r:.80}, which holds objects: give a dtype of fixed size")
    if dtype.metadata:
        raise TypeError(f"{where} has dtype {dtype!r:.80} with metadata, which would be lost: give a dtype without")
    if describe_dtype(dtype) is None:
        raise TypeError(f"{where} has dtype {dtype!r:.80}, which has no text for other processes: give a simpler one")
    if not dtype.itemsize:
        raise ValueError(f"{where} has dtype {dtype!r:.80} without a width: give one, as in 'U16' or 'S16'")
    if dtype.kind in "Mm" and "[" not in dtype.str:
        raise ValueError(f"{where} has dtype {dtype!r:.80} without a unit: give one, as in 'M8[ns]'")
    up_to, dimensions = _parse_shape(shape, where)
    dimensions += inner
    if len(dimensions) > MAX_NDIM:
        raise ValueError(f"{where} has {len(dimensions)} dimensions; at most {MAX_NDIM} are possible")
    nbytes = math.prod(dimensions) * dtype.itemsize
    # NumPy's own limit holds for the dimensions without zeros
    if math.prod(filter(None, dimensions)) * dtype.itemsize >= MAX_NBYTES:
        raise ValueError(f"{where} is too large with shape {dimensions}: at most {MAX_NBYTES - 1} bytes are possible")
    offset = aligned(fields[-1].offset + fields[-1].nbytes) if fields else 0
    field = Field(path, dtype, dimensions, up_to, offset, nbytes)
    fields.append(field)
    return field


def _parse_shape(shape: Any, where: str) -> tuple[bool, tuple[int, ...]]:
    """Whether the first dimension is UpTo, and all of them."""
    given = shape if isinstance(shape, (tuple, list)) else (shape,)
    up_to = bool(given) and isinstance(given[0], UpTo)
    dimensions: list[int] = []
    for dimension in (given[0].n, *given[1:]) if up_to else given:
        if isinstance(dimension, UpTo):
            raise ValueError(f"{where} has shape {shape!r}: only the first dimension may be UpTo")
        if isinstance(dimension, bool) or not hasattr(dimension, "__index__"):
            raise TypeError(f"{where} has shape {shape!r:.80}: give an int or a tuple of ints")
        dimensions.append(operator.index(dimension))
        if dimensions[-1] < 0:
            raise ValueError(f"{where} has shape {shape!r:.80}: give lengths of 0 or more")
    return up_to, tuple(dimensions)


def _to_lists(node: Node) -> list[Any]:
    return [
        [name, _to_lists(entry)]
        if isinstance(entry, Node)
        else [name, describe_dtype(entry.dtype), list(entry.field.shape), entry.field.up_to]
        for name, entry in node.entries.items()
    ]


def _from_lists(entries: Any) -> dict[str, Any]:
    """The declaration of the lists in a text. They may be wrong: then this raises anything, or Spec does later."""
    declaration: dict[str, Any] = {}
    for name, *entry in entries:
        if len(entry) == 1:
            declaration[name] = _from_lists(entry[0])
        else:
            dtype, shape, up_to = entry
            if dtype.startswith("ml_dtypes."):
                with contextlib.suppress(ImportError):
                    importlib.import_module("ml_dtypes")
            declaration[name] = (parse_dtype(dtype), (UpTo(shape[0]), *shape[1:]) if up_to else tuple(shape))
    return declaration


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"number of {len(digits)} digits")
    return int(digits)


def _declared(declaration: Mapping[str, Any]) -> str:
    items = []
    for name, entry in declaration.items():
        if isinstance(entry, Mapping):
            text = _declared(entry)
        else:
            dtype, shape = entry
            text = dtype_name(dtype)
            if text == dtype.name or dtype.names is None:
                text = repr(text)
            else:
                text = f"np.{dtype!r}".replace("numpy.record", "np.record") if RECORD in text else f"np.dtype({text})"
            text = f"({text}, {shape!r})" if shape else text
        items.append(f"{name!r}: {text}")
    return "{" + ", ".join(items) + "}"
