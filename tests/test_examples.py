"""The programs in `examples/` do what they say; that they leave `/dev/shm` as it was, `conftest` sees to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]
ACTOR_LEARNER = ROOT / "examples" / "actor_learner.py"
SECONDS = 50  # until a program that hangs is killed: before the watchdog would end the whole run

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the program's children in /proc")


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The program, at the head of a process group of its own; whatever is left of that group in the end is killed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, str(ACTOR_LEARNER), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    ) as program:
        try:
            yield program
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)


def read_until(program: subprocess.Popen[str], pattern: str) -> str:
    """Read the program's output up to the first line that matches; everything read so far."""
    assert program.stdout is not None
    read = ""
    for line in program.stdout:
        read += line
        if re.search(pattern, line):
            return read
    raise AssertionError(f"no line matches {pattern!r} in:\n{read}")


def actors_of(program: subprocess.Popen[str]) -> list[int]:
    """Pids of the program's actors; its other child is multiprocessing's resource tracker."""
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_actors(program: subprocess.Popen[str], count: int) -> list[int]:
    """The program's actors, once there are so many."""
    give_up = time.monotonic() + SECONDS
    while len(actors := actors_of(program)) < count:
        assert time.monotonic() < give_up, f"{len(actors)} actors, not {count}"
        time.sleep(0.01)
    return actors


def assert_gone(pids: list[int]) -> None:
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


PLAYING = r"episodes [1-9]"  # a line of progress, after the first batch
SOLVED = r"^solved: mean return (4[789]\d|500)\.\d over the last 100 of [\d,]+ episodes, [\d,]+ steps"


@pytest.mark.slow
def test_actor_learner_solves_cartpole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curve.png"
    with started("--seed", "0", "--plot", str(plot)) as program:
        output, errors = program.communicate(timeout=240)
    assert program.returncode == 0, output + errors
    assert re.search(SOLVED, output, re.MULTILINE), output
    assert errors == ""
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_actor_learner_gives_up_when_time_is_up() -> None:
    with started("--max-seconds", "0.8") as program:  # mostly the actors' start: too short to solve anything
        output, errors = program.communicate(timeout=SECONDS)
    assert program.returncode == 1, output + errors
    assert "not solved" in output
    assert errors == ""


@linux
@pytest.mark.parametrize("moment", ["actors start", "actors play"])
def test_actor_learner_ends_cleanly_on_ctrl_c(moment: str) -> None:
    with started("--actors", "2") as program:
        actors = wait_for_actors(program, 2)
        if moment == "actors play":
            read_until(program, PLAYING)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to every process
        _, errors = program.communicate(timeout=SECONDS)
    assert program.returncode == 130, errors
    assert errors == "interrupted\n"
    assert_gone(actors)


@linux
def test_actor_learner_replaces_a_killed_actor() -> None:
    with started("--actors", "2") as program:
        actors = wait_for_actors(program, 2)
        read_until(program, PLAYING)
        os.kill(actors[0], signal.SIGKILL)
        read_until(program, rf"actor 0 \(pid {actors[0]}\) died of signal 9: starting another")
        actors += wait_for_actors(program, 2)
        output, errors = program.communicate(timeout=SECONDS)
    assert program.returncode == 0, output + errors
    assert re.search(SOLVED, output, re.MULTILINE), output
    assert "restarts 1" in output
    assert errors == ""
    assert_gone(actors)


@linux
def test_actors_end_when_the_learner_is_killed() -> None:
    with started("--actors", "2") as program:
        read_until(program, PLAYING)
        program.kill()
        _, errors = program.communicate(timeout=SECONDS)  # ends when the last actor has let go of the pipe
    assert errors == ""
