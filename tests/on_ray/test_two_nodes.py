"""Messages between nodes: order, end, backpressure, and who went."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")
import ray
from support.ray_actors import Receives, Sends, in_order
from support.ray_nodes import on

import ringshm.ray


@pytest.mark.parametrize("nbytes", [0, 3000, 100_000], ids=["small", "a slot", "larger than a slot"])
def test_senders_on_both_nodes_reach_the_maker_in_order_and_the_stream_ends(nbytes: int) -> None:
    with ringshm.ray.Channel(4, "4KiB") as channel:
        actors = [Sends.options(**on(node)).remote(channel.sender()) for node in (0, 1, 1)]
        for who, actor in enumerate(actors):
            actor.send.remote(who, 50, nbytes)
        del actors, actor
        got = []
        for who, k, payload in channel:
            assert len(payload) == nbytes and (payload == k % 251).all()
            got.append((who, k))
        in_order(got, 3, 50)


def test_typed_messages_and_loans_cross_nodes() -> None:
    @ray.remote
    def sends(out: Any) -> None:
        for k in range(20):
            with out.loan() as loan:
                loan["obs"][...] = k
                loan["reward"] = k

    spec = {"obs": ("u1", (84, 84, 4)), "reward": "f4"}
    with ringshm.ray.Channel(8, spec=spec) as channel:
        done = sends.options(**on(1)).remote(channel.sender())
        batch = channel.get_batch(8)
        assert batch["reward"].tolist() == [*range(8)] and (batch["obs"][3] == 3).all()
        rest = [int(message["reward"]) for message in channel]
        assert rest == [*range(8, 20)]
        ray.get(done)


def test_receivers_on_both_nodes_get_each_message_once_and_the_end() -> None:
    channel = ringshm.ray.Channel(8, "4KiB")
    receivers = [Receives.options(**on(node)).remote(channel.receiver()) for node in (0, 1, 1)]
    senders = [Sends.options(**on(node)).remote(channel.sender()) for node in (0, 1)]
    channel.close()
    received = [receiver.receive.remote() for receiver in receivers]
    ray.get([sender.send.remote(who, 100) for who, sender in enumerate(senders)])
    del senders
    ends = ray.get(received)
    got = [message for some, _ in ends for message in some]
    assert sorted(got) == [(who, k) for who in range(2) for k in range(100)]
    for some, _ in ends:
        for who in range(2):
            assert [k for one, k in some if one == who] == sorted(k for one, k in some if one == who)
    assert all("has no sender any more" in end for _, end in ends)
    assert any(some for some, _ in ends[1:])


def test_a_receiver_on_another_node_alone_gets_all() -> None:
    channel = ringshm.ray.Channel(4, "4KiB")
    receiver = Receives.options(**on(1)).remote(channel.receiver())
    received = receiver.receive.remote()
    with channel.sender() as out:
        for k in range(100):
            out.put((0, k, np.full(2000, k, np.uint8)))
        assert out.flush(30)
        channel.close()
    got, _ = ray.get(received)
    in_order(got, 1, 100)


def test_a_full_ring_at_home_blocks_senders_elsewhere() -> None:
    with ringshm.ray.Channel(4, "1KiB") as channel:
        actor = Sends.options(**on(1)).remote(channel.sender())
        sending = actor.send.remote(0, 1500)  # more than both rings hold
        assert channel.get(timeout=60)[1] == 0
        assert not ray.wait([sending], timeout=2)[0]
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(sending, timeout=0.1)
        assert [channel.get(timeout=60)[1] for _ in range(1499)] == [*range(1, 1500)]
        ray.get(sending)


def test_flush_waits_for_the_receiver_not_for_the_ring_on_the_way() -> None:
    with ringshm.ray.Channel(16, "1KiB") as channel:
        actor = Sends.options(**on(1)).remote(channel.sender())
        ray.get(actor.send.remote(0, 5))
        assert not ray.get(actor.flush.remote(1.0))
        flushed = actor.flush.remote(60)
        for _ in range(4):
            channel.get(timeout=30)
        assert not ray.wait([flushed], timeout=1)[0]
        channel.get(timeout=30)
        assert ray.get(flushed)


def test_time_outs_hold_on_another_node() -> None:
    with ringshm.ray.Channel(2, "1KiB") as channel:
        source = Receives.options(**on(1)).remote(channel.receiver())
        with pytest.raises(queue.Empty):
            ray.get(source.call.remote("get", True, 0.3))
        out = Sends.options(**on(1)).remote(channel.sender())
        assert ray.get(out.call.remote("put_many", [1, 2], 5)) == 2
        ray.get(source.close.remote())


def test_a_sender_elsewhere_is_told_that_the_receiver_has_died() -> None:
    channel = ringshm.ray.Channel(4, "1KiB")
    receiver = Receives.options(**on(0)).remote(channel.receiver())
    sender = Sends.options(**on(1)).remote(channel.sender())
    channel.close()
    broken = sender.send_until_broken.remote(0)
    ray.get(receiver.receive.remote(3))
    ray.kill(receiver)
    text = ray.get(broken)
    assert "has no receiver any more: actor" in text and "died" in text


def test_a_handle_that_visits_another_node_can_be_passed_on() -> None:
    @ray.remote
    def passes_on(handle: list[Any], to: Any) -> None:
        ray.get(to.take.remote(handle))

    with ringshm.ray.Channel(4, "1KiB") as channel:
        actor = Sends.options(**on(0)).remote()
        ray.get(passes_on.options(**on(1)).remote([channel.sender()], actor))
        actor.send.remote(0, 10)
        del actor
        assert [k for _, k, _ in channel] == [*range(10)]


def test_a_shutdown_reaches_all_nodes() -> None:
    channel = ringshm.ray.Channel(4, "1KiB")
    sender = Sends.options(**on(1)).remote(channel.sender())
    receiver = Receives.options(**on(1)).remote(channel.receiver())
    received = receiver.receive.remote()
    ray.get(sender.send.remote(0, 3))
    ray.get(sender.flush.remote(30))
    ray.get(sender.call.remote("shutdown"))
    got, end = ray.get(received)
    assert got == [(0, 0), (0, 1), (0, 2)] and "shut down" in end
    channel.close()
