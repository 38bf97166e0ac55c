"""Runs functions in forked workers under a time limit, so that a contender that hangs stops only itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")

CONTEXT = get_context("fork")  # For everyone alike; the report's header says so.
_GRACE = 5.0  # Seconds for a worker to exit after its result: a feeder thread may still hold messages.


class Failed(Exception):
    """A worker raised, died, or ran past its limit; the message is the reason to report."""


def _work(function: Callable[[], Any], results: Connection[Any, Any], leads: bool) -> None:
    if leads:
        os.setsid()
    try:
        results.send((True, function()))
    except Failed as error:
        results.send((False, str(error)))
    except BaseException as error:
        results.send((False, f"{type(error).__name__}: {error}"))


def place(index: int, pin: bool) -> None:
    """With `pin`, keep this worker on a core of its own, as far as there are cores."""
    if pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


def isolated(function: Callable[[], T], limit: float) -> T:
    """Run `function`, which may start workers, where whatever it does cannot touch this process.

    Raises:
        Failed: As `run_workers`; its workers are dead by then too.
    """
    return run_workers([function], limit + 3 * _GRACE, leads=True)[0]


def run_workers(functions: Sequence[Callable[[], T]], limit: float, leads: bool = False) -> list[T]:
    """Run each function in a process of its own; return what they returned, in order.

    With `leads`, each leads a process group, which is killed as a whole.

    Raises:
        Failed: One raised, died, or had not returned within `limit` seconds. All are dead by then.
    """
    deadline = time.monotonic() + limit
    channels = [CONTEXT.Pipe(duplex=False) for _ in functions]
    workers = [
        CONTEXT.Process(target=_work, args=(function, writer, leads), daemon=not leads)
        for function, (_, writer) in zip(functions, channels, strict=True)
    ]
    readers = [reader for reader, _ in channels]
    results: dict[int, T] = {}
    try:
        for worker, (_, writer) in zip(workers, channels, strict=True):
            worker.start()
            writer.close()  # Only later workers inherit the others: a death is seen through `sentinel`.
        while len(results) < len(workers):
            pending = [index for index in range(len(workers)) if index not in results]
            objects = [x for index in pending for x in (readers[index], workers[index].sentinel)]
            if not wait(objects, max(0.0, deadline - time.monotonic())):
                raise Failed(f"no result after {limit:.0f} s: worker {pending} of {len(workers)} killed")
            for index in pending:
                if readers[index].poll():
                    succeeded, value = readers[index].recv()
                    if not succeeded:
                        raise Failed(value)
                    results[index] = value
                elif not workers[index].is_alive() and not readers[index].poll():
                    raise Failed(f"worker {index} died with exit code {workers[index].exitcode}")
        for worker in workers:
            worker.join(_GRACE)
            if worker.is_alive():
                raise Failed(f"worker had not exited {_GRACE:.0f} s after its result")
    except EOFError as error:
        raise Failed("a worker died without a result") from error
    finally:
        for worker in workers:
            if worker.pid is not None and worker.is_alive():
                if leads:
                    os.killpg(worker.pid, signal.SIGKILL)
                else:
                    worker.kill()
                worker.join()
        for reader in readers:
            reader.close()
    return [results[index] for index in range(len(workers))]
