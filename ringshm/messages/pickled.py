"""`codec="pickle"`: any picklable object, with its large buffers beside the pickle.

One pickler is used again and again. It differs from `pickle.dumps(obj, 5)` in three things:

1. Arrays, PyTorch's CPU tensors and JAX's arrays travel out of band whatever their strides, order and dtype, so that
   each is copied once. Dtypes that hold objects do not: their arrays are pickled as always.
2. `bytes` and `bytearray` objects of 64 KiB and more are copied once, too: CPython's pickler, given a file to write to,
   passes them through as they are.
3. Everything else is reduced as multiprocessing does it (its connections and sockets are more than their bytes), or
   else as copyreg does.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copyreg import dispatch_table as _copyreg_table
from multiprocessing.reduction import ForkingPickler
from pickle import loads
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .bare import ENCODERS, READONLY, array_over, contiguous, decode_array, decode_bare
from .codecs import ARRAY, CONTAINER, CUSTOM, Encoded
from .containers import LARGE_NBYTES, ContainerCodec, Places, owned_buffers, pack_container, unpack_container
from .pool import Pool
from .tensors import bits_of, is_dense, is_jax_array, is_tensor, restore_tensor
from .unpicklable import NotingPickler, explain

_forking_table: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]


class _Reducers(dict[type, Callable[[Any], Any]]):
    """The pickler's dispatch table: see 1. and 3. above. The other tables are looked up as they are at the time."""

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
    """A pickler, with all that it collects: pieces of the stream, and out-of-band buffers."""

    __slots__ = (
        "__weakref__",
        "_arrays",
        "_keeps_readonly",
        "buffers",
        "clear_memo",
        "dump",
        "pickler",
        "stream",
        "write",
    )

    def __init__(self, keeps_readonly: bool, pickler_type: type[pickle.Pickler] = pickle.Pickler) -> None:
        self._keeps_readonly = keeps_readonly
        self.stream: list[Any] = []
        self.write = self.stream.append
        self.buffers: list[pickle.PickleBuffer] = []
        self._arrays: dict[int, NDArray[Any]] = {}
        self.pickler = pickler = pickler_type(self, 5, buffer_callback=self.buffers.append)
        pickler.dispatch_table = _Reducers(self._reduce_array, self._reduce_tensor)
        self.dump = pickler.dump
        self.clear_memo = pickler.clear_memo

    def _out_of_band(self, array: NDArray[Any], readonly: bool) -> pickle.PickleBuffer:
        """An empty buffer that stands for the array, which takes its place in the container.

        PickleBuffer takes contiguous memory of a dtype that exports buffers; not every array has that.
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
        source, order = contiguous(array)
        readonly = self._keeps_readonly and array is given and not array.flags.writeable
        placeholder = self._out_of_band(source, readonly)
        short_dtype = dtype.str if dtype.isbuiltin == 1 and not dtype.metadata else dtype
        return array_over, (placeholder, short_dtype, array.shape, "F" if order else "C")

    def container(self) -> Encoded:
        """The container of what was dumped; this pickler forgets it."""
        buffers: list[tuple[Any, int, bool]] = []
        for buffer in self.buffers:
            raw = buffer.raw()
            array = self._arrays.get(id(buffer))
            # numpy itself reduces objects of subclasses of its arrays
            readonly = raw.readonly and (self._keeps_readonly or not isinstance(raw.obj, np.ndarray))
            buffers.append((raw, raw.nbytes, readonly) if array is None else (array, array.nbytes, readonly))
        encoded = pack_container(self.stream[:], buffers)
        self.forget()
        return encoded

    def forget(self) -> None:
        """Let go of what was dumped so far. This object is part of a cycle, so its memory would go late otherwise."""
        self.clear_memo()
        self.buffers.clear()
        self._arrays.clear()
        self.stream.clear()


class PickleCodec(ContainerCodec):
    """Any picklable object, protocol 5, large buffers beside the pickle. Unpickling runs what the sender says."""

    #: Whether arrays that are sent read-only arrive as such.
    keeps_readonly = True

    def __init__(self, pool: Pool | None = None, name: str = "") -> None:
        super().__init__(pool, name)
        # a call takes a pickler, and puts it back, in one step each: threads and nested calls get one of their own
        self._idle: list[_Pickling] = []

    def encode(self, obj: Any) -> Encoded:
        """The object as meta, payload and description; raises what pickling it raises, and says which part that was."""
        bare = ENCODERS.get(type(obj))
        if bare is not None:
            encoded = bare(obj)
            if encoded is not None:
                return encoded
        try:
            pickling = self._idle.pop()
        except IndexError:
            pickling = self.new_pickling()
        try:
            pickling.dump(obj)
        except BaseException as error:
            self.refuse(pickling, error, obj)
        stream = pickling.stream
        if len(stream) == 1 and not pickling.buffers:
            data = stream.pop()
            pickling.clear_memo()
            self._idle.append(pickling)
            return len(data) << 16 | CONTAINER, data, b""
        encoded = pickling.container()
        self._idle.append(pickling)
        return encoded

    def encode_array(self, array: NDArray[Any]) -> Encoded | None:
        """As `encode`, of an array that needs no container; None if it needs one."""
        return ENCODERS[np.ndarray](array)

    def new_pickling(self) -> _Pickling:
        """A pickler for messages of this channel."""
        return _Pickling(self.keeps_readonly)

    def refuse(self, pickling: _Pickling, error: BaseException, obj: Any) -> NoReturn:
        """Raise the error of a `dump`, explained. That pickler must not be used again."""
        pickling.forget()
        explained = self._explained(error, obj) if isinstance(error, Exception) else error
        try:
            if explained is error:
                raise error
            raise explained from error
        finally:
            del explained, error  # else the traceback, which leads to them, would keep the message

    def _explained(self, error: Exception, obj: Any) -> Exception:
        again: Any = _Pickling(self.keeps_readonly, NotingPickler)
        try:
            return explain(error, obj, self._name, again.dump, again.pickler.noted)
        finally:
            again.forget()
            again.pickler.noted.clear()

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The object, which owns all its memory; raises what unpickling it raises."""
        kind, nbytes = meta & 0xFF, meta >> 16
        if kind == CONTAINER and nbytes <= LARGE_NBYTES:
            return loads(memory[offset : offset + nbytes])
        if kind == ARRAY:
            return decode_array(memory, offset, meta, description, self._pool)
        if kind > CUSTOM:
            return decode_bare(memory, offset, meta, description, self._pool)
        with memoryview(memory) as view:
            if kind == CONTAINER:
                with view[offset : offset + nbytes] as stream:
                    return loads(stream)
            (start, end), buffers = unpack_container(memory, offset, nbytes)
            with view[start:end] as stream:
                return loads(stream, buffers=owned_buffers(view, buffers, self._pool))

    def _read(self, view: Any, kind: int, buffers_of: Callable[[memoryview, Places], list[Any]]) -> Any:
        if kind == CONTAINER:
            return loads(view)
        (start, end), buffers = unpack_container(view, 0, view.nbytes)
        return loads(view[start:end], buffers=buffers_of(view, buffers))


class WritablePickleCodec(PickleCodec):
    """As PickleCodec, and arrays arrive writable, however they were sent, as they do by `multiprocessing`."""

    keeps_readonly = False

    def encode(self, obj: Any) -> Encoded:
        """As PickleCodec.encode."""
        encoded = self.encode_array(obj) if type(obj) is np.ndarray else None
        return super().encode(obj) if encoded is None else encoded

    def encode_array(self, array: NDArray[Any]) -> Encoded | None:
        """As PickleCodec.encode_array."""
        encoded = super().encode_array(array)
        if encoded is None:
            return None
        meta, data, description = encoded
        return meta, data, bytes([description[0] & ~READONLY]) + description[1:]
