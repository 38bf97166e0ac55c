"""How the examples start their processes: none hears Ctrl-C, which is the first one's to obey, and none is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended; processes that are started in it never hear one."""
    resource_tracker.ensure_running()  # else the first start does that, and ends this early
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def start(target: Callable[..., None], *args: Any) -> SpawnProcess:
    """Run `target(*args)` in a new process. Handles that were made for it alone go within this (but not on 3.10), where
    no Ctrl-C comes that their finalisers would lose: Python prints what is raised in one, and goes on.
    """
    with interrupts_held():
        process = multiprocessing.get_context("spawn").Process(target=target, args=args)
        del args
        process.start()
    return process


def replaced(process: SpawnProcess, make: Callable[[], SpawnProcess], name: str) -> SpawnProcess:
    """The process; another, which `make` starts, if it has died: that is said on stdout."""
    if process.is_alive():
        return process
    code = process.exitcode or 0
    how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
    print(f"{name} (pid {process.pid}) {how}: starting another", flush=True)
    return make()


def end(processes: Iterable[BaseProcess]) -> None:
    """Wait for processes that have reason to end; abort those that do not: `faulthandler` says where they are."""
    with interrupts_held():
        for process in processes:
            process.join(timeout=30)
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGABRT)
                process.join(timeout=5)
            process.kill()
            process.join()


@contextlib.contextmanager
def children(target: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> Iterator[list[SpawnProcess]]:
    """Processes that run `target` with each of these arguments; killed if the block raises.

    Raises:
        RuntimeError: if one has failed, or did not end by itself when the block had.
    """
    processes: list[SpawnProcess] = []
    try:
        processes += (start(target, *args) for args in arguments)
        yield processes
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        end(processes)
    for process in processes:
        if process.exitcode:
            raise RuntimeError(f"process {process.pid} did not end well: exit code {process.exitcode}")
