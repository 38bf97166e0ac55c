"""What tests of `ringshm.ray` share: a cluster of two nodes on this machine, and actors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ray_nodes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, and let Ray warn."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.xdist_group("ray"))


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
    """After each test no channel is left in the registry, and no ring in /dev/shm."""
    yield
    import ringshm.ray

    end = time.monotonic() + 30
    while (left := ringshm.ray.status()) or (rings := rings_here()):
        assert time.monotonic() < end, f"left: {left or rings}"
        time.sleep(0.1)


def rings_here() -> list[str]:
    """The files of channels in this /dev/shm."""
    return [name for name in os.listdir("/dev/shm") if name.startswith("ringshm.")]
