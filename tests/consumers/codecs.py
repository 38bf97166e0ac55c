"""Codecs and specs: they tell the type of a channel's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ringshm import Batch, Channel, Codec, Latest, Receiver, Spec, UpTo, spec_like

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value, _):
        return value


class Text:
    """A codec, by its members alone."""

    name = "text"

    def encode(self, obj: str) -> bytes:
        return obj.encode()

    def decode(self, data: memoryview) -> str:
        return str(data, "utf-8")


class Frame:
    """Another, which encodes to an array."""

    @property
    def name(self) -> str:
        return "frame"

    def encode(self, obj: NDArray[np.uint8], /) -> NDArray[np.uint8]:
        return np.ascontiguousarray(obj)

    def decode(self, data: memoryview, /) -> NDArray[np.uint8]:
        return np.array(data, np.uint8)


class Step(TypedDict):
    obs: NDArray[np.float32]
    reward: float


FIELDS: dict[str, Any] = {"obs": (np.float32, (4,)), "reward": np.float32}
OBS = np.ones(4, np.float32)


def own_codec() -> None:
    codec: Codec[str] = Text()
    with Channel(4, 64, codec=Text()) as texts, Channel(4, 64, codec=Frame()) as frames:
        assert_type(texts, Channel[str])
        texts.put("text")
        assert_type(texts.get(), str)
        assert_type(frames, Channel[NDArray[np.uint8]])
        with Channel.attach(texts.name, codec=codec) as attached:
            assert_type(attached, Channel[str])
        with Channel[int](4, 64, codec="plain") as plain:
            assert_type(plain, Channel[int])


def mappings() -> None:
    """Without further ado a spec's messages are dicts of anything."""
    with Channel(4, spec=FIELDS) as channel:
        assert_type(channel, Channel[dict[str, Any]])
        channel.put({"obs": OBS, "reward": 1.0})
        assert_type(channel.get(), dict[str, Any])
        assert_type(channel.spec, Spec[Any] | None)
        with channel.loan() as loan:
            loan["obs"] = OBS
            loan["reward"] = 1.0
        with channel.borrow() as message:
            assert_type(message.value, dict[str, Any])
            assert message["obs"].shape == (4,)
        assert_type(channel.put_batch({"obs": np.stack([OBS, OBS]), "reward": [1.0, 2.0]}), int)
        batch = channel.get_batch(2, min=1, timeout=1)
        assert_type(batch, Batch)
        assert batch["obs"].shape == (2, 4)
    with Channel[Mapping[str, Any]](4, spec=Spec[Mapping[str, Any]](FIELDS), keep_open=True) as any_mapping:
        step: Mapping[str, object] = {"obs": OBS, "reward": 1.0}
        any_mapping.put(step)
    with Channel(4, spec=np.dtype([("x", "f4")])) as structured, Channel(4, spec=spec_like({"x": 1.0})) as like:
        assert_type(structured, Channel[dict[str, Any]])
        assert_type(like, Channel[dict[str, Any]])


def typed_dicts() -> None:
    """A spec can be told which TypedDict its messages are."""
    spec = Spec[Step](FIELDS)
    with Channel(4, spec=spec, oversize="error") as channel, Channel.attach(channel.name, spec=spec) as attached:
        assert_type(channel, Channel[Step])
        assert_type(attached, Channel[Step])
        channel.put({"obs": OBS, "reward": 1.0})
        assert_type(read(attached.receiver()), NDArray[np.float32])
    with Latest(spec=spec) as latest, Latest(spec={"x": (np.float32, UpTo(8))}) as floats:
        assert_type(latest, Latest[Step])
        assert_type(floats, Latest[dict[str, Any]])
        assert_type(Latest.attach(latest.name, spec=spec), Latest[Step])


def read(receiver: Receiver[Step]) -> NDArray[np.float32]:
    with receiver:
        return receiver.get()["obs"]


if __name__ == "__main__":
    own_codec()
    mappings()
    typed_dicts()
