"""What tests of `ringshm.ray` share: a cluster of two nodes on this machine, and actors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ray_nodes

#: Those that are not slow: two nodes, order, the end, and a death of each kind of process.
SMALL = {
    "test_a_loop_of_the_maker_ends_when_the_last_actor_has_gone",
    "test_a_killed_sender_ends_the_stream_and_a_killed_receiver_breaks_it",
    "test_senders_on_both_nodes_reach_the_maker_in_order_and_the_stream_ends[small]",
    "test_receivers_on_both_nodes_get_each_message_once_and_the_end",
    "test_a_relay_is_killed_amid_messages_and_none_is_lost_or_doubled[ingress]",
    "test_readers_of_both_nodes_see_the_publishers_versions_and_the_newest_at_the_end",
    "test_a_message_that_is_taken_once_its_place_is_lost_goes_back_as_it_was",
    "test_what_goes_back_before_its_place_is_known_is_told_of_again_and_not_lost",
    "test_actors_on_two_nodes_learn",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, and let Ray warn."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.filterwarnings("default"))
            if item.name not in SMALL:
                item.add_marker(pytest.mark.slow)
            if "PYTEST_XDIST_WORKER" in os.environ:
                item.add_marker(pytest.mark.skip("one cluster at a time: python -m pytest -n0 tests/on_ray"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[ray_nodes.Nodes]:
    """Two nodes, the second with a /dev/shm of its own."""
    pytest.importorskip("ray")
    if not ray_nodes.may_mount():
        pytest.skip("may not mount a /dev/shm for the second node: run as root")
    with ray_nodes.nodes(2) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def leaves_nothing(cluster: ray_nodes.Nodes) -> Iterator[None]:
    """After each test no channel is left in the registry, and no file of one in the /dev/shm of any node."""
    yield
    import ringshm.ray

    end = time.monotonic() + 30
    while (left := ringshm.ray.status()) or (left := files_of_channels(cluster)):
        assert time.monotonic() < end, f"left: {left}"
        time.sleep(0.1)


def files_of_channels(cluster: ray_nodes.Nodes) -> list[Path]:
    """The files of channels in shared memory, of all nodes."""
    return [path for node in cluster.running for path in cluster.shm(node).iterdir() if "ringshm" in path.name]


@pytest.fixture
def third(cluster: ray_nodes.Nodes) -> Iterator[ray_nodes.Nodes]:
    """The cluster with a third node that has just come; the test may end it."""
    cluster.start(2)
    yield cluster
    if 2 in cluster.running:
        cluster.kill(2)
