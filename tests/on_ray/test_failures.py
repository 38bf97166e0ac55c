"""Whoever is killed, the others go on: nothing is lost but what its node took along, nothing comes twice unmarked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

pytest.importorskip("ray")
import ray
from support.ray_actors import Receives, Sends
from support.ray_nodes import ROOT, Nodes, comes, on

import ringshm.ray
from ringshm.ray import calls


def in_order(got: list[tuple[int, int]], senders: int, count: int) -> None:
    """Each message once, those of each sender in order."""
    for who in range(senders):
        assert [k for one, k in got if one == who] == [*range(count)]
    assert len(got) == senders * count


def pid_of_actor(name: str) -> int:
    """The process of one of ringshm's own actors."""
    from ray._private.state import state

    (found,) = [one for one in state.actor_table(None).values() if one["Name"] == name and one["State"] == "ALIVE"]
    return int(found["Pid"])


def kill_actor(name: str) -> None:
    os.kill(pid_of_actor(name), signal.SIGKILL)


def relay_names(record: Any) -> tuple[str, str]:
    """Of the relay at home, and of the one at the outpost."""
    (place,) = record.outposts
    return calls.relay_name(record.id, record.home.place), calls.relay_name(record.id, place)


@pytest.mark.parametrize("which", ["ingress", "egress"])
def test_a_relay_is_killed_amid_messages_and_none_is_lost_or_doubled(which: str) -> None:
    with ringshm.ray.Channel(8, "4KiB") as channel:
        actors = [Sends.options(**on(1)).remote(channel.sender()) for _ in range(2)]
        for who, actor in enumerate(actors):
            actor.send.remote(who, 400, 100, 0.005)
        del actors, actor
        got = [channel.get(timeout=60)[:2] for _ in range(100)]
        home, outpost = relay_names(ringshm.ray.status()[0])
        kill_actor(home if which == "ingress" else outpost)
        got += [message[:2] for message in channel]
        in_order(got, 2, 400)


def test_the_registry_is_killed_amid_messages_and_knows_all_again() -> None:
    with ringshm.ray.Channel(8, "4KiB") as channel:
        actors = [Sends.options(**on(node)).remote(channel.sender()) for node in (0, 1)]
        for who, actor in enumerate(actors):
            actor.send.remote(who, 300, 0, 0.005)
        later = channel.sender()
        got = [channel.get(timeout=60)[:2] for _ in range(100)]
        kill_actor(calls.registry_name("tests"))
        third = Sends.options(**on(1)).remote(later)
        third.send.remote(2, 300)
        del actors, actor, third
        got += [message[:2] for message in channel]
        in_order(got, 3, 300)


def test_a_killed_sender_elsewhere_ends_the_stream_with_what_it_had_put() -> None:
    with ringshm.ray.Channel(8, "4KiB") as channel:
        actor = Sends.options(**on(1)).remote(channel.sender())
        pid = ray.get(actor.pid.remote())
        ray.get(actor.send.remote(0, 5))
        actor.send.remote(1, 10**6, 0, 0.01)
        got = [channel.get(timeout=60)[:2] for _ in range(20)]
        os.kill(pid, signal.SIGKILL)
        got += [message[:2] for message in channel]
        assert got[:5] == [(0, k) for k in range(5)] and got[5:] == [(1, k) for k in range(len(got) - 5)]


def test_what_a_killed_receiver_elsewhere_had_borrowed_comes_again() -> None:
    channel = ringshm.ray.Channel(4, "1KiB")
    out = channel.sender()
    receivers = [Receives.options(**on(1)).remote(channel.receiver()) for _ in range(2)]
    pid = ray.get(receivers[0].pid.remote())
    out.put((0, 0, None))
    holding = receivers[0].hold.remote(1000)
    comes(lambda: not channel.qsize())
    out.put((0, 1, None))
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(holding)
    out.close()
    channel.close()
    assert sorted(ray.get(receivers[1].receive.remote())[0]) == [(0, 0), (0, 1)]
    ray.kill(receivers[1])


def test_what_the_only_receiver_of_a_node_had_not_finished_goes_to_another_node() -> None:
    channel = ringshm.ray.Channel(4, "1KiB")
    out, here = channel.sender(), channel.receiver()
    there = Receives.options(**on(1)).remote(channel.receiver())
    pid = ray.get(there.pid.remote())
    out.put((0, 0, None))
    there.hold.remote(1000)
    comes(lambda: not channel.qsize())
    out.put((0, 1, None))
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    assert sorted(here.get(timeout=60)[:2] for _ in range(2)) == [(0, 0), (0, 1)]
    for handle in (here, out, channel):
        handle.close()


def test_a_restarted_actor_elsewhere_goes_on_with_its_old_handle() -> None:
    channel = ringshm.ray.Channel(8, "4KiB")
    source = channel.receiver()
    actor = Sends.options(**on(1, max_restarts=1, max_task_retries=-1)).remote(channel.sender())
    channel.close()
    ray.get(actor.send.remote(0, 3))
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    ray.get(actor.send.remote(1, 3))
    del actor
    assert [message[:2] for message in source] == [(0, k) for k in range(3)] + [(1, k) for k in range(3)]
    source.close()


def test_a_worker_elsewhere_whose_handle_came_by_a_closure_does_not_keep_the_stream_open() -> None:
    channel = ringshm.ray.Channel(8, "4KiB")
    source, out = channel.receiver(), channel.sender()

    @ray.remote
    def sends(k: int) -> int:
        out.put(k)
        return k

    assert [ray.get(sends.options(**on(1)).remote(k)) for k in range(3)] == [0, 1, 2]
    channel.close()
    assert list(source) == [0, 1, 2]
    source.close()


def test_a_node_comes_late_and_is_killed_and_what_it_had_taken_comes_again_marked(cluster: Nodes) -> None:
    cluster.start(2)
    try:
        channel = ringshm.ray.Channel(8, "1KiB")
        out, here = channel.sender(), channel.receiver()
        there = Receives.options(**on(2)).remote(channel.receiver())
        sender = Sends.options(**on(2)).remote(channel.sender())
        ray.get(sender.send.remote(1, 5))
        ray.get(there.receive.remote(5))
        out.put((0, 0, None))
        there.hold.remote(1000)
        comes(lambda: not channel.qsize())
        time.sleep(0.5)
        cluster.kill(2)
        with here.borrow(timeout=60) as message:
            assert message.value[:2] == (0, 0) and message.delivery_count == 2
        lost = comes(lambda: ringshm.ray.status()[0].lost)
        assert "died or left" in lost[0]
        out.close()
        channel.close()
        assert list(here) == []
        here.close()
    finally:
        if cluster.id_of(2):
            cluster.kill(2)


DRIVER = """
import sys
import ray, ringshm.ray
import ray._private.services as services
services.node_ip_address_from_perspective = lambda address=None: "127.0.0.1"
ray.init(address=sys.argv[1], namespace="another", logging_level="ERROR", log_to_driver=False)
from support.ray_actors import Sends
from support.ray_nodes import on
channel = ringshm.ray.Channel(8, "1KiB", name="of a driver that ends")
actor = Sends.options(**on(1)).remote(channel.sender())
ray.get(actor.send.remote(0, 3))
print(len(ringshm.ray.status()), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_a_driver_that_goes_takes_its_channels_along(cluster: Nodes, how: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert driver.stdout is not None and driver.stdin is not None
    assert driver.stdout.readline() == "1\n"
    assert len(ringshm.ray.status("another")) == 1
    if how == "ends":
        driver.communicate("\n")
    else:
        driver.kill()
        driver.communicate()
    comes(lambda: not ringshm.ray.status("another"))
