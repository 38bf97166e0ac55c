"""Clocks that stand still, and functions that gevent has replaced: every wait ends as it must all the same."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest
from support.workers import script

import ringshm

FROZEN = {
    "freezegun": "import freezegun; freezer = freezegun.freeze_time('2024-01-01')",
    "time_machine": "import time_machine; freezer = time_machine.travel('2024-01-01', tick=False)",
    "gevent": "import gevent.monkey, contextlib; gevent.monkey.patch_all(); freezer = contextlib.nullcontext()",
}
#: Where ringshm is imported: before the clock stands still, or while it does.
ORDERS = {
    "imported before": "import ringshm\n{freeze}\n",
    "imported after": "{freeze}\nfreezer.__enter__(); import ringshm; freezer.__exit__(None, None, None)\n",
}
WAITS = """
import asyncio, multiprocessing, os, queue, signal, sys
from ringshm import Channel, ChannelNotFound, EndOfChannel, Latest, wait

def refused(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error:
        return True
    return False

def send_and_be_killed(sender):
    sender.put(1)
    os.kill(os.getpid(), signal.SIGKILL)

with freezer:
    with Channel(1, 64) as channel:
        assert refused(queue.Empty, channel.get, timeout=0.1)
        assert refused(queue.Empty, channel.get_many, 3, timeout=0.1)
        assert wait([channel], timeout=0.1) == []
        channel.put(1)
        assert refused(queue.Full, channel.put, 2, timeout=0.1)
        assert refused(queue.Full, channel.put, bytes(1000), timeout=0.1)
        assert not channel.flush(timeout=0.1)
        assert not channel.wait_for_peers(senders=1, timeout=0.1)
        assert wait([channel], timeout=0.1) == [channel]
        assert channel.get() == 1

        async def call():
            assert await channel.aput(1, timeout=0.1) is None
            assert await channel.aget(timeout=0.1) == 1

        if sys.argv[1] != "gevent":
            asyncio.run(call())
    with Latest(64) as latest:
        latest.publish(1)
        assert refused(queue.Empty, latest.read, newer_than=1, timeout=0.1)
    assert refused(ChannelNotFound, Channel.attach, "nobody-makes-it", timeout=0.1)
    with Channel(4, 64) as channel:
        child = multiprocessing.get_context("fork").Process(target=send_and_be_killed, args=(channel.sender(),))
        child.start()
        assert list(channel) == [1]  # its death is found by the clock
        child.join()
print("all ended")
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("library", FROZEN)
def test_waits_end_whatever_stands_for_the_clock(library: str, order: str) -> None:
    pytest.importorskip(library)
    program = ORDERS[order].format(freeze=FROZEN[library]) + WAITS
    process = script(program, library, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert (output, errors) == ("all ended\n", "")


def test_a_channel_that_is_garbage_says_nothing_under_gevent() -> None:
    pytest.importorskip("gevent")
    program = """
import gevent.monkey
gevent.monkey.patch_all()
import gc, gevent, ringshm, select

def use():
    for _ in range(3):
        channel = ringshm.Channel(2, 64)
        channel.put(1)
        assert ringshm.wait([channel]) == [channel]
        assert select.select([channel], [], [], 0)[0] == [channel]
        channel.get()
        del channel
        gc.collect()

use()
gevent.spawn(use).get()
"""
    process = script(program, stderr=subprocess.PIPE)
    assert process.communicate() == ("", "")


def test_greenlets_of_a_thread_do_not_enter_each_others_calls() -> None:
    pytest.importorskip("gevent")
    program = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, ringshm

with ringshm.Channel(1, 64) as channel:
    with channel.loan() as loan:
        loan.buffer[:1] = b"x"

        def put():
            try:
                channel.put(2)  # this thread alone could end the loan, and it waits
            except ringshm.ChannelDeadlock:
                return "deadlock"

        print(gevent.spawn(put).get())
        loan.discard()
"""
    process = script(program, stderr=subprocess.PIPE)
    assert process.communicate() == ("deadlock\n", "")


#: What `system` gives, and has to be taken from there.
REPLACEABLE = {
    "time": {"monotonic", "monotonic_ns", "sleep"},
    "threading": {"Lock", "RLock", "get_ident"},
    "os": {"close"},
}


def test_nothing_that_libraries_replace_is_used_past_system() -> None:
    folder = Path(ringshm.__file__).parent
    found = []
    for path in folder.rglob("*.py"):
        if path.name == "system.py" or "tools" in path.parts:  # the command line is a program of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.attr in REPLACEABLE.get(node.value.id, ()):
                    found.append(f"{path.name}:{node.lineno} {node.value.id}.{node.attr}")
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {alias.name for alias in node.names} & REPLACEABLE.get(node.module or "", set())
                found += [f"{path.name}:{node.lineno} {name}" for name in names]
    assert not found
