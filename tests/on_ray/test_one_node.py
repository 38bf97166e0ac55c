"""Handles, on one node or from another: whatever way Ray takes them, their number is what counts."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
from support.ray_actors import Receives, Sends, in_order
from support.ray_nodes import ROOT, on

import ringshm
import ringshm.ray
from ringshm import ChannelClosed, EndOfChannel, RingshmError


def drain(source: Any) -> list[tuple[int, int]]:
    return [(who, k) for who, k, _ in source]


def test_a_loop_of_the_maker_ends_when_the_last_actor_has_gone() -> None:
    with ringshm.ray.Channel(8, "4KiB") as channel:
        actors = [Sends.options(**on(0)).remote(channel.sender()) for _ in range(3)]
        for who, actor in enumerate(actors):
            actor.send.remote(who, 200)
        del actors, actor
        in_order(drain(channel), 3, 200)


def test_a_handle_that_was_put_into_the_object_store_is_unpickled_by_an_actor_that_comes_later() -> None:
    channel = ringshm.ray.Channel(8, "4KiB")
    source = channel.receiver()
    stored = ray.put(channel.sender())
    channel.close()
    with pytest.raises(queue.Empty):
        source.get(timeout=1)  # nobody has it yet, and it counts
    actor = Sends.options(**on(0)).remote(stored)
    ray.get(actor.send.remote(0, 5))
    del actor
    in_order(drain(source), 1, 5)
    source.close()


@pytest.mark.parametrize("node", [0, 1])
def test_a_restarted_actor_goes_on_with_its_old_handle(node: int) -> None:
    channel = ringshm.ray.Channel(8, "4KiB")
    source = channel.receiver()
    actor = Sends.options(**on(node, max_restarts=1, max_task_retries=-1)).remote(channel.sender())
    channel.close()
    ray.get(actor.send.remote(0, 3))
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    ray.get(actor.send.remote(1, 3))
    del actor
    got = drain(source)
    assert got == [(0, k) for k in range(3)] + [(1, k) for k in range(3)]
    source.close()


def test_a_task_that_ray_runs_again_keeps_the_stream_open_meanwhile(tmp_path: Any) -> None:
    @ray.remote(max_retries=2)
    def dies_once(out: Any, path: str) -> None:
        out.put(0)
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        out.put(1)

    channel = ringshm.ray.Channel(8, "4KiB")
    source = channel.receiver()
    done = dies_once.options(**on(0)).remote(channel.sender(), str(tmp_path / "died"))
    channel.close()
    assert list(source) == [0, 0, 1]
    ray.get(done)
    source.close()


@pytest.mark.parametrize("node", [0, 1])
def test_a_handle_in_a_closure_does_not_keep_the_stream_open_when_its_workers_are_idle(node: int) -> None:
    channel = ringshm.ray.Channel(8, "4KiB")
    source, out = channel.receiver(), channel.sender()

    @ray.remote
    def sends(k: int) -> int:
        out.put(k)
        return k

    assert [ray.get(sends.options(**on(node)).remote(k)) for k in range(3)] == [0, 1, 2]
    channel.close()
    assert list(source) == [0, 1, 2]
    source.close()


def test_a_killed_sender_ends_the_stream_and_a_killed_receiver_breaks_it() -> None:
    channel = ringshm.ray.Channel(4, "4KiB")
    sender = Sends.options(**on(0)).remote(channel.sender())
    receiver = Receives.options(**on(0)).remote(channel.receiver())
    channel.close()
    received = receiver.receive.remote(5)
    broken = sender.send_until_broken.remote(0)
    assert len(ray.get(received)[0]) == 5
    ray.kill(receiver)
    assert "has no receiver any more: actor" in ray.get(broken)
    ray.kill(sender)


def test_a_learner_that_dies_before_its_first_get_does_not_leave_senders_waiting() -> None:
    channel = ringshm.ray.Channel(4, "4KiB")
    sender = Sends.options(**on(0)).remote(channel.sender())
    receiver = Receives.options(**on(0)).remote(channel.receiver())
    channel.close()
    broken = sender.send_until_broken.remote(0)
    pid = ray.get(receiver.pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert "died" in ray.get(broken)
    ray.kill(sender)


def test_a_handle_whose_holders_have_all_closed_it_cannot_be_unpickled_again() -> None:
    with ringshm.ray.Channel(4, "4KiB") as channel:
        handle = channel.sender()
        actor = Sends.options(**on(0)).remote()
        ray.get(actor.take.remote([handle]))
        ray.get(actor.close.remote())
        with pytest.raises(ray.exceptions.RayError, match="was unpickled before"):
            ray.get(Sends.options(**on(0)).remote(handle).pid.remote())
        with pytest.raises(ChannelClosed, match="was unpickled before"):
            handle.put(1)


def test_what_is_outstanding_is_told_and_what_makes_no_sense_is_refused() -> None:
    with ringshm.ray.Channel(4, "4KiB", name="rollouts") as channel:
        with pytest.raises(TypeError, match=r"hand out channel\.sender"):
            ray.put(channel)
        with pytest.raises(TypeError, match="keep_open"):
            ringshm.ray.Channel(4, "4KiB", keep_open=True)
        with pytest.raises(RingshmError, match="rollouts"):
            ringshm.ray.Channel(4, "4KiB", name="rollouts")
        handle = channel.sender()
        (record,) = ringshm.ray.status()
        (handed,) = record.handles.values()
        assert record.named == "rollouts" and handed.counts and not handed.arrived
        assert "test_one_node.py" in handed.made_at
        with channel.receiver() as source:
            handle.put("x")
            assert source.get() == "x"
            handle.close()
            channel.close()
            with pytest.raises(EndOfChannel):
                source.get()


_TWICE = """
import ray
import ringshm.ray

for _ in range(2):
    ray.init("local", num_cpus=1, include_dashboard=False, namespace="the same")
    with ringshm.ray.Channel(4, "1KiB") as channel, channel.receiver() as source:
        ray.get(ray.remote(lambda sender: sender.put(7)).remote(channel.sender()))
        print(source.get())
    ray.shutdown()
"""


@pytest.mark.slow(seconds=60)
def test_a_process_may_connect_to_ray_once_more() -> None:
    """As notebooks do, and tests: actors of the connection before are not those of this one."""
    program = subprocess.run(
        [sys.executable, "-c", _TWICE], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert (program.returncode, program.stdout) == (0, "7\n7\n"), program.stderr
