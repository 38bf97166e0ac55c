"""What a test that hung has left running: each of its processes says where it stands, and is ended.

The watchdog ends the process that runs a test, a worker of pytest-xdist, and says where that was: often in a wait for a
process of its own, which is the one that hangs, and goes on. If that was forked, it holds the pipe by which the worker
spoke, so that the whole run waits for it. `faulthandler` shows where a process is when it is aborted: on its stderr;
where that is a file, as where pytest captures it, it is read here, with all that the test's processes have written.
"""

from __future__ import annotations

import os
import select
import signal
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

_FOLDER = "RINGSHM_TEST_HANGS"  # the environment variable that names it: a folder of this run alone
_PATIENCE = 10.0  # seconds that a process may take to say where it is
_SHOWN = 20_000  # of what a test's processes have written
_ROUNDS = 5  # in which also those are found that were started meanwhile

_known: set[str] = set()
_lock = threading.Lock()


def prepare() -> None:
    """Before this process starts the workers: have them, and all that they start, say where they stand."""
    os.environ[_FOLDER] = os.path.realpath(tempfile.mkdtemp())
    os.environ["PYTHONFAULTHANDLER"] = "1"


def folder() -> Path:
    """Where each worker that hangs writes its stacks, under its name."""
    return Path(os.environ[_FOLDER])


def watch() -> None:
    """From now on end what workers leave that hang. The thread is in a process that runs no tests."""

    def keep_looking() -> None:
        while True:
            time.sleep(1)
            end_left()

    threading.Thread(target=keep_looking, daemon=True).start()


def end_left() -> None:
    """End what each worker has left that has hung since the last call, and add to its file what that said."""
    with _lock, suppress(FileNotFoundError):  # the run is over
        for dump in sorted(folder().iterdir()):
            if dump.name not in _known and dump.stat().st_size:
                _known.add(dump.name)
                time.sleep(1)  # the worker ends by itself
                told: list[str] = []
                for _ in range(_ROUNDS):
                    if not (left := _left(dump)):
                        break
                    told += _end_all(left)
                with dump.open("a", encoding="utf-8") as file:
                    file.writelines(told)


def _left(dump: Path) -> dict[int, int]:
    """Descriptors of the processes that a worker has left, by their pids."""
    worker = {f"{_FOLDER}={dump.parent}".encode(), f"PYTEST_XDIST_WORKER={dump.name}".encode()}
    left = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):  # it has just ended
            pidfd = os.pidfd_open(pid)
            if _is_of(Path(f"/proc/{pid}"), dump, worker):
                left[pid] = pidfd
            else:
                os.close(pidfd)
    return left


def _is_of(process: Path, dump: Path, worker: set[bytes]) -> bool:
    """Whether that worker has started the process, or forked it."""
    with suppress(OSError):  # it is another user's, or has just ended
        begun = worker.issubset((process / "environ").read_bytes().split(b"\0"))
        return begun or any(fd.is_symlink() and fd.readlink() == dump for fd in (process / "fd").iterdir())
    return False


def _end_all(left: dict[int, int]) -> list[str]:
    """End processes, and what each of them said. They are stopped first: the end of one would have another go on."""
    for pidfd in left.values():
        _send(pidfd, signal.SIGSTOP)
    read: dict[int, int] = {}
    return [f"\nprocess {pid}{_end(pid, pidfd, read)}" for pid, pidfd in left.items()]


def _end(pid: int, pidfd: int, read: dict[int, int]) -> str:
    """End it; what it is, and what it wrote. `read` has how far each file, by its inode, was read for others."""
    told = " has ended\n"
    with suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        told = f": {command[:300]}\n"
        written = Path(f"/proc/{pid}/fd/2")
        if written.is_file():
            with written.open("rb") as file:
                status = os.stat(file.fileno())
                file.seek(max(read.get(status.st_ino, 0), status.st_size - _SHOWN))
                _abort(pidfd)
                told += file.read().decode(errors="replace")
                read[status.st_ino] = file.tell()
    _send(pidfd, signal.SIGKILL)
    os.close(pidfd)
    return told


def _abort(pidfd: int) -> None:
    _send(pidfd, signal.SIGABRT)
    _send(pidfd, signal.SIGCONT)
    select.select([pidfd], [], [], _PATIENCE)


def _send(pidfd: int, number: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
