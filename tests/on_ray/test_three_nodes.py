"""A third node: it works as the others, comes late, leaves, and dies, also as home of a channel or of a Latest."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("ray")
import ray
from support.ray_actors import Holds, Makes, Receives, Sends, in_order
from support.ray_nodes import Nodes, comes, on

import ringshm.ray
from ringshm.ray.relays import _heard
from ringshm.segment.ledger import Ledger


def test_senders_and_receivers_on_three_nodes_pass_each_message_once_in_order(third: Nodes) -> None:
    channel = ringshm.ray.Channel(8, "4KiB")
    receivers = [Receives.options(**on(node)).remote(channel.receiver()) for node in (0, 1, 2)]
    senders = [Sends.options(**on(node)).remote(channel.sender()) for node in (0, 1, 2, 2)]
    channel.close()
    received = [receiver.receive.remote() for receiver in receivers]
    ray.get([sender.send.remote(who, 100, 1000) for who, sender in enumerate(senders)])
    del senders
    ends = ray.get(received)
    assert sorted(message for some, _ in ends for message in some) == [(who, k) for who in range(4) for k in range(100)]
    for some, end in ends:
        assert "has no sender any more" in end
        for who in range(4):
            assert [k for one, k in some if one == who] == sorted(k for one, k in some if one == who)


def test_senders_on_three_nodes_reach_a_receiver_on_one_in_order(third: Nodes) -> None:
    channel = ringshm.ray.Channel(4, "4KiB")
    receiver = Receives.options(**on(1)).remote(channel.receiver())
    senders = [Sends.options(**on(node)).remote(channel.sender()) for node in (0, 1, 2)]
    channel.close()
    for who, sender in enumerate(senders):
        sender.send.remote(who, 100, 2000)
    del senders, sender
    in_order(ray.get(receiver.receive.remote())[0], 3, 100)


def test_what_a_node_that_is_killed_had_taken_comes_again_marked(third: Nodes) -> None:
    channel = ringshm.ray.Channel(8, "1KiB")
    out, here = channel.sender(), channel.receiver()
    there = Receives.options(**on(2, max_concurrency=2)).remote(channel.receiver())
    sender = Sends.options(**on(2)).remote(channel.sender())
    ray.get(sender.send.remote(1, 5))
    ray.get(there.receive.remote(5))
    out.put((0, 0, None))
    there.hold.remote()
    ray.get(there.held.remote())
    comes(lambda: [ring.in_flight for ring in ringshm.ray.status()[0].rings if ring.what == "home"] == [1])
    third.kill(2)
    with here.borrow(timeout=60) as message:
        assert message.value[:2] == (0, 0) and message.delivery_count == 2
    lost = comes(lambda: [one for one in ringshm.ray.status()[0].lost if one.messages is not None])
    assert lost[0].messages == 0 and "died or left, and with it 0 messages" in str(lost[0])
    out.close()
    channel.close()
    assert list(here) == []
    here.close()


def test_what_a_node_that_is_killed_takes_along_is_counted_and_named(third: Nodes) -> None:
    with ringshm.ray.Channel(4, "1KiB") as channel:
        sender = Sends.options(**on(2)).remote(channel.sender())
        ray.get(sender.send.remote(0, 100))  # which stand in the ring there, but for a few
        (record,) = ringshm.ray.status()
        (outpost,) = record.outposts.values()
        ledger = Ledger(record.home.nonce)
        ledger.reserve(_heard(outpost.number) + 1)
        comes(lambda: ledger.words[_heard(outpost.number)] == 100)
        third.kill(2)
        got = [message[:2] for message in channel]
        assert got == [(0, k) for k in range(len(got))] and 4 <= len(got) < 100
        (lost,) = comes(lambda: [one for one in ringshm.ray.status()[0].lost if one.messages is not None])
        assert lost.messages == 100 - len(got) and lost.node == outpost.node
        assert f"{lost.messages} messages that its senders had put" in str(ringshm.ray.status()[0])


def test_a_node_that_leaves_ends_its_senders_and_nothing_is_lost_that_was_flushed(third: Nodes) -> None:
    with ringshm.ray.Channel(8, "1KiB") as channel:
        stays, leaves = (Sends.options(**on(node)).remote(channel.sender()) for node in (1, 2))
        leaves.send.remote(1, 50)
        flushed = leaves.flush.remote(60)
        got = [channel.get(timeout=60)[:2] for _ in range(50)]
        assert ray.get(flushed)
        third.leave(2)
        ray.get(stays.send.remote(0, 50))
        del stays
        got += [message[:2] for message in channel]
        in_order(got, 2, 50)


def test_a_node_that_comes_late_again_and_again_reads_the_newest_and_leaves(cluster: Nodes) -> None:
    with ringshm.ray.Latest("64KiB") as latest, ringshm.ray.Channel(8, "1KiB") as channel:
        near = Holds.options(**on(1)).remote(latest)
        for round in range(2):
            latest.publish(("early", round))
            cluster.start(2)
            late = Holds.options(**on(2)).remote(latest)
            version = latest.version
            assert ray.get(late.read.remote(None, 0)) == (version, ("early", round))
            seen = late.read.remote(version)
            latest.publish(("later", round))
            assert ray.get(seen) == (version + 1, ("later", round))
            sender = Sends.options(**on(2)).remote(channel.sender())
            ray.get(sender.send.remote(round, 5))
            assert [channel.get(timeout=60)[:2] for _ in range(5)] == [(round, k) for k in range(5)]
            cluster.leave(2)
            assert ray.get(near.read.remote(version)) == (version + 1, ("later", round))


def test_all_are_told_when_the_node_that_is_home_of_a_channel_dies(third: Nodes) -> None:
    maker = Makes.options(**on(2)).remote()
    ray.get(maker.channel.remote(4, "1KiB"))
    sender, receiver = Sends.options(**on(1)).remote(), Receives.options(**on(0)).remote()
    ray.get(sender.take.remote(maker.hand_out.remote("sender")))
    ray.get(receiver.take.remote(maker.hand_out.remote("receiver")))
    broken, received = sender.send_until_broken.remote(0), receiver.receive.remote()
    flushes = Sends.options(**on(1)).remote()
    ray.get(flushes.take.remote(maker.hand_out.remote("sender")))
    time.sleep(1)
    third.kill(2)
    text = ray.get(broken)
    assert "has no receiver any more: actor" in text and "whose node died or left" in text
    got, end = ray.get(received)
    assert got == [(0, k) for k in range(len(got))]
    assert "has no sender any more: actor" in end and "whose node died or left" in end
    with pytest.raises(ray.exceptions.RayError, match="has no receiver any more"):
        ray.get(flushes.send.remote(1, 1000))
    assert "it was home, and what waited in the ring there is lost" in str(ringshm.ray.status()[0])
    for actor in (sender, receiver, flushes):
        ray.kill(actor)


def test_all_are_told_when_the_node_that_is_home_of_a_latest_dies_and_readers_keep_what_they_have(
    third: Nodes,
) -> None:
    maker = Makes.options(**on(2)).remote()
    boxed = maker.latest.remote("64KiB")
    near, far = (Holds.options(**on(node)).remote() for node in (0, 1))
    publisher = Holds.options(**on(1)).remote()
    ray.get([holder.take.remote(boxed) for holder in (near, far, publisher)])
    del boxed
    assert ray.get(maker.call.remote("publish", "the last")) == 1
    assert ray.get([reader.read.remote(0) for reader in (near, far)]) == [(1, "the last")] * 2
    waiting = [reader.read_to_the_end.remote() for reader in (near, far)]
    third.kill(2)
    with pytest.raises(ray.exceptions.RayError, match=r"takes no value any more: its home, node .* died or left"):
        ray.get(publisher.publish.remote("too late"))
    for version, told in ray.get(waiting):
        assert version == 1 and "has no publisher any more: actor" in told and "whose node died or left" in told
    assert ray.get([reader.read.remote(None, 0) for reader in (near, far)]) == [(1, "the last")] * 2
    for actor in (near, far, publisher):
        ray.kill(actor)


def test_nodes_that_share_a_dev_shm_share_rings_and_the_other_goes_on_with_them_when_one_dies(third: Nodes) -> None:
    third.start(3, beside=2)
    try:
        with ringshm.ray.Channel(8, "1KiB") as channel:
            for node in (2, 3):  # one after the other: the first has the relay
                sender = Sends.options(**on(node)).remote(channel.sender())
                ray.get(sender.send.remote(node - 2, 5))
            (outpost,) = ringshm.ray.status()[0].outposts.values()
            assert outpost.node == third.id_of(2)
            in_order([channel.get(timeout=60)[:2] for _ in range(10)], 2, 5)
            third.kill(2)
            ray.get(sender.send.remote(0, 5))
            assert [channel.get(timeout=60)[:2] for _ in range(5)] == [(0, k) for k in range(5)]
            ray.kill(sender)
            assert not list(channel)
            assert not ringshm.ray.status()[0].lost
    finally:
        third.kill(3)
