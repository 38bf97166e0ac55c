"""Typed messages in slots: written and read in place, by copy, and stacked into batches.

All of a message is checked before any of it is written, so a message that does not fit changes nothing. What has its
field's dtype is copied once, straight to its place, whatever its strides; what has another is converted first, which
is one more copy.

A SpecCodec sees the same field of all slots as one strided array, a column: `column[slot]` is the field in one slot,
`column[a:b]` in a run of slots, which moves with one copy.
"""

from __future__ import annotations

import itertools
import operator
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .buffers import ALIGNMENT, Row
from .errors import SpecMismatch
from .pool import LEAST_NBYTES, Pool, owned_copy
from .specs import Array, Field, Fit, Node, Spec, dtype_name, told_value

#: From this size on a batch's array is aligned, which costs 2 us.
_ALIGNED_NBYTES = 64 * 1024
#: Up to this size a field of slots here and there is copied twice, which is cheaper than one call for each.
_GATHERED_NBYTES = 1024

# --- views


def _view(field: Field, base: Any, offset: int) -> Array:
    return np.ndarray(field.shape, field.dtype, base, offset + field.offset)


def _scalar(array: Array) -> Any:
    """What a 0-d array holds, as a NumPy scalar of its own: `[()]` of a structured one is a view."""
    return (array.copy() if array.dtype.kind == "V" else array)[()]


def _read_only(field: Field, base: Any, offset: int, lengths: Iterator[int]) -> Array:
    array = _view(field, base, offset)
    if field.up_to:
        array = array[: next(lengths)]
    array.flags.writeable = False
    return array


def borrowed(spec: Spec, base: Any, offset: int, lengths: Sequence[int]) -> dict[str, Any]:
    """The message that lies at `offset` of `base`: nested dicts of read-only views, cut to their lengths.

    Scalars are NumPy scalars, which are copies. Every view keeps `base` alive if that is an array over memory that is
    no array's own: NumPy lets views refer to what lies below a memoryview or below an array of an array.
    """
    left = iter(lengths)
    return spec.nest(
        _read_only(field, base, offset, left) if field.shape else _scalar(_view(field, base, offset))
        for field in spec.fields
    )


def loaned(spec: Spec, base: Any, offset: int, name: str) -> LoanFields:
    """The slot that lies at `offset` of `base`, for writing; views keep `base` alive as in `borrowed`.

    Args:
        name: the channel's, for errors.
    """
    return LoanFields(_Loan(spec, base, offset, name), spec.root)


class _Loan:
    """What a slot on loan and its nested mappings share."""

    __slots__ = ("arrays", "base", "lengths", "name", "offset", "open", "spec")

    def __init__(self, spec: Spec, base: Any, offset: int, name: str) -> None:
        self.name = name
        self.spec = spec
        self.base = base
        self.offset = offset
        self.arrays: dict[Fit, Array] = {}
        self.lengths = {fit: fit.field.shape[0] for fit in spec.fits if fit.field.up_to}
        self.open = True

    def array(self, fit: Fit) -> Array:
        array = self.arrays.get(fit)
        if array is None:
            array = self.arrays[fit] = _view(fit.field, self.base, self.offset)
            if not self.open:
                array.flags.writeable = False
        return array


class LoanFields(Mapping[str, Any]):
    """A slot's fields, for writing: `slot["obs"][...] = x`, or `slot["obs"] = x`, which checks as `put` does.

    A field is a writable view of its full shape, also an UpTo one, and 0-d if it is a scalar; a nested one is again
    such a mapping. An UpTo field has its full length until `set_length` or an assignment says otherwise. What is
    never written holds whatever the slot held before.
    """

    __slots__ = ("_loan", "_node")

    def __init__(self, loan: _Loan, node: Node) -> None:
        self._loan = loan
        self._node = node

    def _entry(self, name: str) -> Fit | Node:
        try:
            return self._node.entries[name]
        except (KeyError, TypeError):
            raise self._mismatch(
                f"{self._node.where()} has no field {reprlib.repr(name)}: it holds {self._node.names()}"
            ) from None

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
                values.append(entry.fit(value))
        except SpecMismatch as error:
            raise self._mismatch(str(error)) from None
        self._check_open()
        for fit, given in zip(entry.fits() if isinstance(entry, Node) else (entry,), values):  # noqa: B905
            self._store(fit, given)

    def _mismatch(self, text: str) -> SpecMismatch:
        return SpecMismatch(f"channel {self._loan.name!r}: {text}")

    def _store(self, fit: Fit, given: Any) -> None:
        array = self._loan.array(fit)
        if fit.field.up_to:
            self._loan.lengths[fit] = len(given)
            array = array[: len(given)]
        array[...] = given

    def set_length(self, name: str, length: int) -> None:
        """Say how much of an UpTo field is sent."""
        entry = self._entry(name)
        if not isinstance(entry, Fit) or not entry.field.up_to:
            path = ".".join((*self._node.path, name))
            raise self._mismatch(f"field {path!r} has no UpTo dimension: its length is fixed")
        field, length = entry.field, operator.index(length)
        if not 0 <= length <= field.shape[0]:
            raise self._mismatch(f"field {field.name!r} holds {field.told()}: it cannot have length {length}")
        self._check_open()
        self._loan.lengths[entry] = length

    def _check_open(self) -> None:
        if not self._loan.open:
            raise ValueError("the loan has ended: its slot can no longer be written")

    def __iter__(self) -> Iterator[str]:
        return iter(self._node.entries)

    def __len__(self) -> int:
        return len(self._node.entries)

    def __repr__(self) -> str:
        return f"<slot on loan: {self._node.names()}>"

    def end(self) -> tuple[int, bytes]:
        """Make the arrays handed out read-only; R_META and description of what was written."""
        self._loan.open = False
        for array in self._loan.arrays.values():
            array.flags.writeable = False
        return self._loan.spec.record([*self._loan.lengths.values()])


# --- messages in slots


class Batch(dict[str, Any]):
    """Messages stacked: nested dicts of arrays of shape `(n, *shape)`, as `get_batch` gives and `put_batch` takes.

    Args:
        arrays: by field name.
        lengths: for UpTo fields, as the attribute.

    Attributes:
        lengths: for UpTo fields, nested dicts of int64 arrays of shape `(n,)`; beyond its length a row is zeros.
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
    """A spec's messages in the slots of one memory. For one message it is a codec like the others.

    Args:
        spec: what the messages are.
        memory: what holds the slots; the codec keeps it alive.
        first: byte at which the slots start.
        stride: bytes from one slot to the next.
        capacity: number of slots.
        name: the channel's, for errors.
        pool: where large arrays are made that the caller owns.
    """

    def __init__(
        self,
        spec: Spec,
        memory: Any,
        first: int,
        stride: int,
        capacity: int,
        name: str = "",
        pool: Pool | None = None,
    ) -> None:
        self.spec = spec
        self.pool = pool
        self._name = name
        self.first = first
        self.stride = stride
        self._memory = memory
        self._up_to = [bool(field.up_to) for field in spec.fields] if spec.up_to else None
        self._order = [*range(capacity)]
        self._batch_shapes: tuple[int, list[tuple[int, ...]]] = -1, []  # what `batch_arrays` was last asked for
        self.columns: list[Array] = []
        for field in spec.fields:
            one = np.ndarray(field.shape, field.dtype, memory, first + field.offset)
            column: Array = np.ndarray(
                (capacity, *field.shape), field.dtype, memory, first + field.offset, (stride, *one.strides)
            )
            self.columns.append(column)
        self._fixed = spec.record(()) if not spec.up_to else (-1, b"")
        self._large = pool is not None and any(field.nbytes >= LEAST_NBYTES for field in spec.fields)
        self._collect = spec.collect
        self._flatten = spec.root.flatten
        # column[slot] is a view, unless it is a scalar of a dtype without fields
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
        values: list[Any] = []
        try:
            self._collect(message, values)
        except SpecMismatch as error:
            raise self.named(error) from None
        meta, description = self._fixed
        if meta < 0:
            fields = zip(self.spec.fields, values, strict=True)
            meta, description = self.spec.record([len(value) for field, value in fields if field.up_to])
        return meta, Row(self.columns, self._up_to, self.first, self.stride, values), description

    def named(self, error: SpecMismatch) -> SpecMismatch:
        """The error, with the channel's name."""
        return SpecMismatch(f"channel {self._name!r}: {error}")

    def view(self, payload: Array, meta: int, description: bytes) -> dict[str, Any]:
        """The message as nested dicts of read-only views of its slot, all of which is the payload."""
        return borrowed(self.spec, payload, 0, self.spec.lengths(description, meta, 0))

    def adopt(self, payload: Array, meta: int, description: bytes) -> dict[str, Any]:
        """Never called: no typed message is larger than its slot."""
        raise ValueError(f"typed message of {payload.nbytes} bytes is larger than its slot")

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> dict[str, Any]:
        """The message as nested dicts of arrays, which are owned and writable, and of NumPy scalars."""
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
        return self._nest(values)

    # --- into the caller's memory

    def into(self, out: Any) -> Callable[[Any, int, int, int], dict[str, Any]]:
        """A `decode` that copies into the arrays of `out`, nested mappings as the spec's, and returns those.

        Scalars may be missing from `out`, or be 0-d arrays, which are filled. An UpTo field's array has its full
        shape; what is returned is cut to the message's length.

        Raises:
            SpecMismatch: if a name, shape or dtype differs, or an array is read-only.
        """
        targets = [
            None if given is ABSENT and not fit.field.shape else _checked_target(fit, given, fit.field.shape)
            for fit, given in zip(self.spec.fits, self.spec.flatten(out, ABSENT), strict=True)
        ]

        def decode(memory: Any, offset: int, meta: int, description: int) -> dict[str, Any]:
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
            return self.spec.nest(iter(values))

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
                self._aligned(shape, field.dtype, n * field.nbytes)
                if n * field.nbytes >= _ALIGNED_NBYTES
                else np.empty(shape, field.dtype)
                for shape, field in zip(shapes, self.spec.fields)  # noqa: B905
            ]
        arrays = self._flatten(out)
        for k, (fit, shape, array) in enumerate(zip(self.spec.fits, shapes, arrays)):  # noqa: B905
            sound = array.__class__ is np.ndarray and array.shape == shape and array.dtype is fit.dtype
            if not sound or not array.flags.writeable:
                arrays[k] = _checked_target(fit, array, fit.field.shape, n)[:n]
        return arrays

    def _aligned(self, shape: tuple[int, ...], dtype: np.dtype[Any], nbytes: int) -> Array:
        """A new array that starts on a cache line: copies in pieces, one from each slot, then run a third faster."""
        if self.pool is not None and nbytes >= LEAST_NBYTES:
            return np.ndarray(shape, dtype, self.pool.empty(nbytes))
        raw = np.empty(nbytes + ALIGNMENT - 1, np.uint8)
        return np.ndarray(shape, dtype, raw, -raw.__array_interface__["data"][0] % ALIGNMENT)

    def stack(
        self, slots: list[int], metas: list[int], description_of: Callable[[int], int], arrays: list[Array]
    ) -> Batch:
        """Copy the messages of slots into rows of `batch_arrays`.

        Args:
            metas: the R_META of each.
            description_of: tells where the description of a slot's message starts.

        Returns:
            The rows, as many as there are slots; those of UpTo fields padded with zeros.

        Raises:
            ValueError: if a message is none of this spec.
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
            return Batch(self._nest(arrays))
        lengths = [
            self.spec.lengths(self._memory, meta, description_of(slot)) for slot, meta in zip(slots, metas, strict=True)
        ]
        self._gather(slots, lengths, arrays)
        told: dict[str, Any] = {}
        table = np.array(lengths, np.int64).reshape(n, len(self.spec.up_to))
        for field, column in zip(self.spec.up_to, table.T, strict=True):
            inner = told
            for name in field.path[:-1]:
                inner = inner.setdefault(name, {})
            inner[field.path[-1]] = column.copy()
        return Batch(self._nest(arrays), told)

    def _nest(self, values: Sequence[Any]) -> dict[str, Any]:
        """Values in the fields' order, as the dict, or nested dicts, that messages are."""
        if self._names is not None:
            return dict(zip(self._names, values))  # noqa: B905
        return self.spec.nest(iter(values))

    def _gather(self, slots: list[int], lengths: Sequence[Sequence[int]], arrays: Sequence[Array]) -> None:
        runs = _runs(slots)
        up_to = 0
        for column, array, field in zip(self.columns, arrays, self.spec.fields, strict=True):
            if field.up_to:
                for row, (slot, told) in enumerate(zip(slots, lengths, strict=True)):
                    length = told[up_to]
                    array[row, :length] = column[slot, :length]
                    array[row, length:] = np.zeros((), field.dtype)
                up_to += 1
            elif len(runs) > 1 and field.nbytes <= _GATHERED_NBYTES:
                array[...] = column[np.asarray(slots)]
            else:
                for row, slot, n in runs:
                    array[row : row + n] = column[slot : slot + n]

    def encode_batch(self, batch: Any) -> list[tuple[int, Row, bytes]]:
        """The messages of a batch, each as `encode` gives it, checked as a whole before.

        Args:
            batch: nested mappings of arrays of shape `(n, *shape)`. An UpTo field's array may be shorter than its
                maximum; a Batch's `lengths` say how much of each row is sent, all of it otherwise.

        Raises:
            SpecMismatch: names the field; nothing has been written.
        """
        n: int | None = None
        values: list[Array] = []
        for fit, given in zip(self.spec.fits, self.spec.flatten(batch), strict=True):
            values.append(fit.fit_batch(given, n))
            n = len(values[-1])
        assert n is not None
        told = self.spec.flatten(batch.lengths, ABSENT) if isinstance(batch, Batch) else itertools.repeat(ABSENT)
        lengths = np.zeros((n, len(self.spec.up_to)), np.int64)
        columns = iter(lengths.T)
        for field, value, given in zip(self.spec.fields, values, told):  # noqa: B905
            if field.up_to:
                next(columns)[...] = value.shape[1] if given is ABSENT else _checked_lengths(field, value, given)
            elif given is not ABSENT:
                raise SpecMismatch(f"lengths are given for field {field.name!r}, which has no UpTo dimension")
        return [self._row(values, index, lengths[index].tolist()) for index in range(n)]

    def _row(self, values: list[Array], index: int, lengths: list[int]) -> tuple[int, Row, bytes]:
        left = iter(lengths)
        row = [
            value[index, : next(left)] if field.up_to else value[index, ...]
            for field, value in zip(self.spec.fields, values, strict=True)
        ]
        meta, description = self.spec.record(lengths)
        return meta, Row(self.columns, self._up_to, self.first, self.stride, row), description


class _Absent:
    """Stands for what was not given."""


ABSENT: Any = _Absent()


def _checked_target(fit: Fit, given: Any, shape: tuple[int, ...], n: int | None = None) -> Array:
    """An array to be written, if it has that shape behind at least `n` rows, and the field's dtype."""
    if given is ABSENT:
        raise SpecMismatch(f"field {fit.field.name!r} holds {fit.field.told()}: out has no array for it")
    if not isinstance(given, np.ndarray):
        raise fit.mismatch(given, "out takes arrays")
    wanted = given.shape[:1] + shape if n is not None else shape
    if given.shape != wanted or (n is not None and (not given.ndim or len(given) < n)):
        needed = f"({n} or more{''.join(f', {length}' for length in shape)})" if n is not None else f"{shape}"
        raise fit.mismatch(given, f"out needs shape {needed}")
    if given.dtype != fit.dtype:
        raise fit.mismatch(given, f"out needs dtype {dtype_name(fit.dtype)}")
    if not given.flags.writeable:
        raise fit.mismatch(given, "out needs an array that can be written")
    return given


def _checked_lengths(field: Field, value: Array, given: Any) -> Array:
    lengths = np.asarray(given)
    if lengths.shape != value.shape[:1] or (lengths.size and lengths.dtype.kind not in "iu"):
        raise SpecMismatch(
            f"lengths of field {field.name!r} are {told_value(given)}: give integers of shape {value.shape[:1]}"
        )
    if lengths.size and not 0 <= int(lengths.min()) <= int(lengths.max()) <= value.shape[1]:
        raise SpecMismatch(
            f"lengths of field {field.name!r} run from {lengths.min()} to {lengths.max()}, its array has "
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
