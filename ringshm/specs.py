"""Specs: what a typed channel's messages are. They know dtypes, shapes and bytes; no channel, no state of a slot.

A spec is a tree of named fields. In a slot each field has its own place, aligned to 64 bytes, in the order given:

    obs      |############|......|      (84, 84, 4) bytes, then a gap
    action   |########|..........|      8 bytes, then a gap
    reward   |####|                     the last one ends the slot

No byte of a slot says what is in it: the spec does, recorded once, as a text, where the channel is made. Only the
lengths of UpTo dimensions travel with a message, as native 8-byte words in the description of its record.

Nothing is lost silently: an integer has to be in its field's range, a string in its width, floats become no integers;
only floats may be rounded.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import operator
import reprlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .annotations import M
from .buffers import ALIGNMENT
from .codecs import TYPED, describe_dtype, parse_dtype
from .errors import SpecMismatch
from .layout import DESCRIPTION_NBYTES, WORD_SIZE, round_up
from .tensors import as_array

#: UpTo fields of a spec: their lengths have to fit into a record.
MAX_UP_TO = DESCRIPTION_NBYTES // WORD_SIZE
#: Dimensions of a field: NumPy 1's 32, less one for a batch.
MAX_NDIM = 31
MAX_DEPTH = 32
#: R_META keeps 48 bits for a length.
MAX_NBYTES = 1 << 47
#: Longest text of a spec that is read.
MAX_TEXT = 1 << 20

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class UpTo:
    """A first dimension of `n` or fewer: each message has its own length, which travels along.

    Args:
        n: the most, at least 1; memory is set aside for it in each slot.

    Raises:
        TypeError, ValueError: if it is no int, or less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not hasattr(self.n, "__index__"):
            raise TypeError(f"UpTo({self.n!r}) takes an int")
        object.__setattr__(self, "n", operator.index(self.n))
        if self.n < 1:
            raise ValueError(f"UpTo({self.n}) must be at least 1")

    def __repr__(self) -> str:
        return f"UpTo({self.n})"


@dataclass(frozen=True)
class Field:
    """One field of a spec.

    Attributes:
        path: the names that lead to it.
        dtype: of its items; never a subarray's, whose shape is part of `shape`.
        shape: with UpTo at its maximum.
        up_to: whether the first dimension is UpTo.
        offset: from the slot's start, in bytes; a multiple of 64.
        nbytes: with UpTo at its maximum.
    """

    path: tuple[str, ...]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    up_to: bool
    offset: int
    nbytes: int

    @property
    def name(self) -> str:
        """The path in messages: "obs.pixels"."""
        return ".".join(self.path)

    @property
    def row_nbytes(self) -> int:
        """What one step of the first dimension takes."""
        return self.nbytes // self.shape[0]

    def told(self) -> str:
        """What the field holds, in messages."""
        dimensions = [f"up to {self.shape[0]}", *self.shape[1:]] if self.up_to else [*self.shape]
        ending = "," if len(dimensions) == 1 else ""
        return f"{dtype_name(self.dtype)} ({', '.join(map(str, dimensions))}{ending})"


def dtype_name(dtype: np.dtype[Any]) -> str:
    """A dtype as messages name it."""
    if dtype.isbuiltin == 1 and dtype.kind in "biufc":
        return dtype.name
    return describe_dtype(dtype) or str(dtype)


# --- what a field takes

#: Kinds of dtype that may be given for a field of that kind.
_SOURCES = {"b": "b", "i": "biu", "u": "biu", "f": "biuf", "c": "biufc", "U": "U", "S": "S", "M": "M", "m": "m"}
_SCALARS = [t for kind in ("?", "bBhHiIlLqQ", "efdg", "FDG") for t in (np.dtype(code).type for code in kind)]


def _safe_classes(dtype: np.dtype[Any]) -> frozenset[type]:
    """Classes of scalars that can be stored as they are, whatever their value."""
    if dtype.kind not in "biufc":
        return frozenset()
    classes = {kind for kind in _SCALARS if np.can_cast(np.dtype(kind), dtype, "safe")}
    pairs: tuple[tuple[type, Any], ...] = ((bool, np.bool_), (float, np.float64), (complex, np.complex128))
    return frozenset(classes | {python for python, kind in pairs if kind in classes})


def told_value(value: Any) -> str:
    """What was given, in messages."""
    if isinstance(value, np.ndarray) or (isinstance(value, np.generic) and value.dtype.kind == "V"):
        return f"{type(value).__name__} of {dtype_name(value.dtype)} {value.shape}"
    return f"{type(value).__name__} {reprlib.repr(value)}"


class Fit:
    """What one field takes, and what becomes of it."""

    __slots__ = ("_high", "_limit", "_low", "_text", "_width", "classes", "dtype", "exact_shape", "field")

    def __init__(self, field: Field) -> None:
        self.field = field
        self.dtype = dtype = field.dtype
        scalar = not field.shape
        #: of arrays that need no further look; None if there are none
        self.exact_shape = None if field.up_to else field.shape
        self.classes = _safe_classes(dtype) if scalar else frozenset()
        # ranges in which Python's own numbers and strings can be stored as they are; empty where there is none
        self._low, self._high, self._limit, self._width = 1, 0, -1.0, -1
        self._text: type | None = None
        if scalar and dtype.kind in "iu":
            self._low, self._high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        elif scalar and dtype.kind == "f":
            self._limit = float(min(np.finfo(dtype).max, np.finfo(np.float64).max))
            self._low, self._high = -int(self._limit), int(self._limit)
        elif scalar and dtype.kind in "US":
            self._text = str if dtype.kind == "U" else bytes
            self._width = dtype.itemsize // (4 if dtype.kind == "U" else 1)

    def mismatch(self, value: Any, why: str) -> SpecMismatch:
        """The error for a value that the field does not take."""
        return SpecMismatch(f"field {self.field.name!r} holds {self.field.told()}, not {told_value(value)}: {why}")

    def fit(self, value: Any) -> Any:
        """A value as what can be stored in a slot's field.

        Raises:
            SpecMismatch: if it has another shape, or does not fit into the field's dtype.
        """
        kind = value.__class__
        if kind in self.classes or (kind is int and self._low <= value <= self._high):
            return value
        if kind is float and abs(value) <= self._limit:
            return value
        if kind is self._text and len(value) <= self._width and not _ends_with_nul(value):
            return value
        array = self._array(value)
        shape, field = array.shape, self.field
        if shape != field.shape and not self._is_shorter(shape):
            raise self.mismatch(value, f"its shape is {shape}")
        return self._cast(array, value)

    def fit_batch(self, value: Any, n: int | None) -> Array:
        """As `fit`, for `n` values stacked; None is any number of them."""
        array = self._array(value)
        shape, field = array.shape, self.field
        if not shape or (shape[1:] != field.shape and not self._is_shorter(shape[1:])):
            raise self.mismatch(value, f"a batch's shape is (n, *shape), its shape is {shape}")
        if n is not None and shape[0] != n:
            raise self.mismatch(value, f"it has {shape[0]} messages, the fields before it have {n}")
        return self._cast(array, value)

    def _is_shorter(self, shape: tuple[int, ...]) -> bool:
        own = self.field.shape
        return self.field.up_to and len(shape) == len(own) and shape[0] <= own[0] and shape[1:] == own[1:]

    def _array(self, value: Any) -> Array:
        if isinstance(value, np.ma.MaskedArray):
            raise self.mismatch(value, "its mask would be lost; give .filled(...)")
        if isinstance(value, np.ndarray):
            return value
        if (isinstance(value, (str, bytes)) or self.dtype.kind in "US") and _loses_nuls(value):
            raise self.mismatch(value, "NULs at its end would be lost")
        try:
            return as_array(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise self.mismatch(value, f"it makes no array: {error}") from error

    def _cast(self, array: Array, value: Any) -> Array:
        """An array of the field's dtype, the same one if it has it already."""
        source, dtype = array.dtype, self.dtype
        if source == dtype:
            return array
        if not array.size:
            return np.empty(array.shape, dtype)
        if not np.can_cast(source, dtype, "equiv"):
            if source.kind not in _SOURCES.get(dtype.kind, ""):
                raise self.mismatch(value, f"{dtype_name(source)} does not convert to {dtype_name(dtype)}")
            if dtype.kind in "iu" and not np.can_cast(source, dtype):
                low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
                if int(array.min()) < low or int(array.max()) > high:
                    raise self.mismatch(value, f"it holds numbers beyond {low} to {high}")
        try:
            with np.errstate(over="raise", under="ignore", invalid="raise"):
                converted = array.astype(dtype)
            lossless = dtype.kind not in "USMm" or self._same(converted.astype(source), array)
        except (ValueError, TypeError, OverflowError, FloatingPointError) as error:
            raise self.mismatch(value, f"{error}; give numbers in its range") from None
        if not lossless:
            raise self.mismatch(value, "it would be cut")
        return converted

    def _same(self, one: Array, other: Array) -> bool:
        if self.dtype.kind in "Mm":  # NaT equals nothing
            return bool((np.ascontiguousarray(one).view("i8") == np.ascontiguousarray(other).view("i8")).all())
        return bool((one == other).all())


def _loses_nuls(value: Any) -> bool:
    """Whether NumPy, which ends a text of fixed width at its first of several last NULs, would cut a text in there."""
    if isinstance(value, (list, tuple)):
        return any(map(_loses_nuls, value))
    return isinstance(value, (str, bytes)) and _ends_with_nul(value)


def _ends_with_nul(text: str | bytes) -> bool:
    return len(text) > 0 and ord(text[-1:]) == 0


class Node:
    """A mapping of a spec's tree: the spec itself, or a nested one."""

    __slots__ = ("entries", "flat", "path", "plan")

    def __init__(self, path: tuple[str, ...], entries: dict[str, Fit | Node]) -> None:
        self.path = path
        self.entries = entries
        self.flat = all(isinstance(entry, Fit) for entry in entries.values())
        #: what `collect` looks at, in one tuple for each entry
        self.plan: list[tuple[str, Any, Any, frozenset[type], Any]] = [
            (name, entry.dtype, entry.exact_shape, entry.classes, entry.fit)
            if isinstance(entry, Fit)
            else (name, None, None, frozenset(), entry)
            for name, entry in entries.items()
        ]

    def where(self) -> str:
        """What messages call it."""
        return f"field {'.'.join(self.path)!r}" if self.path else "message"

    def collect(self, message: Any, values: list[Any]) -> None:
        """Append what a message has for each field, in their order, checked and ready to be stored."""
        if message.__class__ is not dict:
            message = self.as_dict(message)
        try:
            for name, dtype, shape, classes, fit in self.plan:
                value = message[name]
                kind = value.__class__
                if kind in classes or (kind is np.ndarray and value.dtype is dtype and value.shape == shape):
                    values.append(value)
                elif dtype is None:
                    fit.collect(value, values)
                else:
                    values.append(fit(value))
        except KeyError:
            self.check_names(message)
            raise
        if len(message) != len(self.plan):
            self.check_names(message)

    def as_dict(self, message: Any) -> dict[str, Any]:
        """A message as a dict: of a mapping, a structured value, or a tuple for fields "0", "1", …"""
        if isinstance(message, Mapping):
            return dict(message)
        if isinstance(message, (np.void, np.ndarray)) and message.dtype.names is not None:
            return {name: message[name] for name in message.dtype.names}
        if isinstance(message, (tuple, list)) and [*self.entries] == [*map(str, range(len(message)))]:
            return dict(zip(self.entries, message, strict=True))
        raise SpecMismatch(f"{self.where()} is a mapping of {self.names()}, not {told_value(message)}")

    def names(self) -> str:
        """The names of its entries, for messages."""
        return ", ".join(map(repr, self.entries))

    def check_names(self, message: Mapping[Any, Any], optional: bool = False) -> None:
        """Raise SpecMismatch if a name is missing, or is none of these."""
        given = ", ".join(map(reprlib.repr, message)) or "nothing"
        for name in self.entries:
            if name not in message and not optional:
                path = ".".join((*self.path, name))
                raise SpecMismatch(f"field {path!r} is missing: {self.where()} holds {self.names()}; given was {given}")
        for name in message:
            if name not in self.entries:
                raise SpecMismatch(
                    f"{self.where()} has no field {reprlib.repr(name)}: it holds {self.names()}; given was {given}"
                )

    def fits(self) -> Iterator[Fit]:
        """All fields below, in their order."""
        for entry in self.entries.values():
            if isinstance(entry, Fit):
                yield entry
            else:
                yield from entry.fits()

    def nest(self, values: Iterator[Any]) -> dict[str, Any]:
        """Values in the fields' order, as nested dicts."""
        return {
            name: next(values) if isinstance(entry, Fit) else entry.nest(values) for name, entry in self.entries.items()
        }

    def flatten(self, message: Any, default: Any = None) -> list[Any]:
        """What nested mappings hold, in the fields' order; with a default, fields may be missing."""
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


# --- the spec


class Spec(Generic[M]):
    """Which fields a typed channel's messages have, and where each lies in a slot. Immutable.

    `Spec[Step](…)` tells type checkers which TypedDict the messages are.

    >>> import numpy as np, ringshm
    >>> spec = ringshm.Spec({"obs": (np.uint8, (84, 84)), "info": {"reward": np.float32}})
    >>> spec.nbytes, [field.name for field in spec.fields]
    (7060, ['obs', 'info.reward'])

    Args:
        declaration: a mapping of field name to one of
            `(dtype, shape)`, with an int or a tuple of ints for the shape, the first of which may be an `UpTo(n)`;
            a dtype alone (`np.dtype`, a type, a string, or the list of a structured one), which is a scalar;
            a mapping or a Spec, which nests;
            or a structured `np.dtype`, whose fields become the spec's; or another Spec. A field whose own dtype is
            structured arrives as a structured array. Dimensions of length zero are allowed.

    Specs are equal if they have the same names, in the same order, and the same dtypes and shapes.

    Raises:
        TypeError, ValueError: name the field and what is wrong with it.

    Attributes:
        fields: all fields, nested ones too, in their order.
        slot_size: bytes that a slot needs.
        nbytes: bytes of all fields, UpTo at its maximum, without the gaps between them.
    """

    __slots__ = (
        "_fixed_nbytes",
        "_lengths",
        "_text",
        "collect",
        "fields",
        "fits",
        "nbytes",
        "root",
        "slot_size",
        "up_to",
    )

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
        self.fits = [*self.root.fits()]
        self.slot_size = max(field.offset + field.nbytes for field in fields)
        self.nbytes = sum(field.nbytes for field in fields)
        if not self.nbytes:
            raise ValueError(f"spec {self!r} holds no bytes: give a field a shape without zeros")
        if self.slot_size >= MAX_NBYTES:
            largest = max(fields, key=lambda field: field.nbytes)
            raise ValueError(
                f"spec needs {self.slot_size} bytes a slot, {largest.nbytes} of them for field {largest.name!r}; "
                f"at most {MAX_NBYTES - 1} are possible"
            )
        #: the UpTo fields, whose lengths travel in this order
        self.up_to = tuple(field for field in fields if field.up_to)
        if len(self.up_to) > MAX_UP_TO:
            raise ValueError(
                f"spec has {len(self.up_to)} UpTo fields, from field {self.up_to[MAX_UP_TO].name!r} on more than the "
                f"{MAX_UP_TO} that are possible: give others their full shape"
            )
        self._fixed_nbytes = self.nbytes - sum(field.nbytes for field in self.up_to)
        self._lengths = struct.Struct(f"={len(self.up_to)}Q")
        #: appends what a message has for each field, in their order, checked and ready to be stored
        self.collect = self.root.collect
        self._text = json.dumps(_to_lists(self.root), separators=(",", ":"))

    def declaration(self) -> dict[str, Any]:
        """The spec as nested dicts of `(dtype, shape)`."""
        return self.root.nest(
            (field.dtype, (UpTo(field.shape[0]), *field.shape[1:]) if field.up_to else field.shape)
            for field in self.fields
        )

    def to_text(self) -> str:
        """The spec as a text from which `from_text` makes an equal one; equal specs have the same."""
        return self._text

    @classmethod
    def from_text(cls, text: str) -> Spec[M]:
        """The spec of a text of `to_text`, which may come from anywhere: no code of it runs.

        Args:
            text: of at most a million characters.

        Raises:
            ValueError: if it is not exactly what `to_text` gives.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"text of {len(text)} characters is no spec")
        try:
            spec = cls(_from_lists(json.loads(text, parse_int=_short_int)))
            sound = spec.to_text() == text
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, Warning) as error:
            raise ValueError(f"{text[:80]!r} is no spec: {error}") from None
        if not sound:
            raise ValueError(f"{text[:80]!r} is no spec as to_text gives it")
        return spec

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Spec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[Any, ...]:
        return Spec.from_text, (self._text,)

    def __repr__(self) -> str:
        return f"Spec({_told_tree(self.declaration())})"

    def describe(self) -> str:
        """A line for each field, for messages."""
        width = max(len(field.name) for field in self.fields)
        return "\n".join(f"    {field.name:{width}}  {field.told()}" for field in self.fields)

    # --- lengths

    def record(self, lengths: Sequence[int]) -> tuple[int, bytes]:
        """R_META and description of a message; for the codec.

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
            memory: what holds the message's record.
            meta: its R_META.
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
                raise ValueError(f"field {field.name!r} holds {field.told()}, but is said to have length {length}")
        return lengths

    def nest(self, values: Iterator[Any]) -> dict[str, Any]:
        """Values in the fields' order, as nested dicts.

        Args:
            values: one for each field.
        """
        return self.root.nest(values)

    def flatten(self, message: Any, default: Any = None) -> list[Any]:
        """What nested mappings hold, in the fields' order.

        Args:
            message: nested mappings as the spec's.
            default: what stands for fields that are missing; None lets none be.

        Raises:
            SpecMismatch: names the field that is missing or unknown.
        """
        return self.root.flatten(message, default)


#: What declares a spec.
SpecLike: TypeAlias = Spec[Any] | Mapping[str, Any] | np.dtype[Any]


def _fields_of_dtype(dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.names is None or dtype.fields is None:
        raise TypeError(f"spec={dtype!r} is no structured dtype: give a mapping of name to (dtype, shape)")
    return {name: dtype.fields[name][0] for name in dtype.names}


def _parse(declaration: Mapping[Any, Any], path: tuple[str, ...], fields: list[Field]) -> Node:
    """The tree of a declaration; its fields are appended, each behind the last one."""
    where = f"field {'.'.join(path)!r}" if path else "spec"
    if not declaration:
        raise ValueError(f"{where} is empty: give at least one field")
    if len(path) >= MAX_DEPTH:
        raise ValueError(f"{where:.80} nests deeper than {MAX_DEPTH}")
    entries: dict[str, Fit | Node] = {}
    for name, value in declaration.items():
        if not isinstance(name, str):
            raise TypeError(f"{where} has the field name {name!r}: names are strings")
        if not name or not name.isprintable():
            raise ValueError(f"{where} has the field name {name!r}: names have at least one character, all printable")
        below = (*path, str(name))
        if isinstance(value, Spec):
            value = value.declaration()
        entries[below[-1]] = (
            _parse(value, below, fields) if isinstance(value, Mapping) else Fit(_parse_field(value, below, fields))
        )
    return Node(path, entries)


def _parse_field(value: Any, path: tuple[str, ...], fields: list[Field]) -> Field:
    where = f"field {'.'.join(path)!r}"
    told, shape = value, ()
    if isinstance(value, tuple):
        if len(value) != 2:
            raise TypeError(f"{where} is {value!r:.80}: give (dtype, shape), a dtype, or a mapping")
        told, shape = value
    if not isinstance(told, (np.dtype, type, str, list)):
        raise TypeError(
            f"{where} has {told!r:.80} for a dtype: give (dtype, shape) or a dtype; ringshm.spec_like takes examples "
            "and Gymnasium spaces"
        )
    try:
        dtype = np.dtype(told)
    except (TypeError, ValueError, SyntaxError) as error:
        raise TypeError(f"{where} has {told!r:.80} for a dtype: {error}") from None
    inner: tuple[int, ...] = ()
    if dtype.subdtype is not None:
        dtype, inner = dtype.subdtype
    if dtype.hasobject:
        raise TypeError(f"{where} has dtype {dtype!r:.80}, which holds objects: give a dtype of fixed size")
    if dtype.metadata:
        raise TypeError(f"{where} has dtype {dtype!r:.80} with metadata, which would be lost: give one without")
    if describe_dtype(dtype) is None:
        raise TypeError(f"{where} has dtype {dtype!r:.80}, which cannot be told to other processes")
    if not dtype.itemsize:
        raise ValueError(f"{where} has dtype {dtype!r:.80} of no width: give one, as in 'U16' or 'S16'")
    if dtype.kind in "Mm" and "[" not in dtype.str:
        raise ValueError(f"{where} has dtype {dtype!r:.80} without a unit: give one, as in 'M8[ns]'")
    up_to, dimensions = _parse_shape(shape, where)
    dimensions += inner
    if len(dimensions) > MAX_NDIM:
        raise ValueError(f"{where} has {len(dimensions)} dimensions; at most {MAX_NDIM} are possible")
    nbytes = math.prod(dimensions) * dtype.itemsize
    # NumPy counts the items of an array without its zeros
    if math.prod(filter(None, dimensions)) * dtype.itemsize >= MAX_NBYTES:
        raise ValueError(f"{where} is too large with shape {dimensions}: at most {MAX_NBYTES - 1} bytes are possible")
    offset = round_up(fields[-1].offset + fields[-1].nbytes, ALIGNMENT) if fields else 0
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
            raise ValueError(f"{where} has shape {shape!r}: UpTo may be the first dimension only")
        if isinstance(dimension, bool) or not hasattr(dimension, "__index__"):
            raise TypeError(f"{where} has shape {shape!r:.80}: give an int or a tuple of ints")
        dimensions.append(operator.index(dimension))
        if dimensions[-1] < 0:
            raise ValueError(f"{where} has shape {shape!r:.80}: lengths are not negative")
    return up_to, tuple(dimensions)


def _to_lists(node: Node) -> list[Any]:
    return [
        [name, _to_lists(entry)]
        if isinstance(entry, Node)
        else [name, describe_dtype(entry.dtype), list(entry.field.shape), entry.field.up_to]
        for name, entry in node.entries.items()
    ]


def _from_lists(entries: Any) -> dict[str, Any]:
    """The declaration of what a text holds; what is wrong with it is found later, or raises what it may."""
    declaration: dict[str, Any] = {}
    for name, *told in entries:
        if len(told) == 1:
            declaration[name] = _from_lists(told[0])
        else:
            dtype, shape, up_to = told
            if dtype.startswith("ml_dtypes."):
                with contextlib.suppress(ImportError):
                    importlib.import_module("ml_dtypes")
            declaration[name] = (parse_dtype(dtype), (UpTo(shape[0]), *shape[1:]) if up_to else tuple(shape))
    return declaration


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"number of {len(digits)} digits")
    return int(digits)


def _told_tree(declaration: Mapping[str, Any]) -> str:
    items = []
    for name, entry in declaration.items():
        if isinstance(entry, Mapping):
            told = _told_tree(entry)
        else:
            dtype, shape = entry
            text = dtype_name(dtype)
            dtype_told = repr(text) if text == dtype.name or dtype.names is None else f"np.dtype({text})"
            told = f"({dtype_told}, {shape!r})" if shape else dtype_told
        items.append(f"{name!r}: {told}")
    return "{" + ", ".join(items) + "}"
