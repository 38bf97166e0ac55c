"""What Ray says of processes, as `ringshm.ray` understands it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")
import ray
from support.ray_nodes import comes, on

from ringshm.ray.cluster import Observer, this_process


@ray.remote(num_cpus=0)
class Tells:
    def __init__(self, seconds: float, constructed: Path) -> None:
        time.sleep(seconds)
        constructed.with_name(str(os.getpid())).touch()

    def process(self) -> Any:
        return this_process()


def gone(observer: Observer, process: Any) -> str:
    return observer.gone(process, observer.dead_nodes())


def test_an_actor_is_gone_when_it_is_dead_and_not_while_it_is_restarted(tmp_path: Path) -> None:
    observer = Observer()
    actor = Tells.options(**on(0, max_restarts=1, max_task_retries=-1)).remote(2.0, tmp_path / "x")
    first = ray.get(actor.process.remote())
    assert first.actor and not gone(observer, first)
    os.kill(first.pid, signal.SIGKILL)
    comes(lambda: gone(observer, first))
    assert len([*tmp_path.iterdir()]) == 2, "not before its constructor has run again"
    second = ray.get(actor.process.remote())
    assert not gone(observer, second)
    ray.kill(actor)
    assert "died" in comes(lambda: gone(observer, second))


def test_a_task_is_gone_when_ray_does_not_run_it_again() -> None:
    @ray.remote(max_retries=0)
    def tell_and_die(told: Any) -> None:
        ray.get(told.note.remote(this_process()))
        os.kill(os.getpid(), signal.SIGKILL)

    @ray.remote(num_cpus=0)
    class Told:
        def __init__(self) -> None:
            self.processes: list[Any] = []

        def note(self, process: Any) -> None:
            self.processes.append(process)

        def all(self) -> list[Any]:
            return self.processes

    told, observer = Told.options(**on(0)).remote(), Observer()
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(tell_and_die.options(**on(0)).remote(told))
    (process,) = ray.get(told.all.remote())
    assert process.task and comes(lambda: gone(observer, process))


def test_this_driver_and_its_node_are_there() -> None:
    observer = Observer()
    assert not gone(observer, this_process())
    assert not observer.dead_nodes()
