"""Typed messages in slots: written and read in place, by copy, and stacked into batches.

1. All of a message is checked before any of it is written: a message that does not fit changes nothing.
2. A value of its field's dtype is copied once, straight to its place, whatever its strides. A value of another dtype is
   converted first, which is one more copy.
3. A SpecCodec is told where the slots lie, and sees one field of all slots as one strided array, a column:
   `column[slot]` is the field in one slot, `column[a:b]` in a run of slots, which one copy moves.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SpecMismatch
from .buffers import ALIGNMENT, Row
from .dtypes import dtype_name
from .fields import Array, Converter, Field, shown_value
from .pool import LEAST_NBYTES, Pool, owned_copy
from .specs import Node, Spec

#: Bytes from which on a batch's array is aligned, which costs 2 us.
ALIGNED_NBYTES = 64 * 1024
#: Bytes up to which a field of scattered slots is copied twice, which is cheaper than one call for each slot.
_GATHERED_NBYTES = 1024

# --- views


def view_of(field: Field, base: Any, offset: int) -> Array:
    """A field of the message that lies at `offset` of `base`, which the view keeps alive as in `borrowed`."""
    return np.ndarray(field.shape, field.dtype, base, offset + field.offset)


def _scalar(array: Array) -> Any:
    """The item of a 0-d array, as a NumPy scalar that owns it: `[()]` of a structured array is a view."""
    return (array.copy() if array.dtype.kind == "V" else array)[()]


def _read_only(field: Field, base: Any, offset: int, lengths: Iterator[int]) -> Array:
    array = view_of(field, base, offset)
    if field.up_to:
        array = array[: next(lengths)]
    array.flags.writeable = False
    return array


def borrowed(spec: Spec, base: Any, offset: int, lengths: Sequence[int]) -> dict[str, Any]:
    """The message that lies at `offset` of `base`: nested dicts of read-only views, cut to their lengths.

    Scalars are NumPy scalars, which are copies. Every view keeps `base` alive only if `base` is an array whose memory
    no array owns: else NumPy lets the view refer to the object below it, past a memoryview or an array of an array.
    """
    left = iter(lengths)
    return spec.root.nest(
        _read_only(field, base, offset, left) if field.shape else _scalar(view_of(field, base, offset))
        for field in spec.fields
    )


def loaned(spec: Spec, base: Any, offset: int, name: str) -> LoanFields:
    """The slot that lies at `offset` of `base`, for writing; its views keep `base` alive as in `borrowed`.

    The name is the channel's, for errors.
    """
    lengths = {of: of.field.shape[0] for of in spec.converters if of.field.up_to}
    return LoanFields(_Loan(spec, base, offset, name, lengths), spec.root)


@dataclasses.dataclass(slots=True, eq=False)
class _Loan:
    """The state that a slot on loan and its nested mappings share."""

    spec: Spec
    base: Any
    offset: int
    name: str
    lengths: dict[Converter, int]
    arrays: dict[Converter, Array] = dataclasses.field(default_factory=dict)
    open: bool = True

    def array(self, entry: Converter) -> Array:
        array = self.arrays.get(entry)
        if array is None:
            array = self.arrays[entry] = view_of(entry.field, self.base, self.offset)
            if not self.open:
                array.flags.writeable = False
        return array


class LoanFields(Mapping[str, Any]):
    """A slot's fields, for writing: `slot["obs"][...] = x`, or `slot["obs"] = x`, which checks as `put` does.

    A field is a writable view of its full shape, also an UpTo one; a scalar is 0-d; a nested mapping is again one of
    these. An UpTo field has its full length until `set_length` or an assignment says otherwise. A field that is never
    written holds whatever the slot held before.
    """

    __slots__ = ("_loan", "_node")

    def __init__(self, loan: _Loan, node: Node) -> None:
        self._loan = loan
        self._node = node

    def _entry(self, name: str) -> Converter | Node:
        try:
            return self._node.entries[name]
        except (KeyError, TypeError):
            raise self._mismatch(self._node.unknown(name)) from None

    def __getitem__(self, name: str) -> Any:
        entry = self._entry(name)
        return LoanFields(self._loan, entry) if isinstance(entry, Node) else self._loan.array(entry)

    def __setitem__(self, name: str, value: Any) -> None:
        entry = self._entry(name)
        values: list[Any] = []
        try:
            if isinstance(entry, Node):
                entry.collect(value, values)
            else:
                values.append(entry.convert(value))
        except SpecMismatch as error:
            raise self._mismatch(str(error)) from None
        self._check_open()
        for field, given in zip(entry.converters() if isinstance(entry, Node) else (entry,), values):  # noqa: B905
            self._store(field, given)

    def _mismatch(self, text: str) -> SpecMismatch:
        return SpecMismatch(f"channel {self._loan.name!r}: {text}")

    def _store(self, entry: Converter, given: Any) -> None:
        array = self._loan.array(entry)
        if entry.field.up_to:
            self._loan.lengths[entry] = len(given)
            array = array[: len(given)]
        array[...] = given

    def set_length(self, name: str, length: int) -> None:
        """As `Loan.set_length`, for a field of this mapping; ValueError if the loan has ended."""
        entry = self._entry(name)
        if not isinstance(entry, Converter) or not entry.field.up_to:
            path = ".".join((*self._node.path, name))
            raise self._mismatch(f"field {path!r} has no UpTo dimension: its length is fixed")
        field, length = entry.field, operator.index(length)
        if not 0 <= length <= field.shape[0]:
            raise self._mismatch(f"field {field.name!r} holds {field.describe()}: it cannot have length {length}")
        self._check_open()
        self._loan.lengths[entry] = length

    def _check_open(self) -> None:
        if not self._loan.open:
            raise ValueError(
                f"channel {self._loan.name!r}: the loan has ended, its slot can no longer be written: take another loan"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._node.entries)

    def __len__(self) -> int:
        return len(self._node.entries)

    def __repr__(self) -> str:
        return f"<slot on loan: {self._node.names()}>"

    def end(self) -> tuple[int, bytes]:
        """Make the arrays that were handed out read-only; meta and description of the message that was written."""
        self._loan.open = False
        for array in self._loan.arrays.values():
            array.flags.writeable = False
        return self._loan.spec.record([*self._loan.lengths.values()])


# --- messages


class Batch(dict[str, Any]):
    """Messages stacked: nested dicts of arrays of shape `(n, *shape)`, as `get_batch` gives and `put_batch` takes.

    Args:
        arrays: by field name.
        lengths: of UpTo fields, as the attribute.

    Attributes:
        lengths: of UpTo fields, nested dicts of int64 arrays of shape `(n,)`; beyond its length a row is zeros.
    """

    __slots__ = ("lengths",)

    def __init__(self, arrays: Mapping[str, Any], lengths: Mapping[str, Any] | None = None) -> None:
        super().__init__(arrays)
        self.lengths: dict[str, Any] = dict(lengths or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch, (dict(self), self.lengths)

    def __repr__(self) -> str:
        return f"Batch({dict.__repr__(self)}, lengths={self.lengths!r})"


class SpecCodec:
    """A spec's messages in the slots of one memory. For one message at a time it is a codec like the others.

    Args:
        spec: what the messages are.
        memory: holds the slots; the codec keeps it alive.
        first, stride: the byte at which the slots start, and the bytes from one slot to the next.
        capacity: number of slots.
        name: the channel's, for errors.
        pool: makes the large arrays that the caller owns.
    """

    def __init__(
        self, spec: Spec, memory: Any, first: int, stride: int, capacity: int, name: str = "", pool: Pool | None = None
    ) -> None:
        self.spec, self.pool, self._name = spec, pool, name
        self.first, self.stride, self._memory = first, stride, memory
        self._up_to = [bool(field.up_to) for field in spec.fields] if spec.up_to else None
        self._order = [*range(capacity)]
        self._batch_shapes: tuple[int, list[tuple[int, ...]]] = -1, []  # for the n that `batch_arrays` was last given
        self.columns: list[Array] = []
        for field in spec.fields:
            one = np.ndarray(field.shape, field.dtype, memory, first + field.offset)
            shape, strides = (capacity, *field.shape), (stride, *one.strides)
            self.columns.append(np.ndarray(shape, field.dtype, memory, first + field.offset, strides))
        self._fixed = spec.record(()) if not spec.up_to else (-1, b"")
        self._large = pool is not None and any(field.nbytes >= LEAST_NBYTES for field in spec.fields)
        self._collect: Callable[[Any, list[Any]], None] = spec.root.collect
        #: of one message, and of a batch
        self._flatten: Callable[..., list[Any]] = spec.root.flatten
        self._flatten_rows: Callable[..., list[Any]] = spec.root.flatten
        # column[slot] is a view, which must be copied, unless it is a scalar of a dtype without fields
        self._readers = [
            (column, bool(field.shape) or field.dtype.kind == "V")
            for column, field in zip(self.columns, spec.fields, strict=True)
        ]
        self._names = [field.path[0] for field in spec.fields] if spec.root.flat else None

    def encode(self, message: Any) -> tuple[int, Row, bytes]:
        """The message as meta, a Row and description.

        Raises:
            SpecMismatch: names the field that is missing, unknown, or given what it cannot hold.
        """
        values = self.collect(message)
        meta, description = self._fixed
        if meta < 0:
            fields = zip(self.spec.fields, values, strict=True)
            meta, description = self.spec.record([len(value) for field, value in fields if field.up_to])
        return meta, Row(self.columns, self._up_to, self.first, self.stride, values), description

    def collect(self, message: Any) -> list[Any]:
        """A message's value for each field, in their order, ready to be stored. Raises as `encode`."""
        values: list[Any] = []
        try:
            self._collect(message, values)
        except SpecMismatch as error:
            raise self.named(error) from None
        return values

    def over(self, memory: Any) -> SpecCodec:
        """The same for a copy of a single slot."""
        return type(self)(self.spec, memory, 0, self.stride, 1, self._name, self.pool)

    def named(self, error: SpecMismatch) -> SpecMismatch:
        """The error, with the channel's name."""
        return SpecMismatch(f"channel {self._name!r}: {error}")

    def view(self, payload: Array, meta: int, description: bytes) -> Any:
        """The message as nested dicts of read-only views; the payload is the whole slot."""
        return borrowed(self.spec, payload, 0, self.spec.lengths(description, meta, 0))

    def adopt(self, payload: Array, meta: int, description: bytes) -> dict[str, Any]:
        """Never called: every typed message fits into its slot."""
        raise ValueError(f"typed message of {payload.nbytes} bytes is larger than its slot")

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The message as nested dicts of arrays, which the caller owns and may write, and of NumPy scalars."""
        slot = (offset - self.first) // self.stride
        values: list[Any]
        if meta != self._fixed[0] or self._large:
            left = iter(self.spec.lengths(memory, meta, description))
            values = [
                owned_copy(column[slot, : next(left)], self.pool)
                if field.up_to
                else owned_copy(column[slot], self.pool)
                if field.shape
                else _scalar(column[slot, ...])
                for column, field in zip(self.columns, self.spec.fields, strict=True)
            ]
        else:
            values = [column[slot].copy() if copied else column[slot] for column, copied in self._readers]
        return self.nest(values)

    # --- into the caller's memory

    def into(self, out: Any) -> Callable[[Any, int, int, int], Any]:
        """A `decode` that copies into the arrays of `out` and returns those.

        Args:
            out: nested mappings as the spec's. Scalars may be missing, or be 0-d arrays, which are filled. An UpTo
                field's array has its full shape, and is returned cut to the message's length.

        Raises:
            SpecMismatch: if a name, shape or dtype differs, or an array is read-only.
        """
        targets = [
            None if given is ABSENT and not of.field.shape else _checked_target(of, given, of.field.shape)
            for of, given in zip(self.spec.converters, self._flatten(out, ABSENT), strict=True)
        ]

        def decode(memory: Any, offset: int, meta: int, description: int) -> Any:
            slot = (offset - self.first) // self.stride
            left = iter(self.spec.lengths(memory, meta, description))
            values: list[Any] = []
            for column, field, target in zip(self.columns, self.spec.fields, targets, strict=True):
                source = column[slot, ...]
                if target is None:
                    values.append(_scalar(source))
                    continue
                if field.up_to:
                    length = next(left)
                    source, target = source[:length], target[:length]
                target[...] = source
                values.append(target)
            return self.nest(values)

        return decode

    # --- batches

    def batch_arrays(self, n: int, out: Any = None) -> list[Array]:
        """Arrays of shape `(n, *shape)` for all fields in their order: new ones, or the first rows of those in `out`.

        Raises:
            SpecMismatch: if a name, shape or dtype in `out` differs, or an array is shorter than `n` or read-only.
        """
        last, shapes = self._batch_shapes
        if n != last:
            shapes = [(n, *field.shape) for field in self.spec.fields]
            self._batch_shapes = n, shapes
        if out is None:
            return [
                self.aligned(shape, field.dtype, n * field.nbytes)
                if n * field.nbytes >= ALIGNED_NBYTES
                else np.empty(shape, field.dtype)
                for shape, field in zip(shapes, self.spec.fields)  # noqa: B905
            ]
        arrays = self._flatten_rows(out)
        for k, (of, shape, array) in enumerate(zip(self.spec.converters, shapes, arrays)):  # noqa: B905
            sound = array.__class__ is np.ndarray and array.shape == shape and array.dtype is of.dtype
            if not sound or not array.flags.writeable:
                arrays[k] = _checked_target(of, array, of.field.shape, n)[:n]
        return arrays

    def aligned(self, shape: tuple[int, ...], dtype: np.dtype[Any], nbytes: int) -> Array:
        """A new array that starts on a cache line: copies in pieces, one from each slot, then run a third faster."""
        if self.pool is not None and nbytes >= LEAST_NBYTES:
            return np.ndarray(shape, dtype, self.pool.empty(nbytes))
        raw = np.empty(nbytes + ALIGNMENT - 1, np.uint8)
        return np.ndarray(shape, dtype, raw, -raw.__array_interface__["data"][0] % ALIGNMENT)

    def stack(
        self, slots: list[int], metas: list[int], description_of: Callable[[int], int], arrays: list[Array]
    ) -> Any:
        """Copy the messages of slots into rows of `batch_arrays`.

        Args:
            slots: where the messages are.
            metas: the meta of each.
            description_of: gives the byte at which the description of a slot's message starts.
            arrays: from `batch_arrays`.

        Returns:
            The rows, as many as there are slots; those of UpTo fields padded with zeros.

        Raises:
            ValueError: if a message is not of this spec.
        """
        n = len(slots)
        first = slots[0] if n else 0
        if n < len(arrays[0]):
            arrays = [array[:n] for array in arrays]
        if self._up_to is None:
            if metas != [self._fixed[0]] * n:
                raise ValueError("a message is not of this spec")
            if slots == self._order[first : first + n]:
                for column, array in zip(self.columns, arrays):  # noqa: B905
                    array[...] = column[first : first + n]
            else:
                self._gather(slots, (), arrays)
            return self.batch(arrays)
        places = zip(slots, metas, strict=True)
        lengths = [self.spec.lengths(self._memory, meta, description_of(slot)) for slot, meta in places]
        self._gather(slots, lengths, arrays)
        nested: dict[str, Any] = {}
        table = np.array(lengths, np.int64).reshape(n, len(self.spec.up_to))
        for field, column in zip(self.spec.up_to, table.T, strict=True):
            inner = nested
            for name in field.path[:-1]:
                inner = inner.setdefault(name, {})
            inner[field.path[-1]] = column.copy()
        return Batch(self.nest(arrays), nested)

    def nest(self, values: Sequence[Any]) -> Any:
        """Values in the fields' order, as the dict, or nested dicts, that messages are."""
        if self._names is not None:
            return dict(zip(self._names, values))  # noqa: B905
        return self.spec.root.nest(iter(values))

    def batch(self, arrays: Sequence[Array]) -> Any:
        """Arrays of shape `(n, *shape)`, in the fields' order, as the batch of such messages without UpTo fields."""
        return Batch(self.nest(arrays))

    def _gather(self, slots: list[int], lengths: Sequence[Sequence[int]], arrays: Sequence[Array]) -> None:
        runs = _runs(slots)
        up_to = 0
        for column, array, field in zip(self.columns, arrays, self.spec.fields, strict=True):
            if field.up_to:
                for row, (slot, its_lengths) in enumerate(zip(slots, lengths, strict=True)):
                    length = its_lengths[up_to]
                    array[row, :length] = column[slot, :length]
                    array[row, length:] = np.zeros((), field.dtype)
                up_to += 1
            elif len(runs) > 1 and field.nbytes <= _GATHERED_NBYTES:
                array[...] = column[np.asarray(slots)]
            else:
                for row, slot, n in runs:
                    array[row : row + n] = column[slot : slot + n]

    def encode_batch(self, batch: Any) -> list[tuple[int, Row, bytes]]:
        """The messages of a batch, each as `encode` gives it. All of the batch is checked first, see `check_batch`."""
        values, lengths = self.check_batch(batch)
        return [self.row(values, index, row) for index, row in enumerate(lengths.tolist())]

    def check_batch(self, batch: Any) -> tuple[list[Array], NDArray[np.int64]]:
        """The arrays of a batch, in the fields' order and of their dtypes, and the lengths of each message.

        Args:
            batch: nested mappings of arrays of shape `(n, *shape)`. An UpTo field's array may be shorter than its
                maximum; a Batch's `lengths` say how much of each row is sent, all of it otherwise.

        Raises:
            SpecMismatch: names the field; nothing has been written.
        """
        n: int | None = None
        values: list[Array] = []
        for converter, given in zip(self.spec.converters, self._flatten_rows(batch), strict=True):
            values.append(converter.convert_batch(given, n))
            n = len(values[-1])
        assert n is not None
        given_lengths = isinstance(batch, Batch)
        declared = self.spec.root.flatten(batch.lengths, ABSENT) if given_lengths else itertools.repeat(ABSENT)
        lengths = np.zeros((n, len(self.spec.up_to)), np.int64)
        columns = iter(lengths.T)
        for field, value, given in zip(self.spec.fields, values, declared):  # noqa: B905
            if field.up_to:
                next(columns)[...] = value.shape[1] if given is ABSENT else _checked_lengths(field, value, given)
            elif given is not ABSENT:
                raise SpecMismatch(f"lengths are given for field {field.name!r}, which has no UpTo dimension")
        return values, lengths

    def row(self, values: list[Array], index: int, lengths: list[int]) -> tuple[int, Row, bytes]:
        """One message of a batch, as `encode` gives it; arguments as `check_batch` returns them, and its lengths."""
        left = iter(lengths)
        row = [
            value[index, : next(left)] if field.up_to else value[index, ...]
            for field, value in zip(self.spec.fields, values, strict=True)
        ]
        meta, description = self.spec.record(lengths)
        return meta, Row(self.columns, self._up_to, self.first, self.stride, row), description


#: Stands for a value that was not given.
ABSENT: Any = object()


def _checked_target(converter: Converter, given: Any, shape: tuple[int, ...], n: int | None = None) -> Array:
    """An array of `out`, if it has that shape (behind at least `n` rows) and the field's dtype, and can be written."""
    if given is ABSENT:
        raise SpecMismatch(
            f"field {converter.field.name!r} holds {converter.field.describe()}, and out has no array for it: add one"
        )
    if not isinstance(given, np.ndarray):
        raise converter.mismatch(given, "out takes arrays")
    wanted = given.shape[:1] + shape if n is not None else shape
    if given.shape != wanted or (n is not None and (not given.ndim or len(given) < n)):
        needed = f"({n} or more{''.join(f', {length}' for length in shape)})" if n is not None else f"{shape}"
        raise converter.mismatch(given, f"out needs shape {needed}")
    if given.dtype != converter.dtype:
        raise converter.mismatch(given, f"out needs dtype {dtype_name(converter.dtype)}")
    if not given.flags.writeable:
        raise converter.mismatch(given, "out needs an array that can be written")
    return given


def _checked_lengths(field: Field, value: Array, given: Any) -> Array:
    lengths = np.asarray(given)
    if lengths.shape != value.shape[:1] or (lengths.size and lengths.dtype.kind not in "iu"):
        raise SpecMismatch(
            f"lengths of field {field.name!r} are {shown_value(given)}: give integers of shape {value.shape[:1]}"
        )
    if lengths.size and not 0 <= int(lengths.min()) <= int(lengths.max()) <= value.shape[1]:
        raise SpecMismatch(
            f"lengths of field {field.name!r} run from {lengths.min()} to {lengths.max()}: its array has "
            f"{value.shape[1]} steps"
        )
    return lengths


def _runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of consecutive slots: (index of the first in `slots`, the first, how many)."""
    runs: list[tuple[int, int, int]] = []
    first = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[index - 1] + 1:
            runs.append((first, slots[first], index - first))
            first = index
    return runs
