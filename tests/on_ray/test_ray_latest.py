"""A Latest on two nodes: the same versions, the newest for all, and what becomes of it when somebody dies."""

from __future__ import annotations

import os
import queue
import signal
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

import ray
from support.ray_actors import Holds
from support.ray_nodes import comes, on

import ringshm
import ringshm.ray
from ringshm import ChannelClosed, PayloadTooLarge
from ringshm.ray import calls

SPEC = {"w": (np.float32, (1000,)), "step": np.int64}


def relay_at(latest: Any, node: int) -> Any:
    """The relay at a node."""
    record = next(one for one in ringshm.ray.status() if one.home.name == latest.name)
    return calls.relay(record.id, record.home.place if node == 0 else next(iter(record.outposts)))


def test_readers_of_both_nodes_see_the_publishers_versions_and_the_newest_at_the_end() -> None:
    with ringshm.ray.Latest("64KiB") as latest:
        readers = [Holds.options(**on(node)).remote(latest) for node in (0, 1, 1)]
        seen = [reader.read_until.remote(200) for reader in readers]
        for k in range(1, 201):
            assert latest.publish((k, np.full(5000, k))) == k
        for versions in ray.get(seen):
            numbers = [version for version, _ in versions]
            assert numbers == sorted(set(numbers)) and numbers[-1] == 200
            assert all(k == version and (array == version).all() for version, (k, array) in versions)


def test_one_that_comes_late_reads_the_newest_without_waiting() -> None:
    with ringshm.ray.Latest("64KiB") as latest:
        for k in range(5):
            latest.publish(k)
        first = Holds.options(**on(1)).remote(latest)
        assert ray.get(first.read.remote(None, 0)) == (5, 4)
        ray.get(first.close.remote())
        latest.publish("while nobody there reads")
        second = Holds.options(**on(1)).remote(latest)
        assert ray.get(second.read.remote(None, 0)) == (6, "while nobody there reads")


def test_a_typed_value_is_borrowed_where_it_lies_on_each_node() -> None:
    with ringshm.ray.Latest(spec=SPEC, borrows=2) as latest:
        latest.publish({"w": np.ones(1000, np.float32), "step": 1})
        for node in (0, 1):
            assert ray.get(Holds.options(**on(node)).remote(latest).borrow.remote()) == (1, 1000.0, False, 2)
        far = Holds.options(**on(1)).remote(latest)
        assert ray.get(far.publish.remote({"w": np.full(1000, 2, np.float32), "step": 2})) == 2
        version, value = latest.read()
        assert (version, value["step"], value["w"].sum()) == (2, 2, 2000)


def test_a_value_published_elsewhere_has_the_next_version_everywhere() -> None:
    with ringshm.ray.Latest("64KiB") as latest:
        near, far = (Holds.options(**on(node)).remote(latest) for node in (0, 1))
        assert latest.publish("a") == 1
        assert ray.get(far.publish.remote({"b": np.arange(1000)})) == 2
        version, value = latest.read(newer_than=1, timeout=30)
        assert version == 2 and (value["b"] == np.arange(1000)).all()
        assert ray.get(near.publish.remote("c")) == 3
        assert ray.get(far.read.remote(2)) == (3, "c")
        with pytest.raises(PayloadTooLarge):
            ray.get(far.publish.remote(bytes(100_000)))


def test_it_is_passed_on_and_stored_for_any_number_of_readers() -> None:
    with ringshm.ray.Latest("64KiB", name="weights") as latest:
        latest.publish("x")
        stored = ray.put([latest])
        far = Holds.options(**on(1)).remote()
        ray.get(far.take.remote(stored))
        forwarded = far.forward.remote()
        others = [Holds.options(**on(node)).remote() for node in (0, 1)]
        for other in others:
            ray.get(other.take.remote(forwarded))
            assert ray.get(other.read.remote()) == (1, "x")
        assert ray.get(others[0].name.remote()) == "weights"
        again = Holds.options(**on(0)).remote()
        ray.get(again.take.remote(stored))
        assert ray.get(again.read.remote()) == (1, "x")


def test_readers_are_told_when_the_publisher_has_closed_it_and_have_all_that_it_published() -> None:
    latest = ringshm.ray.Latest("64KiB")
    readers = [Holds.options(**on(node)).remote(latest) for node in (0, 1)]
    ends = [reader.read_to_the_end.remote() for reader in readers]
    for k in range(50):
        latest.publish(k)
    latest.close()
    for version, told in ray.get(ends):
        assert version == 50 and "has no publisher any more: process" in told


@pytest.mark.parametrize("node", [0, 1])
def test_readers_are_told_when_the_publisher_was_killed(node: int) -> None:
    latest = ringshm.ray.Latest("64KiB")
    publisher = Holds.options(**on(node)).remote(latest)
    readers = [Holds.options(**on(node)).remote(latest) for node in (0, 1)]
    ends = [reader.read_to_the_end.remote() for reader in readers]
    ray.get(publisher.publish_many.remote(1, 3))
    latest.close()
    os.kill(ray.get(publisher.pid.remote()), signal.SIGKILL)
    for version, told in ray.get(ends):
        assert version == 3 and "has no publisher any more: actor" in told and "died" in told


def test_a_publisher_that_is_restarted_goes_on_and_readers_wait_for_it() -> None:
    latest = ringshm.ray.Latest("64KiB")
    publisher = Holds.options(**on(0, max_restarts=1, max_task_retries=-1)).remote(latest)
    readers = [Holds.options(**on(node)).remote(latest) for node in (0, 1)]
    seen = [reader.read_until.remote(4) for reader in readers]
    ray.get(publisher.publish_many.remote(1, 2))
    latest.close()
    os.kill(ray.get(publisher.pid.remote()), signal.SIGKILL)
    assert ray.get(publisher.publish_many.remote(3, 2)) == [3, 4]
    assert all(versions[-1][0] == 4 for versions in ray.get(seen))


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("how", ["killed", "ended for good"])
def test_a_relay_that_has_gone_is_made_anew_and_readers_go_on(node: int, how: str) -> None:
    with ringshm.ray.Latest("64KiB") as latest:
        reader = Holds.options(**on(1)).remote(latest)
        latest.publish("before")
        assert ray.get(reader.read.remote()) == (1, "before")
        waiting = reader.read.remote(1)
        ray.kill(relay_at(latest, node), no_restart=how == "ended for good")
        latest.publish("after")
        assert ray.get(waiting) == (2, "after")
        latest.publish("later")
        assert ray.get(reader.read.remote(2)) == (3, "later")


def test_a_reader_that_holds_a_version_keeps_it_while_newer_ones_come() -> None:
    @ray.remote
    def keeps(latest: Any, told: Any) -> tuple[list[int], float]:
        with latest.borrow() as first:
            array = first.value
            before = array.copy()
            ray.get(told.publish_many.remote(2, 20))
            version, _ = latest.read(newer_than=15)
            assert (array == before).all()
        return [first_version(before), version], float(array.sum())

    def first_version(array: Any) -> int:
        return int(array[0])

    with ringshm.ray.Latest("64KiB", borrows=1) as latest:
        latest.publish(np.full(100, 1))
        publisher = Holds.options(**on(0)).remote(latest)
        (kept, version), total = ray.get(keeps.options(**on(1)).remote(latest, publisher))
        assert kept == 1 and version > 15 and total == 100


def test_it_is_over_when_all_have_closed_it() -> None:
    latest = ringshm.ray.Latest("64KiB")
    latest.publish(1)
    reader = Holds.options(**on(1)).remote(latest)
    assert ray.get(reader.read.remote()) == (1, 1)
    latest.close()
    assert ray.get(reader.read.remote()) == (1, 1)
    ray.get(reader.close.remote())
    comes(lambda: not ringshm.ray.status())
    with pytest.raises(ChannelClosed):
        latest.publish(2)
    with pytest.raises(TypeError, match="it pickles"):
        ringshm.ray.Latest.attach("x")


def test_what_no_version_comes_for_is_told_in_time() -> None:
    with ringshm.ray.Latest("64KiB") as latest:
        reader = Holds.options(**on(1)).remote(latest)
        with pytest.raises(queue.Empty):
            ray.get(reader.read.remote(None, 0.2))


def test_status_tells_of_both_rings_and_who_holds_it(capsys: pytest.CaptureFixture[str]) -> None:
    with ringshm.ray.Latest("64KiB", name="weights") as latest:
        reader = Holds.options(**on(1)).remote(latest)
        latest.publish("x")
        assert ray.get(reader.read.remote()) == (1, "x")
        (record,) = ringshm.ray.status()
        assert [(ring.what, ring.version) for ring in record.rings] == [("home", 1), ("copy", 1)]
        home, copy = record.rings
        assert home.ring.name == "weights" and copy.ring.name.startswith("weights.copy-at-")
        assert {home.node, copy.node} == {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        told = str(record).splitlines()
        assert told[0].startswith("weights, made by driver") and f"process {ray.get(reader.pid.remote())}" in told[1]
        assert [line.rpartition(": ")[2] for line in told[2:]] == ["version 1, 0 in flight"] * 2
