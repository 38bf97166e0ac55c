"""Messages that are copied into memory the caller has: what `out=` of `get` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..messages.codecs import Decodable
from ..messages.tensors import as_array, is_tensor


class Misfit(BaseException):
    """A message does not fit the memory that the caller named. It is no Exception: the codec has not failed."""


def into(codec: Decodable, out: Any) -> Callable[[Any, int, int, int], Any]:
    """A `decode` that copies array data into `out`: an array, a writable buffer, or nested dicts of these.

    It raises Misfit, before it copies anything, if the message does not fit there.
    """
    if not isinstance(out, dict):
        _writable(out)

    def decode(memory: Any, offset: int, meta: int, description: int) -> Any:
        payload = np.frombuffer(memory, np.uint8, meta >> 16, offset)
        value = _view(codec, payload, meta, memory[description : description + (meta >> 8 & 0xFF)])
        return _copy_into(out, value, lambda: codec.decode(memory, offset, meta, description))

    return decode


def adopt_into(codec: Decodable, out: Any) -> Callable[[NDArray[np.uint8], int, bytes], Any]:
    """The same, as an `adopt`: for a payload in this process's own memory."""

    def adopt(payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        value = _view(codec, payload, meta, description)
        return _copy_into(out, value, lambda: codec.adopt(payload, meta, description))

    return adopt


def _view(codec: Decodable, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
    readonly = payload.view()
    readonly.flags.writeable = False
    return codec.view(readonly, meta, description)


def _copy_into(out: Any, value: Any, decode: Callable[[], Any]) -> Any:
    """Copy a message of views into `out`. Objects that are no arrays are decoded once more, and put into `out` then."""
    copies: list[tuple[NDArray[Any], Any]] = []
    rest: list[tuple[dict[Any, Any], Any]] = []
    _match(value, out, "message", copies, rest)
    owned: Any = decode() if rest else None
    for target, source in copies:
        target[...] = source
    for target_dict, path in rest:
        whole = owned
        for key in path:
            whole = whole[key]
        target_dict[path[-1]] = whole
    return out


def _writable(out: Any) -> NDArray[Any]:
    """The memory of `out`, as an array."""
    if isinstance(out, np.ndarray) or is_tensor(type(out)):
        array = as_array(out)
    else:
        try:
            array = np.frombuffer(memoryview(out).cast("B"), np.uint8)
        except TypeError as error:
            raise TypeError(f"out={type(out).__name__} is no array, buffer or dict to copy into: {error}") from None
    if not array.flags.writeable:
        raise ValueError("out is read-only")
    return array


def _names_memory(out: Any) -> bool:
    """Whether something in `out` is there to be copied into."""
    if isinstance(out, dict):
        return any(map(_names_memory, out.values()))
    if isinstance(out, (np.ndarray, memoryview)) or is_tensor(type(out)):
        return True
    try:
        return not memoryview(out).readonly
    except TypeError:
        return False


def _match(value: Any, out: Any, where: str, copies: list[Any], rest: list[Any], path: tuple[Any, ...] = ()) -> None:
    """Find out what to copy where. Misfit names the place that does not fit."""
    if isinstance(out, dict):
        if not isinstance(value, dict) or (missing := out.keys() - value.keys()):
            what = f"a dict without {sorted(map(repr, missing))}" if isinstance(value, dict) else type(value).__name__
            raise Misfit(f"{where} is {what}, out has {sorted(map(repr, out))}")
        for key, item in value.items():
            if key in out and _names_memory(out[key]):
                _match(item, out[key], f"{where}[{key!r}]", copies, rest, (*path, key))
            else:
                rest.append((out, (*path, key)))
        return
    try:
        target = _writable(out)
        source = as_array(value) if isinstance(value, np.ndarray) or is_tensor(type(value)) else None
    except (TypeError, ValueError) as error:
        raise Misfit(f"{where}: {error}") from None
    if not isinstance(out, np.ndarray) and not is_tensor(type(out)):
        if isinstance(value, (bytes, bytearray, memoryview)):
            source = np.frombuffer(value, np.uint8)
        elif source is not None:
            source = source.reshape(-1).view(np.uint8)
    if source is None:
        raise Misfit(f"{where} is a {type(value).__name__}, out is a {type(out).__name__}")
    if source.shape != target.shape or source.dtype != target.dtype:
        raise Misfit(
            f"{where} has shape {source.shape} and dtype {source.dtype}, out has shape {target.shape} and dtype "
            f"{target.dtype}"
        )
    copies.append((target, source))
