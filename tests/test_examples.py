"""The programs in `examples/` do what they say; that they leave `/dev/shm` as it was, `conftest` sees to."""

from __future__ import annotations

import contextlib
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
EXAMPLES = ROOT / "examples"
SECONDS = 150  # until a program that hangs is killed: before the watchdog would end the whole run


@contextmanager
def started(*arguments: str, program: str = "actor_learner") -> Iterator[subprocess.Popen[str]]:
    """The program, at the head of a process group of its own; whatever is left of that group in the end is killed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{program}.py"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


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
    assert output.startswith("starting: ")
    assert errors == ""


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


def test_actors_end_when_the_learner_is_killed() -> None:
    with started("--actors", "2") as program:
        read_until(program, PLAYING)
        program.kill()
        _, errors = program.communicate(timeout=SECONDS)  # ends when the last actor has let go of the pipe
    assert errors == ""


# --- the short ones

#: The arguments with which each ends within some seconds, the line that it prints then, and what tells that it works.
SHORT = {
    "atari_frames": (["--frames", "200"], r"400 frames of 210x160x3 from 2 actors, [\d,]+ frames per second, 0 bytes "
                     r"copied per frame \(.* 9\d\.\d\)"),
    "camera": (["--frames", "60"], r"controller: \d\d of 60 frames, [\d.]+ ms old; stopped \d+ times\n"
               r"detector: \d+ of 60 frames, [\d.]+ ms old; stopped \d+ times"),
    "evaluation_pool": (["--score", "200"], r"(version \d+ of \d+: mean return \d+\.\d\n)+"
                        r"reached: version \d+, while the learner was at version \d+"),
    "impala": (["--envs", "4"],
               r"solved: mean return \d{3}\.\d over the last 20 episodes, [\d,]+ steps, [\d,]+ a second"),
    "inference_server": (["--requests", "300"], r"1,200 round trips of 4 actors: p50 [\d,]+ us, p90 [\d,]+ us, "
                         r"p99 [\d,]+ us; batches of [1-4]\.\d on average"),
    "supervisor": (["--tasks", "600", "--seed", "1"], r"600 tasks, [1-9]\d* workers killed: \d+ tasks came again, "
                   r"\d+ of them had been answered before, 0 dropped, 0 lost"),
    "torchrl_ppo": (["--updates", "2", "--kill-after", "1"],
                    r"collector 0 \(pid \d+\) died of signal 9: starting another\n"
                    r"ended: mean return \d\d\.\d over .*, 2 updates, 4,096 steps, restarts 1, \d+ s"),
    "vector_env": (["--num-envs", "5", "--steps", "100"],
                   r"500 steps of 5 CartPole-v1, [12]\d episodes: [\d,]+ steps/s"),
    "weights": (["--megabytes", "8", "--versions", "3"], r"3 versions of 8 MB: publish [\d.]+ ms, 8 readers see it "
                r"[\d.]+ ms after it began; 3\d MB of shared memory, .* is \d+ MB"),
}  # fmt: skip


#: What some of them need beside the extra.
NEEDS = {"atari_frames": "ale_py", "torchrl_ppo": "torchrl"}


@pytest.mark.parametrize("program", SHORT)
def test_a_short_example_runs_to_its_end(program: str) -> None:
    if program in NEEDS:
        pytest.importorskip(NEEDS[program])
    arguments, line = SHORT[program]
    with started(*arguments, program=program) as process:
        output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, ""), output
    assert re.fullmatch(line, output.strip())


def test_workers_of_a_vectorised_environment_end_when_its_process_is_killed() -> None:
    with started("--steps", "1000000", "--workers", "2", program="vector_env") as process:
        wait_for_actors(process, 2)
        time.sleep(0.5)
        process.kill()
        _, errors = process.communicate(timeout=SECONDS)  # ends when the last worker has let go of the pipe
    assert errors == ""


def test_a_worker_ends_when_its_process_is_killed_before_the_first_step() -> None:
    program = """
import multiprocessing, os, gymnasium
from ringshm.gymnasium import RingVectorEnv

def make():
    if multiprocessing.parent_process() is not None:
        os.kill(os.getppid(), 9)
    return gymnasium.make("CartPole-v1")

RingVectorEnv([make], context="fork")
"""
    path = os.pathsep.join([str(ROOT), str(EXAMPLES)])
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            process.communicate(timeout=SECONDS / 2)  # ends when the worker has let go of the pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_vectorised_atari_game_is_known_to_the_workers() -> None:
    pytest.importorskip("ale_py")
    with started("--env", "ALE/Pong-v5", "--num-envs", "2", "--steps", "5", program="vector_env") as process:
        output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors  # the emulator greets there
    assert output.startswith("10 steps of 2 ALE/Pong-v5")


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        ("vector_env", ["--workers", "9"], "--workers must be"),
        ("vector_env", ["--workers", "0"], "--workers must be"),
        ("vector_env", ["--env", "Nope-v1"], "--env Nope-v1: "),
        ("vector_env", ["--env", "nope:X-v1"], "--env nope:X-v1: "),
        ("actor_learner", ["--seed", "-1"], "--seed must"),
        ("actor_learner", ["--plot", "no/such/folder.png"], "no folder no/such"),
    ],
)
def test_wrong_arguments_are_wrong_usage(program: str, arguments: list[str], says: str) -> None:
    with started(*arguments, program=program) as process:
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert says in errors.splitlines()[-1]


def test_atari_frames_may_be_copied_too() -> None:
    pytest.importorskip("ale_py")
    with started("--frames", "100", "--actors", "1", "--copy", program="atari_frames") as process:
        output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("100 frames")
    assert "201,600 bytes copied per frame" in output


def test_the_weights_program_says_which_reader_has_died() -> None:
    with started("--versions", "1000000", "--megabytes", "1", "--readers", "3", program="weights") as process:
        children = wait_for_actors(process, 3)
        os.kill(children[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert f"reader {children[1]} has died: exit code -9" in errors
    assert_gone(children)


def test_the_camera_is_replaced_and_those_who_look_go_on() -> None:
    with started("--frames", "150", program="camera") as process:
        time.sleep(0.5)
        camera, *_ = wait_for_actors(process, 3)
        os.kill(camera, signal.SIGKILL)
        output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, ""), output
    assert f"camera (pid {camera}) died of signal 9: starting another" in output
    assert re.search(r"controller: \d+ of 150 frames, .*\ndetector: \d+ of 150 frames", output)


def test_the_evaluation_pool_replaces_a_killed_worker_and_the_learner_does_not_wait() -> None:
    with started("--score", "501", program="evaluation_pool") as process:
        worker, _ = wait_for_actors(process, 2)
        read_until(process, "^version ")
        os.kill(worker, signal.SIGKILL)
        read_until(process, rf"worker \(pid {worker}\) died of signal 9: starting another")
        wait_for_actors(process, 2)
        read_until(process, "^version ")
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_the_impala_program_says_which_worker_has_died() -> None:
    with started("--score", "501", "--envs", "3", program="impala") as process:
        *_, worker = wait_for_actors(process, 3)
        time.sleep(0.5)  # also amid its start
        os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert f"process {worker} (environment 2) was killed by signal 9" in errors.splitlines()[-1]


@pytest.mark.parametrize("program", SHORT)
def test_a_short_example_ends_cleanly_on_ctrl_c(program: str) -> None:
    if program in NEEDS:
        pytest.importorskip(NEEDS[program])
    endless = {
        "atari_frames": "--frames", "camera": "--frames", "evaluation_pool": "--score", "impala": "--score",
        "inference_server": "--requests", "supervisor": "--tasks", "torchrl_ppo": "--updates",
        "vector_env": "--steps", "weights": "--versions",
    }  # fmt: skip
    with started(endless[program], "1000000", program=program) as process:
        children = wait_for_actors(process, 2)
        time.sleep(0.5)  # also in the midst of its children's start
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert_gone(children)
