"""What a signal handler raises is never taken for what the kernel says, be it of the same class.

An alarm's handler raises TimeoutError, which is an OSError, as programs do that limit how long a call takes. It may
come amid any call of ringshm's, also where that asks the kernel whether a file is there still.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from support import workers
from support.tracer import Tracer

from ringshm import BrokenChannel, Channel
from ringshm.errors import is_own, suppress_own


def _in_no_finaliser() -> bool:
    """Python prints what is raised in a finaliser, and goes on."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is None


def _make(_: Channel[Any], name: str) -> None:
    Channel(2, 64, name=f"{name}-2").close()


def _attach(_: Channel[Any], name: str) -> None:
    Channel.attach(name).close()


def _pickle(channel: Channel[Any], _: str) -> None:
    with channel.sender() as sender:
        pickle.dumps(sender)


def _put_to_one_that_is_watched(channel: Channel[Any], _: str) -> None:
    with channel.receiver() as receiver:
        receiver.fileno()
        channel.put(1)
        receiver.get()


def _look_for_the_dead(channel: Channel[Any], _: str) -> None:
    attachment = channel._open()
    for _ in range(3):
        attachment.reaper.look()


def _say_who_uses_it(channel: Channel[Any], _: str) -> None:
    assert channel.stats().participants


CALLS: dict[str, tuple[Callable[[Channel[Any], str], None], tuple[str, ...]]] = {
    "a channel is made": (_make, ("segment",)),
    "it is attached": (_attach, ("segment", "process")),
    "a handle is pickled": (_pickle, ("segment", "process")),
    "a put to one that is watched": (_put_to_one_that_is_watched, ("segment", "ring")),
    "a look for the dead": (_look_for_the_dead, ("segment", "ring", "process")),
    "its stats": (_say_who_uses_it, ("segment", "ring")),
}


def _interrupt(call: Callable[[], None], step: int, folders: Sequence[str], raised: Exception) -> tuple[int, str]:
    """Make a call whose handler raises at that step: how many there were, and what is wrong. It keeps no traceback,
    which would keep handles.
    """

    def handle() -> None:
        raise raised

    caught: BaseException | None = None
    with Tracer(handle, step, folders=folders, lines=True, when=_in_no_finaliser) as steps:
        try:
            call()
        except BaseException as error:
            caught = error
    came = steps.count >= step
    wrong = "" if caught is (raised if came else None) else f"step {step}: {caught!r} and not {raised!r}"
    raised.__traceback__ = None
    return steps.count, wrong


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where a generator is being closed
@pytest.mark.parametrize(
    "raised",
    [
        pytest.param(TimeoutError("of an alarm"), id="of an alarm"),
        pytest.param(BrokenChannel(32, "of a handler's own channel"), id="of its own", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("what", CALLS)
def test_a_handlers_oserror_ends_the_call_it_comes_amid_and_nothing_else(
    what: str, raised: Exception, name: str
) -> None:
    call, folders = CALLS[what]
    for step in workers.each_step(3000):
        with Channel(4, 64, name=name, keep_open=True) as channel:
            channel.full()
            count, wrong = _interrupt(partial(call, channel, name), step, folders, raised)
            assert not wrong
            channel.put("after")
            while channel.get(timeout=30) != "after":
                assert what == "a put to one that is watched"  # it may have been sent
        if count < step:
            break
    assert step > 15


def test_what_is_ringshms_own_is_told_by_the_frames_that_it_has_passed_through() -> None:
    def handler() -> None:
        raise OSError(2, "of a handler")

    with pytest.raises(OSError, match="of a handler"), suppress_own(OSError):
        handler()
    with pytest.raises(TimeoutError), suppress_own(OSError):  # as one that another thread raises in this: no frame
        raise TimeoutError
    assert is_own(BrokenPipeError(32, "of the kernel's"))
    assert not is_own(BrokenPipeError("of somebody's"))
