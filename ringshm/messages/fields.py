"""Fields of a spec: their types, shapes and places, and how values are converted into them.

Nothing is lost silently: an integer must be in its field's range, a text must fit its width, floats do not become
integers. Only floats may be rounded.
"""

from __future__ import annotations

import operator
import reprlib
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import SpecMismatch, check_fails_again
from .dtypes import dtype_name
from .tensors import as_array

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class UpTo:
    """A first dimension of at most `n`: each message has a length of its own, which travels with it.

    Args:
        n: the longest, at least 1. Each slot has memory for it.

    Raises:
        TypeError, ValueError: if `n` is no int, or less than 1.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not hasattr(self.n, "__index__"):
            raise TypeError(f"UpTo({self.n!r}) must be given an int")
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
        dtype: of its items. A subarray's shape is part of `shape`.
        shape: with an UpTo dimension at its longest.
        up_to: whether the first dimension is UpTo.
        offset: bytes from the slot's start; a multiple of 64.
        nbytes: with an UpTo dimension at its longest.
    """

    path: tuple[str, ...]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    up_to: bool
    offset: int
    nbytes: int

    @property
    def name(self) -> str:
        """The path in errors: "obs.pixels"."""
        return ".".join(self.path)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one step of the first dimension."""
        return self.nbytes // self.shape[0]

    def describe(self) -> str:
        """What the field holds, for errors: "float32 (up to 5, 3)"."""
        dimensions = [f"up to {self.shape[0]}", *self.shape[1:]] if self.up_to else [*self.shape]
        ending = "," if len(dimensions) == 1 else ""
        return f"{dtype_name(self.dtype)} ({', '.join(map(str, dimensions))}{ending})"


#: By a field's kind of dtype, the kinds that may be given for it.
_CONVERTIBLE = {"b": "b", "i": "biu", "u": "biu", "f": "biuf", "c": "biufc", "U": "U", "S": "S", "M": "M", "m": "m"}
_SCALARS = [t for kind in ("?", "bBhHiIlLqQ", "efdg", "FDG") for t in (np.dtype(code).type for code in kind)]


def _safe_classes(dtype: np.dtype[Any]) -> frozenset[type]:
    """Classes of scalars of which every value can be stored as it is."""
    if dtype.kind not in "biufc":
        return frozenset()
    classes = {kind for kind in _SCALARS if np.can_cast(np.dtype(kind), dtype, "safe")}
    pairs: tuple[tuple[type, Any], ...] = ((bool, np.bool_), (float, np.float64), (complex, np.complex128))
    return frozenset(classes | {python for python, kind in pairs if kind in classes})


def shown_value(value: Any) -> str:
    """A value that was given, for errors."""
    if isinstance(value, np.ndarray) or (isinstance(value, np.generic) and value.dtype.kind == "V"):
        return f"{type(value).__name__} of {dtype_name(value.dtype)} {value.shape}"
    return f"{type(value).__name__} {reprlib.repr(value)}"


class Converter:
    """Checks the values for one field, and converts them to what its memory holds."""

    __slots__ = ("_high", "_limit", "_low", "_text", "_width", "classes", "dtype", "exact_shape", "field")

    def __init__(self, field: Field) -> None:
        self.field = field
        self.dtype = dtype = field.dtype
        scalar = not field.shape
        #: an array of this shape and of the field's very dtype needs no further check; None if none does
        self.exact_shape = None if field.up_to else field.shape
        self.classes = _safe_classes(dtype) if scalar else frozenset()
        # the ranges in which Python's own numbers and texts can be stored as they are, empty where there is none
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
        return SpecMismatch(f"field {self.field.name!r} holds {self.field.describe()}, not {shown_value(value)}: {why}")

    def convert(self, value: Any) -> Any:
        """A value in the form in which it can be stored: unchanged if it can be already.

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

    def convert_batch(self, value: Any, n: int | None) -> Array:
        """As `convert`, for `n` values stacked; None takes any number."""
        array = self._array(value)
        shape, field = array.shape, self.field
        if not shape or (shape[1:] != field.shape and not self._is_shorter(shape[1:])):
            raise self.mismatch(value, f"its shape is {shape}, a batch's is (n, *shape)")
        if n is not None and shape[0] != n:
            raise self.mismatch(value, f"it has {shape[0]} messages, the fields before it have {n}")
        return self._cast(array, value)

    def _is_shorter(self, shape: tuple[int, ...]) -> bool:
        own = self.field.shape
        return self.field.up_to and len(shape) == len(own) and shape[0] <= own[0] and shape[1:] == own[1:]

    def _array(self, value: Any) -> Array:
        if isinstance(value, np.ma.MaskedArray):
            raise self.mismatch(value, "its mask would be lost: give .filled(...)")
        if isinstance(value, np.ndarray):
            return value
        if (isinstance(value, (str, bytes)) or self.dtype.kind in "US") and _loses_nuls(value):
            raise self.mismatch(value, "NULs at its end would be lost")
        try:
            return as_array(value)
        except (ValueError, TypeError, RuntimeError) as error:
            check_fails_again(partial(as_array, value), error)
            raise self.mismatch(value, f"it makes no array: {error}") from error

    def _cast(self, array: Array, value: Any) -> Array:
        """An array of the field's dtype: the given one if that has it already."""
        source, dtype = array.dtype, self.dtype
        if source == dtype:
            return array
        if not array.size:
            return np.empty(array.shape, dtype)
        if not np.can_cast(source, dtype, "equiv"):
            if source.kind not in _CONVERTIBLE.get(dtype.kind, ""):
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
            raise self.mismatch(value, f"{error}: give numbers in its range") from None
        if not lossless:
            raise self.mismatch(value, "it would be cut")
        return converted

    def _same(self, one: Array, other: Array) -> bool:
        if self.dtype.kind in "Mm":  # NaT equals nothing
            return bool((np.ascontiguousarray(one).view("i8") == np.ascontiguousarray(other).view("i8")).all())
        return bool((one == other).all())


def _loses_nuls(value: Any) -> bool:
    """Whether a text in `value` ends with NULs: NumPy would cut them off."""
    if isinstance(value, (list, tuple)):
        return any(map(_loses_nuls, value))
    return isinstance(value, (str, bytes)) and _ends_with_nul(value)


def _ends_with_nul(text: str | bytes) -> bool:
    return len(text) > 0 and ord(text[-1:]) == 0
