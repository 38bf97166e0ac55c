"""What Ray says of processes: whether one lives, whether an actor is being restarted, whether a task is run again.

All is read from the cluster's control store (GCS), which learns of a dead worker from its raylet within some tenths of
a second, and of a dead node within Ray's health check. `tests/on_ray/test_cluster.py` sees that each of these answers
is what Ray does.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state as _state
from ray.core.generated import gcs_pb2

from ..errors import RingshmError
from ..system import monotonic
from .locality import Place, here

#: Seconds after the death of a task's worker, after which Ray has told whether it runs the task again: workers report
#: what becomes of tasks once a second.
_RETRY_TOLD_AFTER = 4.0
#: Seconds after the death of an actor's worker, after which Ray has noticed that the actor is not alive.
_NOTICED_AFTER = 10.0
#: States of a task that end it: `common.proto`, TaskStatus.
_TASK_ENDED = {11, 12}


@dataclass(frozen=True)
class Process:
    """A process of the cluster, as Ray knows it.

    Attributes:
        worker: its worker id, in hexadecimal; a driver has one, too.
        actor, task: the actor that it is, or the task that it runs, in hexadecimal; "" if it is none.
        node: the Ray node it is on.
        pid: its process id there.
        place: which /dev/shm it has.
    """

    worker: str
    actor: str
    task: str
    node: str
    pid: int
    place: Place

    def __str__(self) -> str:
        what = f"actor {self.actor[:8]}" if self.actor else "a task's worker" if self.task else "driver"
        return f"{what}, process {self.pid} on node {self.node[:8]}"


def namespace() -> str:
    """The Ray namespace that this process works in.

    Raises:
        RingshmError: if this process has not joined a Ray cluster.
    """
    if not ray.is_initialized():
        raise RingshmError("this process has not joined a Ray cluster: call ray.init() before ringshm.ray is used")
    return str(ray.get_runtime_context().namespace)


def is_up() -> bool:
    """Whether this process is in a cluster; False also where it ends, and Ray has ended already."""
    try:
        return bool(ray.is_initialized())
    except Exception:
        return False


def started_here() -> bool:
    """Whether this process has started the cluster that it is in, by `ray.init()`; it ends with this process then."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def this_process() -> Process:
    """This process, for others to know whether it lives."""
    import os

    context = ray.get_runtime_context()
    is_driver = ray._private.worker.global_worker.mode == ray._private.worker.SCRIPT_MODE
    actor = "" if is_driver else context.get_actor_id() or ""
    task = "" if is_driver or actor else context.get_task_id() or ""
    return Process(context.get_worker_id(), actor, task, context.get_node_id(), os.getpid(), here())


def is_idle_worker() -> bool:
    """Whether this process is one that Ray runs tasks in, and runs none just now."""
    worker = ray._private.worker.global_worker
    if worker.mode != ray._private.worker.WORKER_MODE or not worker.actor_id.is_nil():
        return False
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and frame.f_code.co_name == "main_loop" and "ray" in frame.f_code.co_filename


class Observer:
    """Tells which processes are gone for good. Used by one thread."""

    def __init__(self) -> None:
        self._died_at: dict[str, float] = {}

    def dead_nodes(self) -> set[str]:
        """The ids of nodes that are dead, or have left."""
        return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}

    def gone(self, process: Process, dead_nodes: set[str]) -> str:
        """How a process has gone for good; "" while it lives, or Ray starts it again, or may yet say so."""
        if process.node not in dead_nodes and _worker_lives(process.worker):
            self._died_at.pop(process.worker, None)
            return ""
        died_at = self._died_at.setdefault(process.worker, monotonic())
        if process.actor:
            actor = _state.actor_table(process.actor)
            if actor and actor["State"] in ("PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING"):
                return ""
            is_that_one = actor and actor["State"] == "ALIVE" and actor.get("Pid") == process.pid
            if is_that_one and monotonic() < died_at + _NOTICED_AFTER:
                return ""  # the control store has not noticed yet
        elif process.task and (monotonic() < died_at + _RETRY_TOLD_AFTER or _runs_again(process)):
            return ""
        del self._died_at[process.worker]
        return f"{process}, died" if process.node not in dead_nodes else f"{process}, whose node died or left"


def _worker_lives(worker: str) -> bool:
    data = _accessor().get_worker_info(ray.WorkerID(bytes.fromhex(worker)))
    return data is not None and bool(gcs_pb2.WorkerTableData.FromString(data).is_alive)


def _runs_again(process: Process) -> bool:
    """Whether a task whose worker died has an attempt since that has not ended."""
    attempts: dict[int, Any] = {}
    task = bytes.fromhex(process.task)
    for event in _task_events():
        if event.task_id == task and event.HasField("state_updates"):
            attempts.setdefault(event.attempt_number, set()).update(event.state_updates.state_ts_ns)
    return bool(attempts) and not attempts[max(attempts)] & _TASK_ENDED


def _task_events() -> Any:
    read = getattr(_state, "_get_all_task_events", None)
    if read is not None:
        return read()
    return [gcs_pb2.TaskEvents.FromString(data) for data in _accessor().get_task_events()]


def _accessor() -> Any:
    """What reads the control store."""
    connect = getattr(_state, "_connect_and_get_accessor", None)
    if connect is not None:
        return connect()
    _state._check_connected()  # older versions of Ray
    return _state.global_state_accessor
