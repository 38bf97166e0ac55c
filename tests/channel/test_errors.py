"""What errors tell: what is wrong, where, and what to do."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checks import check_whole
from support.workers import Crew, Failed, may_fork

import ringshm
from ringshm import Channel, EndOfChannel, Latest, SpecMismatch

pytestmark = may_fork
SPEC = {"obs": ("f4", 2), "info": {"reward": "f4"}}
GOOD = {"obs": np.zeros(2, "f4"), "info": {"reward": 1.0}}


# --- a field's name


def _put(channel: Channel, name: str) -> None:
    channel.put({name if key == "obs" else key: value for key, value in GOOD.items()})


def _loan(channel: Channel, name: str) -> None:
    with channel.loan() as loan:
        loan[name] = 1.0


def _loan_nested(channel: Channel, name: str) -> None:
    with channel.loan() as loan:
        loan["info"][name] = 1.0


def _borrow(channel: Channel, name: str) -> None:
    channel.put(GOOD)
    try:
        with channel.borrow() as message:
            print(message[name])
    finally:
        assert channel.empty()


MISSPELT: list[tuple[Callable[[Channel, str], None], str, str]] = [
    (_put, "osb", "field 'obs' is missing: .*given was 'osb', 'info'; did you mean it by 'osb'?"),
    (_put, "action", r"field 'obs' is missing: message holds 'obs', 'info'; given was 'action', 'info'$"),
    (_loan, "obss", "message has no field 'obss', did you mean 'obs'? it holds 'obs', 'info'"),
    (_loan, "action", "message has no field 'action': it holds 'obs', 'info'"),
    (_loan_nested, "rewrad", "field 'info' has no field 'rewrad', did you mean 'reward'?"),
    (_borrow, "ob", "message has no field 'ob', did you mean 'obs'?"),
]


@pytest.mark.parametrize(("act", "name", "says"), MISSPELT, ids=[f"{act.__name__} {name}" for act, name, _ in MISSPELT])
def test_a_misspelt_field_is_told_with_the_name_that_it_resembles(act: Any, name: str, says: str) -> None:
    with Channel(2, spec=SPEC) as channel:
        with pytest.raises(SpecMismatch, match=f"channel '{channel.name}': {says}".replace("?", r"\?")):
            act(channel, name)
        assert channel.stats().free == 2


def test_a_misspelt_field_of_a_latest_or_a_batch_is_told_too() -> None:
    with Latest(spec=SPEC) as latest, Channel(2, spec=SPEC) as channel:
        latest.publish(GOOD)
        with pytest.raises(SpecMismatch, match=r"no field 'abs', did you mean 'obs'\?"), latest.borrow() as value:
            print(value["abs"])
        with pytest.raises(SpecMismatch, match=r"field 'obs' is missing.*did you mean it by 'obz'\?"):
            channel.get_batch(1, timeout=0, out={"obz": np.zeros((1, 2), "f4")})
        with pytest.raises(SpecMismatch, match=r"did you mean it by 'obz'\?"):
            channel.put_batch({"obz": np.zeros((1, 2), "f4"), "info": {"reward": [1.0]}})


# --- an object that cannot be pickled


class Env:
    """Holds what cannot be pickled, in an attribute."""

    def __init__(self) -> None:
        self.steps = 3
        self.lock = threading.Lock()


class Slotted:
    """The same, in a slot."""

    __slots__ = ("here", "there")

    def __init__(self) -> None:
        self.there = lambda: None


class Refuses:
    """Raises an error of a class that takes other arguments."""

    def __reduce__(self) -> Any:
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "it will not be sent")


def _nested(depth: int, obj: Any) -> Any:
    for _ in range(depth):
        obj = [obj]
    return obj


UNPICKLABLE: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (threading.Lock, TypeError, r"message \(_thread\.lock\) cannot be pickled: cannot pickle '_thread.lock' object"),
    (lambda: {"obs": np.zeros(3), "env": [1, Env()]}, TypeError, r"message\['env'\]\[1\]\.lock \(_thread\.lock\)"),
    (lambda: [*range(200_000), threading.Lock()], TypeError, r"message\[200000\] \(_thread\.lock\)"),
    (lambda: _nested(300, threading.Lock()), TypeError, r"message\[0\]\[0\].{100,120}\[0\] \(_thread\.lock\)"),
    (lambda: (1, Slotted()), Exception, r"message\[1\]\.there \(builtins\.function\)"),
    (lambda: {(1, 2): {"a": (n for n in "ab")}}, TypeError, r"message\[\(1, 2\)\]\['a'\] \(builtins\.generator\)"),
    (lambda: [functools.partial(print), {"x": type("Here", (), {})()}], Exception, r"message\[1\]\['x'\] \(.*Here\)"),
]


@pytest.mark.parametrize(("make", "kind", "says"), UNPICKLABLE, ids=[says for _, _, says in UNPICKLABLE])
def test_an_object_that_cannot_be_pickled_is_told_with_its_place(make: Any, kind: type[Exception], says: str) -> None:
    with Channel(2, 4096) as channel:
        for send in (channel.put, channel.put_nowait, lambda message: channel.put_many([1, message])):
            with pytest.raises(kind, match=f"channel '{channel.name}': {says}.*nothing was sent") as caught:
                send(make())
            assert type(caught.value) is type(caught.value.__cause__)
        check_whole(channel)
    with Latest(4096) as latest, pytest.raises(kind, match=f"channel '{latest.name}': {says}"):
        latest.publish(make())
    tasks: ringshm.Queue[Any] = ringshm.Queue(2)
    with pytest.raises(kind, match=f"channel '{tasks.name}': {says}"):
        tasks.put(make())
    tasks.close()


def test_an_error_that_cannot_be_made_anew_goes_on_as_it_is() -> None:
    with Channel(2, 64) as channel, pytest.raises(UnicodeDecodeError) as caught:
        channel.put({"a": Refuses()})
    if sys.version_info >= (3, 11):
        note = caught.value.__notes__[-1]  # pickle itself adds some, from Python 3.14 on
        assert re.match(rf"channel '{channel.name}': message\['a'\] \(.*Refuses\) cannot be pickled", note)


def test_a_handle_beside_what_cannot_be_pickled_is_not_counted_as_on_its_way_again() -> None:
    with Channel(2, 64) as channel, Channel(2, 4096) as carrier:
        with pytest.raises(TypeError, match=r"message\[1\]"):
            carrier.put([channel.sender(), threading.Lock()])
        assert len(channel.stats().on_their_way) == 1


def test_the_plain_codec_names_the_channel_and_the_place() -> None:
    with Channel(2, 64, codec="plain") as channel:
        says = rf"channel '{channel.name}': codec 'plain' cannot .* at message\[1\]\['a'\]"
        with pytest.raises(TypeError, match=says):
            channel.put([1, {"a": object()}])
        check_whole(channel)


# --- a forgotten `with`


def test_a_borrow_or_loan_says_that_its_block_is_missing() -> None:
    with Channel(2, 64) as channel, Latest(64) as latest:
        borrow, loan, value = channel.borrow(), channel.loan(), latest.borrow()
        for one, use, call in (
            (borrow, lambda: borrow.value, "with channel.borrow() as message:"),
            (borrow, lambda: borrow["obs"], "with channel.borrow() as message:"),
            (loan, lambda: loan.array(3), "with channel.loan() as loan:"),
            (loan, lambda: loan.buffer, "with channel.loan() as loan:"),
            (value, lambda: value.value, "with latest.borrow() as value:"),
        ):
            what = "loan" if one is loan else "borrow"
            name = latest.name if one is value else channel.name
            assert re.fullmatch(
                rf"<\w+ of channel '{name}', not begun: it needs a block, `{re.escape(call)}`>", repr(one)
            )
            with pytest.raises(ValueError, match=f"'{name}': this {what} has not begun: write `{re.escape(call)}`"):
                use()


def test_a_borrow_or_loan_says_that_its_block_has_ended() -> None:
    with Channel(2, 64) as channel, Latest(64) as latest:
        with channel.loan() as loan:
            loan.array(2)[...] = 1
            assert re.fullmatch(rf"<Loan of channel '{channel.name}', slot \d>", repr(loan))
        with channel.borrow() as borrow:
            assert re.fullmatch(rf"<Borrow of channel '{channel.name}', message 0 from process \d+>", repr(borrow))
        latest.publish(1)
        with latest.borrow() as value:
            assert repr(value) == f"<LatestBorrow of channel '{latest.name}', version 1>"
        for one, use in ((loan, lambda: loan.buffer), (borrow, lambda: borrow.value), (value, lambda: value.value)):
            assert repr(one).endswith(", ended>")
            with pytest.raises(ValueError, match=r"has ended: use it within, or copy what you need"):
                use()


def test_asynchronous_blocks_that_are_missing_say_so() -> None:
    with Channel(2, 64) as channel:
        borrow: Any = channel.aborrow()
        loan: Any = channel.aloan()
        assert "not begun: it needs a block, `async with channel.aborrow() as message:`" in repr(borrow)
        assert "not begun: it needs a block, `async with channel.aloan() as loan:`" in repr(loan)
        with pytest.raises(AttributeError, match=r"no attribute 'value' .*write `async with channel.aborrow"):
            print(borrow.value)
        with pytest.raises(AttributeError, match=r"no attribute 'buffer' .*write `async with channel.aloan"):
            print(loan.buffer)


# --- nothing came, and why


def test_empty_says_whether_a_sender_was_ever_there() -> None:
    with Channel(2, 64) as channel, Crew("fork") as crew:
        with pytest.raises(queue.Empty, match="no message came in time, and no sender was ever there: start one"):
            channel.get(timeout=0)
        handle = pickle.dumps(channel.sender())
        with pytest.raises(queue.Empty, match="no sender was there yet: wait longer for the processes"):
            channel.get(timeout=0.01)
        with pytest.raises(queue.Empty, match="no sender was there yet"):
            asyncio.run(channel.aget(timeout=0.01))
        pickle.loads(handle).close()
        crew.start(channel.put, 1).result()
        assert channel.get() == 1
        with pytest.raises((queue.Empty, EndOfChannel), match=r"in time.*: wait longer, or s|no sender any more"):
            channel.get(timeout=0)


def _use_and_die(act: Callable[[], Any]) -> None:
    act()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_call_whose_time_is_up_says_that_the_others_have_died() -> None:
    with Channel(1, 64, keep_open=True) as channel, Latest(64) as latest, Crew("fork") as crew:

        def use() -> None:
            latest.publish(channel.get())
            channel.put(2)

        channel.put(1)
        victim = crew.start(_use_and_die, use)
        with pytest.raises(Failed):
            victim.result()
        died = f"process {victim.pid} died"
        assert channel.get(timeout=60) == 2
        with pytest.raises(queue.Empty, match=rf"in time \(no other sender is left: {died}\): wait longer"):
            channel.get(timeout=0.5)  # more than a slice
        channel.put(1)
        with pytest.raises(queue.Full, match=rf"in time \(no other receiver is left: {died}\): receive faster"):
            channel.put(2, timeout=0.5)
        with pytest.raises(queue.Empty, match=rf"newest is 1 \(no other publisher is left: {died}\): wait longer"):
            latest.read(newer_than=1, timeout=0.5)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_receivers_are_told_how_many_messages_an_immediate_shutdown_has_dropped(asynchronous: bool) -> None:
    with Channel(4, 64) as channel, channel.receiver() as receiver:
        channel.put_many([1, 2, 3])
        channel.shutdown(immediate=True)
        channel.shutdown(immediate=True)
        for _ in range(2):
            with pytest.raises(EndOfChannel, match="was shut down; it dropped 3 of its messages unread"):
                asyncio.run(receiver.aget()) if asynchronous else receiver.get()
        assert channel.stats().dropped == 3


def test_what_was_dropped_before_a_shutdown_is_not_told_as_if_it_had_done_so() -> None:
    with Channel(2, 64, when_full="drop_oldest") as channel:
        channel.put_many([1, 2, 3])
        channel.shutdown()
        assert channel.get_many(2) == [2, 3]
        with pytest.raises(EndOfChannel, match="was shut down; all its messages were received"):
            channel.get()


# --- a name that is in use


MAIN = """
import multiprocessing, sys
import ringshm

channel = ringshm.Channel(2, 64, name={name!r})

def work():
    print("worked")

if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=work)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_main_module_that_makes_its_channel_again_in_a_child_is_told_of_the_main_guard(
    method: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "main.py"
    path.write_text(MAIN.format(name=name, method=method))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(rf"ChannelExists: .*channel '{name}' exists: .*make it under the main guard", done.stderr)
    with Channel(2, 64, name=name), pytest.raises(ringshm.ChannelExists, match="attach to it, or use another name"):
        Channel(2, 64, name=name)
