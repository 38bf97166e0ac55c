"""TensorDicts as typed messages: specs that say so, and the codec that takes TensorDicts apart and makes them.

1. A spec of TensorDicts is a tree like theirs: its branches have a batch size, its leaves a PyTorch dtype and a shape.
   In a slot the leaves lie as the fields of any other spec; a dtype that NumPy lacks lies there as integers of its
   size. So all that knows slots and fields, the compiled path too, sees arrays.
2. The spec's text, which the segment records, is the tree. It is read without PyTorch, and nothing in it is run: each
   dtype is one of a table.
3. A process imports PyTorch and tensordict when it makes its first handle on such a channel.
4. What arrives is what the spec says. So a TensorDict is made from a plan, without the checks that would take most of
   the time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..annotations import M
from ..errors import SpecMismatch, check_fails_again, missing
from .fields import Array
from .pool import Pool, owned_copy
from .specs import MAX_DEPTH, Node, Spec
from .tensors import as_array, bits_of, unprotected
from .typed import SpecCodec, view_of

#: By the name of a PyTorch dtype the NumPy dtype of its memory.
_SAME = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_EIGHT_BITS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
MEMORY = {
    **{name: np.dtype(name) for name in _SAME},
    **dict.fromkeys(_EIGHT_BITS, np.dtype("uint8")),
    "bfloat16": np.dtype("int16"),
    "complex32": np.dtype("int32"),
}


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor: the name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """A TensorDict."""

    batch_size: tuple[int, ...]
    entries: Mapping[str, Branch | Leaf]


class TensorDictSpec(Spec[M]):
    """The spec of TensorDicts. `ringshm.torch.spec` makes it.

    Args:
        root: the TensorDict.
        device: of the TensorDicts that are received: "cpu", or None if they name no device.

    Raises:
        As Spec; ValueError also if a shape does not begin with the batch size.
    """

    __slots__ = ("branch", "device")

    def __init__(self, root: Branch, device: str | None) -> None:
        self.branch, self.device = root, device  # first of all: errors show them
        super().__init__(_declaration(root, ()))
        self._text = json.dumps({"device": device, "tensordict": _to_lists(root)}, separators=(",", ":"))

    @classmethod
    def _of_json(cls, value: Any) -> Spec[M]:
        if value["device"] not in (None, "cpu"):
            raise ValueError("device is neither cpu nor null")
        return cls(_from_lists(*value["tensordict"]), value["device"])

    def __repr__(self) -> str:
        return f"<spec of TensorDicts of batch_size {[*self.branch.batch_size]}: {super().__repr__()}>"


def _declaration(branch: Branch, path: tuple[str, ...]) -> dict[str, Any]:
    """The fields, as Spec takes them; it has no field for a branch without leaves."""
    if len(path) >= MAX_DEPTH:
        raise ValueError(f"field {'.'.join(path)!r:.80} nests deeper than {MAX_DEPTH}")
    fields: dict[str, Any] = {}
    lead = len(branch.batch_size)
    for name, entry in branch.entries.items():
        own = entry.shape if isinstance(entry, Leaf) else entry.batch_size
        if own[:lead] != branch.batch_size:
            raise ValueError(
                f"field {'.'.join((*path, name))!r} has shape {own}, which does not begin with the batch size "
                f"{branch.batch_size}"
            )
        if isinstance(entry, Leaf):
            fields[name] = MEMORY[entry.dtype], entry.shape
        elif below := _declaration(entry, (*path, name)):
            fields[name] = below
    return fields


def _to_lists(branch: Branch) -> list[Any]:
    entries = [
        [name, entry.dtype, entry.shape] if isinstance(entry, Leaf) else [name, *_to_lists(entry)]
        for name, entry in branch.entries.items()
    ]
    return [branch.batch_size, entries]


def _from_lists(batch_size: Any, lists: Any) -> Branch:
    """The branch of the lists in a text. They may be wrong: then this raises anything, or Spec does later."""
    entries: dict[str, Branch | Leaf] = {}
    for name, first, second in lists:
        if not isinstance(name, str):
            raise TypeError(f"{name!r:.80} is no name")
        entries[name] = Leaf(first, tuple(second)) if isinstance(first, str) else _from_lists(first, second)
    if any(type(length) is not int or length < 0 for length in batch_size):
        raise TypeError(f"{batch_size!r:.80} is no batch size")
    return Branch(tuple(batch_size), entries)


def spec_of_text(text: str) -> Spec[Any]:
    """The spec, of whatever messages, of a text that `to_text` gave. Raises as `Spec.from_text`."""
    return (TensorDictSpec if text.startswith("{") else Spec).from_text(text)


def branch_of(tensordict: Any) -> Branch:
    """The tree of a TensorDict.

    Raises:
        TypeError: if an entry is neither a tensor nor a TensorDict, or has a dtype that does not travel; names it.
    """
    return _branch_of(tensordict, ())


def _branch_of(tensordict: Any, path: tuple[str, ...]) -> Branch:
    import torch

    entries: dict[str, Branch | Leaf] = {}
    try:
        items = _items(tensordict)
    except RuntimeError as error:
        check_fails_again(partial(_items, tensordict), error)
        below = f"entry {'.'.join(path)!r}" if path else "the TensorDict"
        raise TypeError(f"{below} has entries that cannot be stacked: {error}") from None
    for name, value in items.items():
        where = f"entry {'.'.join((*path, name))!r}"
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            if dtype not in MEMORY or value.layout is not torch.strided or value.is_nested:
                nested = "nested, " if value.is_nested else ""
                raise TypeError(f"{where} is a tensor of {value.dtype}, {nested}{value.layout}, which does not travel")
            entries[name] = Leaf(dtype, tuple(value.shape))
        elif is_tensordict(value):
            entries[name] = _branch_of(value, (*path, name))
        else:
            raise TypeError(f"{where} is a {type(value).__name__}, neither a tensor nor a TensorDict: leave it out")
    return Branch(tuple(tensordict.batch_size), entries)


def _items(tensordict: Any) -> dict[Any, Any]:
    """The entries of a TensorDict.

    Raises:
        RuntimeError: if it is a lazy stack, and its TensorDicts differ in their names, or in an entry's shape.
    """
    items = dict(tensordict.items())
    for stacked in getattr(tensordict, "tensordicts", ()):
        if some := items.keys() ^ stacked.keys():
            raise RuntimeError(f"only some of the stacked TensorDicts have {', '.join(map(repr, sorted(some)))}")
    return items


def _plain_array(tensor: Any, dtype: Any, lacking: bool) -> Array | None:
    """The memory of a tensor as PyTorch gives it; None if it has another dtype, or one that NumPy lacks."""
    return tensor.numpy() if tensor.dtype is dtype and not lacking else None


def is_tensordict(value: Any) -> bool:
    """Whether a value is a TensorDict, a tensorclass, or the like, whose entries may be tensors."""
    import tensordict

    either = isinstance(value, tensordict.TensorDictBase) or tensordict.is_tensorclass(value)
    return either and not tensordict.is_non_tensor(value)


# --- messages


@dataclass(slots=True)
class _Plan:
    """A branch as messages are taken apart by it."""

    path: tuple[str, ...]
    size: Any  # a torch.Size
    #: name, dtype, shape, and whether NumPy lacks the dtype; or name, the plan of a branch, and None twice
    entries: list[tuple[str, Any, Any, bool | None]]


class TensorDictCodec(SpecCodec):
    """A SpecCodec whose messages are TensorDicts. It takes dicts of arrays, too. Args as SpecCodec."""

    def __init__(
        self,
        spec: TensorDictSpec[Any],
        memory: Any,
        first: int,
        stride: int,
        capacity: int,
        name: str = "",
        pool: Pool | None = None,
    ) -> None:
        super().__init__(spec, memory, first, stride, capacity, name, pool)
        try:
            import tensordict
            import torch
        except ImportError as error:
            what = f"channel {name!r}, whose messages are TensorDicts,"
            raise missing(what, "tensordict", "torchrl", error) from None
        self._torch, self._base, self._new = torch, tensordict.TensorDictBase, tensordict.TensorDict._new_unsafe
        self._device = None if spec.device is None else torch.device(spec.device)
        #: fields whose dtype NumPy lacks
        self._bits: list[tuple[int, Any]] = []
        #: how to put a message together, from the leaves on: for each branch, which of the values has which name
        self._branches: list[tuple[list[tuple[str, int]], tuple[int, ...]]] = []
        self._plan = self._make_plan(spec.branch, (), iter(range(len(spec.fields))))
        self._place_branches(spec.branch, iter(range(len(spec.fields))))
        self._sizes = [torch.Size(size) for _, size in self._branches]
        self._batch_sizes: tuple[int, list[Any]] = -1, []  # for the n that `batch` was last given
        self._collect = self._collect_tensors
        self._flatten, self._flatten_rows = self._flatten_one, self._flatten_several

    def _make_plan(self, branch: Branch, path: tuple[str, ...], numbers: Iterator[int]) -> _Plan:
        entries: list[tuple[str, Any, Any, bool | None]] = []
        for name, entry in branch.entries.items():
            if isinstance(entry, Leaf):
                dtype = getattr(self._torch, entry.dtype)
                lacking = MEMORY[entry.dtype].name != entry.dtype
                number = next(numbers)
                if lacking:
                    self._bits.append((number, dtype))
                entries.append((name, dtype, entry.shape, lacking))
            else:
                entries.append((name, self._make_plan(entry, (*path, name), numbers), None, None))
        return _Plan(path, self._torch.Size(branch.batch_size), entries)

    def _place_branches(self, branch: Branch, numbers: Iterator[int]) -> int:
        """Plan a branch, those below it first; where it will be among the values."""
        places = [
            (name, next(numbers) if isinstance(entry, Leaf) else self._place_branches(entry, numbers))
            for name, entry in branch.entries.items()
        ]
        self._branches.append((places, branch.batch_size))
        return len(self.spec.fields) + len(self._branches) - 1

    # --- taken apart

    def _collect_tensors(self, message: Any, values: list[Any]) -> None:
        if not isinstance(message, self._base) and not is_tensordict(message):
            self.spec.root.collect(message, values)
        else:
            self._take_apart(self._plan, message, 0, values)

    def _flatten_one(self, message: Any, default: Any = None) -> list[Any]:
        return self._flatten_any(message, 0, default)

    def _flatten_several(self, message: Any, default: Any = None) -> list[Any]:
        return self._flatten_any(message, 1, default)

    def _flatten_any(self, message: Any, lead: int, default: Any) -> list[Any]:
        if not isinstance(message, self._base) and not is_tensordict(message):
            return self.spec.root.flatten(message, default)
        values: list[Any] = []
        self._take_apart(self._plan, message, lead, values)
        return values

    def _take_apart(self, plan: _Plan, tensordict: Any, lead: int, values: list[Any]) -> None:
        """Append the memory of a TensorDict's tensors, in the fields' order, as arrays.

        Args:
            lead: how many dimensions there are before those that the plan knows.
        """
        size = tensordict.batch_size
        if (size[lead:] if lead else size) != plan.size or len(size) < lead:
            wanted = ", ".join(["n"] * lead + [*map(str, plan.size)])
            raise SpecMismatch(f"{self._where(plan)} has batch_size [{wanted}], not {[*size]}")
        try:
            given = _items(tensordict)
        except RuntimeError as error:
            check_fails_again(partial(_items, tensordict), error)
            raise SpecMismatch(f"{self._where(plan)} has entries that cannot be stacked: {error}") from None
        if len(given) != len(plan.entries):
            self._check_names(plan, given)
        if not given and not is_tensordict(tensordict):  # a stack of what is no tensor, which has no entries either
            raise SpecMismatch(f"{self._where(plan)} is a TensorDict, not {_shown(tensordict)}")
        for name, dtype, shape, lacking in plan.entries:
            value = given.get(name)
            if lacking is None:
                if not isinstance(value, self._base) and (value is None or not is_tensordict(value)):
                    self._check_names(plan, given)
                    raise SpecMismatch(f"{self._where(dtype)} is a TensorDict, not {_shown(value)}")
                self._take_apart(dtype, value, lead, values)
                continue
            try:
                array = _plain_array(value, dtype, lacking)
            except (AttributeError, RuntimeError, TypeError) as error:
                check_fails_again(partial(_plain_array, value, dtype, lacking), error)
                array = None
            if array is None:
                array = self._array_of(plan, given, name, dtype, shape)
            if array.shape[lead:] != shape:
                raise self._mismatch(plan, name, dtype, shape, value, "")
            values.append(array)

    def _array_of(self, plan: _Plan, given: dict[Any, Any], name: str, dtype: Any, shape: tuple[int, ...]) -> Array:
        """The memory of a tensor of which PyTorch makes no array."""
        self._check_names(plan, given)
        value = given[name]
        if not isinstance(value, self._torch.Tensor) or value.dtype is not dtype:
            raise self._mismatch(plan, name, dtype, shape, value, "")
        array_of = as_array if MEMORY[_name(dtype)].name == _name(dtype) else bits_of
        try:
            return array_of(value)
        except (TypeError, RuntimeError) as error:
            check_fails_again(partial(array_of, value), error)
            raise self._mismatch(plan, name, dtype, shape, value, f": {error}") from None

    def _mismatch(
        self, plan: _Plan, name: str, dtype: Any, shape: tuple[int, ...], value: Any, why: str
    ) -> SpecMismatch:
        field = ".".join((*plan.path, name))
        return SpecMismatch(f"field {field!r} holds a tensor of {_name(dtype)} {shape}, not {_shown(value)}{why}")

    def _where(self, plan: _Plan) -> str:
        return f"field {'.'.join(plan.path)!r}" if plan.path else "message"

    def _check_names(self, plan: _Plan, given: dict[Any, Any]) -> None:
        """Raise SpecMismatch if a TensorDict has not the names of its branch."""
        entries: dict[str, Any] = {name: None for name, *_ in plan.entries}
        Node(plan.path, entries).check_names(given)

    # --- put together

    def nest(self, values: Sequence[Array]) -> Any:
        """Arrays in the fields' order, as the TensorDict that messages are."""
        return self._put_together(values, self._sizes)

    def batch(self, arrays: Sequence[Array]) -> Any:
        """Arrays of shape `(n, *shape)` as a TensorDict of batch size `(n, *batch_size)`."""
        n, sizes = self._batch_sizes
        if n != len(arrays[0]):
            n = len(arrays[0])
            sizes = [self._torch.Size((n, *size)) for _, size in self._branches]
            self._batch_sizes = n, sizes
        return self._put_together(arrays, sizes)

    def _put_together(self, arrays: Sequence[Array], sizes: list[Any]) -> Any:
        values = [*map(self._torch.from_numpy, arrays)]
        for number, dtype in self._bits:
            values[number] = values[number].view(dtype)
        new, device = self._new, self._device
        for (places, _), size in zip(self._branches, sizes):  # noqa: B905
            values.append(new({name: values[k] for name, k in places}, batch_size=size, device=device, nested=False))
        return values[-1]

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The message as a TensorDict, which the caller owns."""
        self.spec.lengths(memory, meta, description)  # ValueError if it is none of this spec's
        slot = (offset - self.first) // self.stride
        return self.nest([owned_copy(column[slot, ...], self.pool) for column in self.columns])

    def view(self, payload: Array, meta: int, description: bytes) -> Any:
        """The message as a TensorDict whose tensors are views of the payload, which is the whole slot."""
        self.spec.lengths(description, meta, 0)
        return self.nest([unprotected(view_of(field, payload, 0)) for field in self.spec.fields])


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value: Any) -> str:
    """A value that was given, for errors."""
    dtype, kind = getattr(value, "dtype", None), type(value).__name__
    if dtype is None:
        return f"a {kind}"
    shape = "nested" if getattr(value, "is_nested", False) else tuple(value.shape)
    return f"a {kind} of {_name(dtype)} {shape} on {value.device}"


def codec_of(
    spec: Spec[Any], memory: Any, first: int, stride: int, capacity: int, name: str, pool: Pool | None
) -> SpecCodec:
    """The codec of a channel with that spec. Args as SpecCodec."""
    if isinstance(spec, TensorDictSpec):
        return TensorDictCodec(spec, memory, first, stride, capacity, name, pool)
    return SpecCodec(spec, memory, first, stride, capacity, name, pool)
