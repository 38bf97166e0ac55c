"""A worker that is lost is told of within seconds, at whatever moment that was, with how it ended; nothing hangs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.workers import TESTS, Interrupt, may_fork

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")
pytestmark = may_fork

from support.environments import Faulty  # noqa: E402

from ringshm.channel import doubts  # noqa: E402
from ringshm.environments import crew  # noqa: E402
from ringshm.gymnasium import RingVectorEnv  # noqa: E402

each_method = pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])


@pytest.mark.parametrize("moment", ["amid a step", "between steps", "stopped"])
def test_a_worker_that_is_killed_is_named(make: Any, moment: str) -> None:
    envs = make([Faulty] * 4, num_workers=2)
    envs.reset()
    pid = envs.get_attr("pid")[2]
    if moment == "between steps":
        os.kill(pid, signal.SIGKILL)
    if moment == "stopped":
        os.kill(pid, signal.SIGSTOP)
        envs.step_async(np.zeros(4, np.int64))
        with pytest.raises(multiprocessing.TimeoutError):
            envs.step_wait(timeout=0.2)
        os.kill(pid, signal.SIGKILL)
    else:
        envs.step_async(np.array([0, 0, 0, Faulty.DIE]))
    text = rf"process {pid} \(environments 2 to 3\) was killed by signal 9"
    with pytest.raises(RuntimeError, match=text):
        envs.step_wait()
    with pytest.raises(RuntimeError, match=text):
        envs.call("spec")


def test_an_environment_that_cannot_be_made_is_named_and_nothing_is_left() -> None:
    def fails() -> Any:
        raise OSError("no such game")

    def dies() -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match="no such game") as caught:
        RingVectorEnv([Faulty, Faulty, fails], num_workers=2, context="fork")
    assert "environment 2 failed" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match=r"\(environments 1 to 2\) was killed by signal 9"):
        RingVectorEnv([Faulty, Faulty, dies], num_workers=2, context="fork")
    assert not multiprocessing.active_children()


class Closes(Faulty):
    """Makes a file when it is closed."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__()
        self.path = folder / str(number)

    def close(self) -> None:
        self.path.touch()


@pytest.mark.parametrize("num_workers", [1, 4])
def test_where_an_environment_cannot_be_made_the_others_are_closed(num_workers: int, tmp_path: Path) -> None:
    def fails() -> Any:
        raise OSError("no such game")

    makers = [functools.partial(Closes, tmp_path, i) for i in range(3)]
    with pytest.raises(OSError, match="no such game"):
        RingVectorEnv([Faulty, *makers, fails], num_workers=num_workers, context="fork")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


class Starts:
    """Makes a Faulty in this process; in a worker it does something else first."""

    def __init__(self, instead: Callable[[], Any]) -> None:
        self.instead = instead

    def __call__(self) -> Any:
        if multiprocessing.parent_process() is not None:
            self.instead()
        return Faulty()


class Imports(Starts):
    """Cannot be unpickled in a worker, which lacks a module."""

    def __reduce__(self) -> Any:
        return importlib.import_module, ("no_such_module",)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    sys.exit(5)


@each_method
@pytest.mark.parametrize(("start", "how"), [(die, "was killed by signal 9"), (leave, "ended with exit code 5")])
def test_a_worker_that_ends_while_it_makes_its_environments_is_told_of(
    method: str, start: Callable[[], Any], how: str
) -> None:
    with pytest.raises(RuntimeError, match=rf"\(environment 1\) {how} .*before it had begun"):
        RingVectorEnv([Faulty, Starts(start)], num_workers=2, context=method)
    assert not multiprocessing.active_children()


def leave_slowly() -> None:
    Finalize(None, time.sleep, (1.5,), exitpriority=1)
    leave()


def test_a_worker_that_takes_its_time_to_end_is_told_of_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match=r"\(environment 1\) ended with exit code 5"):
        RingVectorEnv([Faulty, Starts(leave_slowly)], num_workers=2, context="fork")


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_worker_that_cannot_import_what_it_needs_is_told_of(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"\(environment 1\) ended with exit code 1 .*its traceback"):
        RingVectorEnv([Faulty, Imports(print)], num_workers=2, context=method)
    assert method == "forkserver" or "No module named 'no_such_module'" in capfd.readouterr().err


@pytest.mark.parametrize("seconds", [0, 0.03, pytest.param(0.1, marks=pytest.mark.slow)])
@each_method
def test_a_worker_that_is_killed_while_it_starts_is_told_of(method: str, seconds: float) -> None:
    """Also while its arguments are being written, of which the pipe holds but a part."""
    ended = threading.Event()

    def kill() -> None:
        while not ended.is_set():
            for process in multiprocessing.active_children():
                time.sleep(seconds)
                process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        load = np.zeros(100_000)
        with pytest.raises(RuntimeError, match=r"killed by signal 9 .*before|for environments 0 to 1 .*its traceback"):
            RingVectorEnv([lambda: load.size and Slow()] * 2, num_workers=1, context=method)
    finally:
        ended.set()
        thread.join()
    assert not multiprocessing.active_children()


class Slow(Faulty):
    """Takes its time to be made, where it is made in a worker."""

    def __init__(self) -> None:
        super().__init__()
        if multiprocessing.parent_process() is not None:
            time.sleep(10)


def stay() -> None:
    """Leave, with a thread that keeps the process."""
    threading.Thread(target=time.sleep, args=(1000,)).start()
    sys.exit(5)


class Stays(Faulty):
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action == self.EXIT:
            stay()
        return super().step(action)


def test_a_worker_whose_process_does_not_end_is_told_of_and_killed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_LEAVE_SECONDS", 0.1)
    text = r"\(environment 1\) obeys no more, though it lives: a thread"
    with pytest.raises(RuntimeError, match=text):
        RingVectorEnv([Faulty, Starts(stay)], num_workers=2, context="fork")
    envs = make([Stays] * 2, num_workers=2)
    envs.reset()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            envs.step([0, Faulty.EXIT])
    envs.close()
    assert not multiprocessing.active_children()


def test_a_large_command_is_not_waited_for_when_its_worker_has_died_and_a_process_of_its_own_lives(make: Any) -> None:
    envs = make([Faulty] * 2, num_workers=2)
    envs.reset()
    helper = int(envs.step(np.array([0, Faulty.FORK]))[-1]["helper"][1])
    pid = envs.get_attr("pid")[1]
    os.kill(pid, signal.SIGSTOP)  # it does not receive what goes through its slots in pieces
    timer = threading.Timer(0.5, os.kill, [pid, signal.SIGKILL])
    timer.start()
    try:
        with pytest.raises(RuntimeError, match=r"\(environment 1\) was killed by signal 9"):
            envs.set_attr("large", np.zeros(1_000_000))
    finally:
        timer.join()
        os.kill(helper, signal.SIGKILL)


@pytest.mark.parametrize("call", ["step", "reset after an interrupt", "close"])
def test_a_wait_for_a_worker_that_is_stopped_says_so(make: Any, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts, "SECONDS", 0.3)
    envs = make([Faulty] * 2, num_workers=2)
    envs.reset()
    pid = envs.get_attr("pid")[1]
    if call == "reset after an interrupt":
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            envs.step_async([0, Faulty.SLEEP])
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupt):
                envs.step_wait()
        finally:
            signal.signal(signal.SIGALRM, before)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(1.5, os.kill, [pid, signal.SIGCONT])
    timer.start()
    try:
        text = rf"process {pid} \(environment 1\), which is stopped: `kill -CONT {pid}`"
        with pytest.warns(RuntimeWarning, match=text) as given:
            {"step": lambda: envs.step([0, 0]), "reset after an interrupt": envs.reset, "close": envs.close}[call]()
    finally:
        timer.join()
    assert len(given) == 1


def interrupt(*_: object) -> None:
    raise Interrupt


class Interrupts:
    """Is pickled while Ctrl-C comes, of which another thread hears."""

    pickled = 0

    def __call__(self) -> Any:
        return Faulty()

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        Interrupts.pickled += 1
        return Faulty, ()


def test_ctrl_c_waits_while_a_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interrupts, "pickled", 0)
    ends = threading.Event()
    threading.Thread(target=ends.wait).start()
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            RingVectorEnv([Interrupts()], context="spawn")
    finally:
        ends.set()
    assert Interrupts.pickled == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert not multiprocessing.active_children()


class Runs(Faulty):
    """Runs a program, which tells what Ctrl-C does to it."""

    def tell(self) -> str:
        program = "import signal; print(signal.getsignal(signal.SIGINT))"
        return subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout


def test_ctrl_c_is_not_for_a_worker_but_for_the_programs_that_it_runs(make: Any) -> None:
    envs = make([Runs], num_workers=1)
    envs.reset()
    os.kill(envs.get_attr("pid")[0], signal.SIGINT)
    envs.step([0])
    assert "default_int_handler" in envs.call("tell")[0]


# --- programs


@contextlib.contextmanager
def program(text: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that runs; whatever is left of its process group in the end is killed."""
    (folder / "program.py").write_text(text)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    with subprocess.Popen(
        [sys.executable, str(folder / "program.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_forgotten_main_guard_is_told(method: str, tmp_path: Path) -> None:
    text = f"""
from ringshm.gymnasium import RingVectorEnv
from support.environments import Faulty
RingVectorEnv([Faulty] * 2, num_workers=2, context="{method}")
"""
    with program(text, tmp_path) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert 'if __name__ == "__main__":' in errors.splitlines()[-1]


@pytest.mark.parametrize("daemon", [True, False])
@pytest.mark.parametrize("end", ["", "envs.step_async([0, 0])", "sys.exit()", "del gymnasium, RingVectorEnv"])
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_nothing_is_said_at_exit_where_close_was_forgotten(method: str, end: str, daemon: bool, tmp_path: Path) -> None:
    text = f"""
import sys
import weakref
weakref.finalize(sys.modules["__main__"], int)  # before multiprocessing has its own call at exit
import gymnasium
from ringshm.gymnasium import RingVectorEnv
from support.environments import Faulty
if __name__ == "__main__":
    envs = RingVectorEnv([Faulty] * 2, num_workers=2, context="{method}", daemon={daemon})
    envs.reset()
    circle = [envs]
    circle.append(circle)
    print(*envs.get_attr("pid"), flush=True)
    {end}
"""
    with program(text, tmp_path) as process:
        output, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (0, "")
    assert not any(Path(f"/proc/{pid}").exists() for pid in output.split())


def test_a_process_that_an_environment_has_forked_does_not_hold_up_the_news_of_its_death(make: Any) -> None:
    envs = make([Faulty] * 2, num_workers=2)
    envs.reset()
    helper = int(envs.step(np.array([0, Faulty.FORK]))[-1]["helper"][1])
    try:
        with pytest.raises(RuntimeError, match=r"\(environment 1\) was killed by signal 9"):
            envs.step(np.array([0, Faulty.DIE]))
        envs.close()
        os.kill(helper, 0)  # it lives
    finally:
        os.kill(helper, signal.SIGKILL)


def test_a_worker_whose_exit_code_another_took_is_told_of(tmp_path: Path) -> None:
    text = """
import os, signal
from ringshm.gymnasium import RingVectorEnv
from support.environments import Faulty
envs = RingVectorEnv([Faulty] * 2, num_workers=2, context="fork")
envs.reset()
pid = envs.get_attr("pid")[1]
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
envs.step([0, 0])
"""
    with program(text, tmp_path) as process:
        _, errors = process.communicate(timeout=100)
    text = "(environment 1) has ended (another part of this program took its exit code): close"
    assert text in errors.splitlines()[-1]


def test_workers_end_with_their_process_though_one_has_forked(tmp_path: Path) -> None:
    text = """
from ringshm.gymnasium import RingVectorEnv
from support.environments import Faulty
envs = RingVectorEnv([Faulty] * 2, num_workers=2, context="fork")
envs.reset()
helper = envs.step([0, Faulty.FORK])[-1]["helper"][1]
print(*envs.get_attr("pid"), flush=True)
envs.step([Faulty.FINE, Faulty.FINE])
input()
"""
    with program(text, tmp_path) as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        process.kill()
        process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.01)  # if this does not end, conftest's watchdog tells where
    subprocess.run(
        [sys.executable, "-m", "ringshm", "clean"], stdout=subprocess.PIPE, check=True
    )  # the helper was last
