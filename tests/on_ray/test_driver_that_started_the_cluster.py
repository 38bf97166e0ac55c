"""A driver that has started its cluster by `ray.init()` leaves nothing in /dev/shm, however it ends in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

_PROGRAM = """
import os, signal, sys
import ray
import ringshm.ray

ray.init(num_cpus=3, log_to_driver=False)

@ray.remote
class Actor:
    def send(self, out):
        out.put(1)
        self.out = out
    def make(self):
        self.own = ringshm.ray.Channel(2, slot_size=100)
        return self.own.name

how = sys.argv[1]
channel = ringshm.ray.Channel(4, slot_size=100)
latest = ringshm.ray.Latest(slot_size=100)
actors = [Actor.remote() for _ in range(2)]
ray.get([actor.send.remote(channel.sender()) for actor in actors])
names = [channel.name, latest.name]
latest.publish(2)
assert channel.get() == 1  # and one message is left
if how != "shutdown":
    names.append(ray.get(actors[0].make.remote()))
print(*names, flush=True)
if how == "close":
    channel.close()
elif how == "shutdown":
    latest.close()
    ray.shutdown()
elif how == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("how", ["exit", "close", "shutdown", "interrupt"])
def test_a_driver_that_ends_with_its_cluster_leaves_nothing(how: str, tmp_path: Path) -> None:
    source = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    (tmp_path / "driver.py").write_text(_PROGRAM)
    driver = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), how],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": "local"},
        timeout=100,
    )
    assert (driver.returncode != 0) == (how == "interrupt"), driver.stderr
    names = driver.stdout.split()
    assert len(names) == (2 if how == "shutdown" else 3), driver.stderr
    left = [path.name for path in Path("/dev/shm").iterdir() if any(name in path.name for name in names)]
    assert not left
