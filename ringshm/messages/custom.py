"""A user's codec in the channel's terms: every object goes through it, `None` and bare arrays too."""

from __future__ import annotations

from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from .bare import decode_bare, view_bare
from .codecs import ARRAY, ARRAYS, BYTES, CUSTOM, Codec, Encoded

#: The kinds that a loan makes, whatever the codec.
_LOANED = (BYTES, ARRAY, ARRAYS)


class CustomCodec:
    """A user's codec, wrapped."""

    def __init__(self, codec: Codec[Any]) -> None:
        self.codec = codec

    def encode(self, obj: Any) -> Encoded:
        """The buffer that the user's `encode` gives, as meta, payload and description."""
        data: Any = self.codec.encode(obj)
        if data.__class__ is bytes:
            return len(data) << 16 | CUSTOM, data, b""
        try:
            view = memoryview(data).cast("B")
        except TypeError as error:
            raise TypeError(
                f"codec {self.codec.name!r} encoded to a {type(data).__name__}, which is no C-contiguous buffer "
                f"({error}): return bytes, a bytearray, a memoryview or an array from its `encode`"
            ) from None
        return view.nbytes << 16 | CUSTOM, view, b""

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The user's object. If something refers to the slot then, the user's `decode` is called again, with a copy."""
        if meta & 0xFF in _LOANED:
            return decode_bare(memory, offset, meta, description)
        self._check_kind(meta)
        end = offset + (meta >> 16)
        owner = np.frombuffer(memory, np.uint8, end - offset, offset)
        seen = ref(owner)
        value = self.codec.decode(memoryview(owner).toreadonly())  # type: ignore[arg-type]
        del owner
        if seen() is not None:  # the view, slices of it, and whatever exports them hold it
            return self.codec.decode(memoryview(memory[offset:end]))
        return value

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The user's object, which may refer to the payload."""
        if meta & 0xFF in _LOANED:
            return view_bare(payload, meta, description)
        self._check_kind(meta)
        return self.codec.decode(payload.data)

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The user's object, which may refer to the payload; that is the caller's own, and shown read-only."""
        self._check_kind(meta)
        return self.codec.decode(payload.data.toreadonly())

    def _check_kind(self, meta: int) -> None:
        if meta & 0xFF != CUSTOM:
            raise ValueError(f"payload of kind {meta & 0xFF} was not made by codec {self.codec.name!r}")
