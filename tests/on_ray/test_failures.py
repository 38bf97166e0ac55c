"""Whoever is killed, the others go on: nothing is lost but what its node took along, nothing comes twice unmarked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("ray")
import ray
from support.ray_actors import Receives, Sends, in_order
from support.ray_nodes import ROOT, Nodes, comes, on

import ringshm.ray
from ringshm.ray import calls


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
    receivers = [Receives.options(**on(1, max_concurrency=2)).remote(channel.receiver()) for _ in range(2)]
    pid = ray.get(receivers[0].pid.remote())
    out.put((0, 0, None))
    holding = receivers[0].hold.remote()
    assert ray.get(receivers[0].held.remote()) == 1
    out.put((0, 1, None))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(holding)
    out.close()
    channel.close()
    assert sorted(ray.get(receivers[1].receive_counted.remote())) == [(0, 2), (1, 1)]
    ray.kill(receivers[1])


def test_what_the_only_receiver_of_a_node_had_not_finished_goes_to_another_node() -> None:
    channel = ringshm.ray.Channel(4, "1KiB")
    out, here = channel.sender(), channel.receiver()
    there = Receives.options(**on(1, max_concurrency=2)).remote(channel.receiver())
    pid = ray.get(there.pid.remote())
    out.put((0, 0, None))
    there.hold.remote()
    ray.get(there.held.remote())
    out.put((0, 1, None))
    comes(lambda: not channel.qsize())
    os.kill(pid, signal.SIGKILL)
    assert sorted(here.get(timeout=60)[:2] for _ in range(2)) == [(0, 0), (0, 1)]
    for handle in (here, out, channel):
        handle.close()


def test_what_a_relay_has_not_sent_yet_waits_for_the_next_one_when_all_senders_have_gone() -> None:
    with ringshm.ray.Channel(4, "1KiB") as channel:
        actor = Sends.options(**on(1)).remote(channel.sender())
        ray.get(actor.send.remote(0, 50))
        _, outpost = relay_names(ringshm.ray.status()[0])
        kill_actor(outpost)
        ray.get(actor.close.remote())
        in_order([message[:2] for message in channel], 1, 50)


@pytest.mark.parametrize("which", ["home", "outpost"])
def test_receivers_elsewhere_go_on_when_a_relay_was_killed_and_what_comes_again_is_marked(which: str) -> None:
    channel = ringshm.ray.Channel(8, "4KiB")
    out = channel.sender()
    receivers = [Receives.options(**on(1)).remote(channel.receiver()) for _ in range(2)]
    received = [receiver.receive_counted.remote() for receiver in receivers]
    for k in range(300):
        out.put((0, k, None))
        if k == 100:
            home, outpost = relay_names(ringshm.ray.status()[0])
            kill_actor(home if which == "home" else outpost)
    out.close()
    channel.close()
    counts: dict[int, list[int]] = {}
    for some in ray.get(received):
        for k, count in some:
            counts.setdefault(k, []).append(count)
    assert sorted(counts) == [*range(300)]
    assert all(sorted(some)[1:] == [count for count in sorted(some)[1:] if count > 1] for some in counts.values())


def kill_two_that_hold_it(channel: Any) -> None:
    """The message that waits is borrowed on the other node, twice, by a receiver that dies."""
    for count in (1, 2):
        there = Receives.options(**on(1, max_concurrency=2)).remote(channel.receiver())
        there.hold.remote()
        assert ray.get(there.held.remote()) == count
        ray.kill(there)


def test_how_often_receivers_have_died_of_a_message_is_told_wherever_it_goes() -> None:
    channel = ringshm.ray.Channel(4, "1KiB", max_deliveries=5)
    out, here = channel.sender(), channel.receiver()
    out.put((0, 0, None))
    kill_two_that_hold_it(channel)
    with here.borrow(timeout=60) as message:
        assert message.value[:2] == (0, 0) and message.delivery_count == 3
        message.requeue()
    there = Receives.options(**on(1)).remote(channel.receiver())
    received = there.receive_counted.remote()
    for handle in (here, out, channel):
        handle.close()
    assert ray.get(received) == [(0, 3)]


def test_a_message_of_which_too_many_receivers_have_died_on_any_node_is_dropped() -> None:
    channel = ringshm.ray.Channel(4, "1KiB", max_deliveries=2)
    out, here = channel.sender(), channel.receiver()
    out.put((0, 0, None))
    kill_two_that_hold_it(channel)
    out.put((0, 1, None))
    assert here.get(timeout=60)[:2] == (0, 1)
    for handle in (here, out, channel):
        handle.close()


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
