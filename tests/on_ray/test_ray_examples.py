"""`examples/ray_actor_learner.py` on two nodes, and on the one that `ray.init()` starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("rich")
pytest.importorskip("ray")
import ray

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_on_this_cluster(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The program in this process, which is a driver of the cluster of two nodes."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ray_actor_learner

    ray.cloudpickle.register_pickle_by_value(ray_actor_learner)  # as the program itself is
    return int(ray_actor_learner.main([*arguments]))


def test_actors_on_two_nodes_learn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status = run_on_this_cluster(monkeypatch, "--actors", "2", "--score", "100")
    output = capsys.readouterr().out
    assert status == 0, output
    assert "2 actors ended, on 2 nodes; 0 had not started" in output
    assert re.search(r"^solved: mean return [1-5]\d\d\.\d over the last 100", output, re.MULTILINE), output


@pytest.mark.slow(seconds=300)
def test_cartpole_is_solved_by_actors_on_two_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run_on_this_cluster(monkeypatch, "--actors", "4")
    output = capsys.readouterr().out
    assert status == 0, output
    assert "4 actors ended, on 2 nodes; 0 had not started" in output
    assert re.search(r"^solved: mean return (4[789]\d|500)\.\d over the last 100", output, re.MULTILINE), output


@pytest.mark.slow(seconds=300)
def test_cartpole_is_solved_on_the_node_that_ray_init_starts() -> None:
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    program = subprocess.run(
        [sys.executable, str(EXAMPLES / "ray_actor_learner.py"), "--actors", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": "local"},
        timeout=300,
    )
    assert program.returncode == 0, program.stdout + program.stderr
    assert re.search(r"^solved: mean return (4[789]\d|500)\.\d", program.stdout, re.MULTILINE), program.stdout
