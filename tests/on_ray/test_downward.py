"""What the relay at home does with the answers of the one at an outpost, in whatever order they come."""

from __future__ import annotations

from typing import ClassVar

import pytest

pytest.importorskip("ray")

from ringshm import Channel
from ringshm.ray.batches import gather
from ringshm.ray.downward import Out
from ringshm.ray.keeping import Keeper
from ringshm.ray.locality import here
from ringshm.ray.records import Ring


class Elsewhere:
    """Stands for home's relay: what is told is told by the test, so its threads do nothing."""

    ends = True

    class record:
        options: ClassVar = {"capacity": 4}

    def thread(self, target: object) -> None:
        pass


def at_home(channel: Channel[str]) -> tuple[Keeper, Out]:
    """What home's relay has of that ring, and what it hands out to a place."""
    ring = Ring(here(), channel.name, channel._open().segment.nonce)
    home = Keeper(ring, None, lambda role: True)  # type: ignore[arg-type]
    home.keep(True, True)
    return home, Out(Elsewhere(), home, ring.place, ring, {}, 1)  # type: ignore[arg-type]


def test_a_message_that_is_taken_once_its_place_is_lost_goes_back_as_it_was() -> None:
    with Channel(4, 100) as channel:
        channel.put_many("xy")
        home, out = at_home(channel)
        out._placed[0] = gather(home.receiver, 1, at_most=1)[0]
        late = gather(home.receiver, 1, at_most=1)
        out.lost()
        out._deliver(late)
        for expected in (("x", 2), ("y", 1)):
            with channel.borrow(timeout=1) as message:
                assert (message.value, message.delivery_count) == expected
        home.close()


def test_what_goes_back_before_its_place_is_known_is_told_of_again_and_not_lost() -> None:
    with Channel(4, 100) as channel:
        channel.put("x")
        home, out = at_home(channel)
        out._numbered[0] = gather(home.receiver, 1)[0]
        out._settle([], [], {0: 2})  # the answer to `report` overtakes that to `deliver`
        assert not out._has_back
        out._place_those([0], 0)
        out._settle([0], [], {0: 2})
        assert out._has_back == [0]
        with channel.borrow(timeout=1) as message:
            assert message.value == "x" and message.delivery_count == 2
        home.close()
