"""Several Ray nodes on one machine, each with a /dev/shm of its own, as several hosts have, unless told otherwise.

    with nodes(2) as cluster:
        near, far = Actor.options(**on(0)).remote(), Actor.options(**on(1)).remote()

Loopback only. Needs root for the mount namespaces (`unshare -m`). A node takes some ten seconds to start on two cores.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "20000",  # one that is killed does not answer at once; one that is slow, lives
    "RAY_health_check_failure_threshold": "3",
    "RAY_AUTH_MODE": "disabled",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
}
# In a process of its own this starts a further raylet, with Ray's rewriting of loopback addresses switched off.
_START = """
import ray._private.services as services
services.node_ip_address_from_perspective = lambda address=None: "127.0.0.1"
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
main()
"""
_STORE_NBYTES = 150 * 2**20


def on(node: int, **options: Any) -> dict[str, Any]:
    """Options that place an actor or a task on that node."""
    return {"num_cpus": 0, "resources": {f"n{node}": 0.001}, **options}


class Nodes:
    """The nodes: 0, the head, in this mount namespace; all others in one of their own."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._others: dict[int, subprocess.Popen[bytes]] = {}

    def begin(self, node: int, beside: int = 0) -> None:
        """Start a further node; `wait_for` tells when it is there. One that is beside another shares its /dev/shm."""
        raylet = [sys.executable, "-c", _START, "start", f"--address={self.address}"]
        raylet += [f"--node-ip-address=127.0.0.{node + 1}", "--num-cpus=4", f"--object-store-memory={_STORE_NBYTES}"]
        raylet += ["--resources", f'{{"n{node}": 1}}', "--block", "--disable-usage-stats"]
        raylet += ["--min-worker-port", "0", "--max-worker-port", "0"]
        command = ["unshare", "-m", "--kill-child", "bash", "-c"]
        command += [f"mount -t tmpfs -o size=500m tmpfs /dev/shm && exec {shlex.join(raylet)}"]
        if beside:
            command = ["nsenter", f"--mount=/proc/{self._others[beside].pid}/ns/mnt", "--wd=.", *raylet]
        self._others[node] = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_for(self, *nodes: int) -> None:
        """Wait until they have joined."""
        import ray

        end = time.monotonic() + 120
        while not all(self.id_of(node) for node in nodes):
            if time.monotonic() > end or any(self._others[node].poll() is not None for node in nodes):
                raise RuntimeError(f"of the nodes {nodes} not all came: {ray.nodes()}")
            time.sleep(0.1)

    def start(self, node: int, beside: int = 0) -> None:
        """As `begin`, and wait until it is there."""
        self.begin(node, beside)
        self.wait_for(node)

    def id_of(self, node: int) -> str:
        """Its id, or "" if it is not there."""
        import ray

        names = [one["NodeID"] for one in ray.nodes() if one["Alive"] and f"n{node}" in one["Resources"]]
        return names[0] if names else ""

    def shm(self, node: int) -> Path:
        """Its /dev/shm, as seen from here."""
        return Path(f"/proc/{self._others[node].pid}/root/dev/shm" if node else "/dev/shm")

    @property
    def running(self) -> list[int]:
        """The nodes that were started and not ended."""
        return [0, *self._others]

    def kill(self, node: int) -> None:
        """Kill a node with all of its processes at one moment, and wait until Ray knows."""
        _end(self._others.pop(node))
        self._wait_until_gone(node)

    def leave(self, node: int) -> None:
        """Have a node leave the cluster, as an autoscaler does, and wait until Ray knows."""
        process = self._others.pop(node)
        for pid in _tree(process.pid):
            if Path(f"/proc/{pid}/comm").read_text() == "raylet\n":
                os.kill(pid, signal.SIGTERM)
        self._wait_until_gone(node)
        _end(process)

    def _wait_until_gone(self, node: int) -> None:
        end = time.monotonic() + 60
        while self.id_of(node):
            assert time.monotonic() < end, "Ray does not notice that the node has gone"
            time.sleep(0.1)

    def kill_all(self) -> None:
        """End what `begin` has started."""
        for process in self._others.values():
            _end(process)
        self._others.clear()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that descend from it, so that none does anything after another's death."""
    pids = _tree(process.pid)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    process.wait()


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{int(entry)}/stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(entry))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def may_mount() -> bool:
    """Whether nodes with a /dev/shm of their own can be started here."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """So many nodes; this process is a driver on the first."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    import ray
    import ray._private.services as services
    from ray.cluster_utils import Cluster

    services.node_ip_address_from_perspective = lambda address=None: "127.0.0.1"
    head = {
        "num_cpus": 4,
        "object_store_memory": _STORE_NBYTES,
        "resources": {"n0": 1},
        "include_dashboard": False,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, namespace="tests", logging_level="ERROR", log_to_driver=False)
    others = Nodes(cluster.address)
    try:
        for node in range(1, count):
            others.begin(node)
        others.wait_for(*range(1, count))
        yield others
    finally:
        ray.shutdown()
        others.kill_all()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def comes(true: Callable[[], Any]) -> Any:
    """What `true` gives, once that is true of something."""
    end = time.monotonic() + 60
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found
