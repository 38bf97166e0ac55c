"""What all codecs share: the protocol of a user's codec, the form of an encoded message, and its kinds.

A codec makes an object a message, `(meta, data, description)`:

    meta          one word: length of the payload << 16, length of the description << 8, kind of the payload
    data          the payload: a C-contiguous buffer, or Parts or a Row, which write themselves
    description   what the payload does not tell itself: an array's dtype and shape, a typed message's lengths

Which file knows which kind:

    bare.py          NONE to ARRAY: None, bool, int, float, str, bytes, bytearray and an array need no container;
                     ARRAYS: several arrays, written into a loan
    containers.py    CONTAINER, CONTAINER_OOB: a stream of bytes, alone or with large buffers behind it
    pickled.py       `codec="pickle"`: bare objects, and containers with a pickle in them for all others
    plain.py         `codec="plain"`: bare objects, and containers with a stream of its own for all others
    custom.py        CUSTOM: a user's codec, which makes all its messages itself
    typed.py         TYPED: messages of the channel's spec

Three rules hold for all of them:

1. An array's bytes are copied once into the slot and once out of it, whatever its strides, order and dtype; only dtypes
   that hold objects go through pickle. The same holds for PyTorch's CPU tensors and JAX's arrays (tensors.py).
2. A decoded message owns its memory.
3. Nothing read from a slot is trusted: each length is compared with what is there, and under "plain" no stream can run
   code.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..annotations import Buffer, T

#: meta, data, description.
Encoded: TypeAlias = tuple[int, Any, bytes]

CONTAINER, CONTAINER_OOB, CUSTOM, NONE, FALSE, TRUE, INT, FLOAT, STR = range(9)
BYTES, BYTEARRAY, ARRAY, ARRAYS, TYPED = range(9, 14)


@runtime_checkable
class Codec(Protocol[T]):
    """A codec of one's own for messages of type T: any object with these members.

    Every message of the channel goes through it, bare arrays and `bytes` too; only what a loan made does not. Handles
    are pickled with their codec, so it must be picklable for `spawn`. A process that attaches by name passes a codec of
    the same name to `Channel.attach`.

    >>> import json, ringshm
    >>> class Json:
    ...     name = "json"
    ...     def encode(self, obj: object) -> bytes:
    ...         return json.dumps(obj).encode()
    ...     def decode(self, data: memoryview) -> object:
    ...         return json.loads(bytes(data))
    >>> with ringshm.Channel(4, "1KiB", codec=Json()) as channel:
    ...     channel.put({"reward": [1, None]})
    ...     channel.get()
    {'reward': [1, None]}
    """

    @property
    def name(self) -> str:
        """At most 48 bytes of UTF-8; recorded in the segment and compared on attach."""

    def encode(self, obj: T, /) -> Buffer | NDArray[Any]:
        """The object as one C-contiguous buffer: `bytes`, `bytearray`, a `memoryview`, an array.

        Its bytes are copied once, into the slot. It may raise anything: `put` raises it, and nothing is sent.

        Args:
            obj: what was given to `put`.
        """

    def decode(self, data: memoryview, /) -> T:
        """The object again.

        An exception that it raises becomes the cause of an UndecodableMessage; the message counts as received.

        Args:
            data: the bytes of `encode`: read-only, one-dimensional, of format "B".

        Ownership:
            Under `get`, `data` lies in the slot: if the result refers to it, `decode` is called again with a copy, and
            that result is returned. Under `borrow` the result may refer to the slot, which it then keeps. Of a message
            larger than a slot, `data` is this process's own.
        """


class Decodable(Protocol):
    """What a channel asks of its codec, built in or wrapped."""

    def encode(self, obj: Any) -> Encoded:
        """The object as meta, payload and description."""

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """The object whose payload lies at `offset` and whose description lies at `description`."""

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object, with arrays that are views of the payload, which is read-only."""

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object, with arrays that are views of the payload, which is the caller's own, and writable."""
