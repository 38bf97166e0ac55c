"""CPython's own tests of multiprocessing's queues, as this Python has them, pass on ringshm's, unchanged.

Cases that cannot hold for a bounded, preallocated queue are listed with the reason, and must fail as listed.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import pytest
from support.workers import TESTS

pytest.importorskip("test._test_multiprocessing", reason="this Python comes without its test suite")

import cpython_queues

CASES = list(cpython_queues.cases())
#: Those that start an interpreter for each process.
SLOW_METHODS = ("spawn", "forkserver")


class Reason(NamedTuple):
    """Why a case cannot hold, what it ends with, and the first Python that has it."""

    why: str
    ends_with: str
    since: tuple[int, int] = (3, 10)


CANNOT_HOLD = {
    "WithProcessesTestQueue.test_queue_feeder_donot_stop_onexc": Reason(
        "puts what cannot be pickled, for a thread to print the traceback: there is no thread, put raises",
        "NotSerializable) cannot be pickled: AttributeError(); nothing was sent: send something else in its place",
    ),
    "WithProcessesTestQueue.test_queue_feeder_on_queue_feeder_error": Reason(
        "overrides a private hook of the thread that pickles: there is no thread, put raises",
        "NotSerializable) cannot be pickled: AttributeError(); nothing was sent: send something else in its place",
    ),
    "TestSimpleQueue.test_closed": Reason(
        "looks at the private ends of the pipe: there is no pipe",
        "AttributeError: 'SimpleQueue' object has no attribute '_reader'",
    ),
    "TestStartMethod.test_mixed_startmethod": Reason(
        "a queue of a fork context must be refused by processes of other start methods: ours goes to any process",
        "AssertionError: RuntimeError not raised",
        since=(3, 11),
    ),
}


@functools.cache
def run_cases(method: str) -> dict[str, dict[str, Any]]:
    """All cases under one start method, in a process of their own: what was reported of each."""
    command = [sys.executable, str(TESTS / "dropin" / "cpython_queues.py"), method, *CASES]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    # a case makes a folder of a fixed name in the current one, where another worker of pytest may run the suite, too
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=folder
        )
        status = process.wait()
        if status:
            os.killpg(process.pid, signal.SIGKILL)  # all its children, too
        output.seek(0)
        lines = output.read().splitlines()
    assert status == 0, "\n".join(lines)
    reports = [json.loads(line) for line in lines if line.startswith('{"case"')]
    return {report["case"]: report for report in reports}


# under the first case of each method all are run
methods = pytest.mark.parametrize("method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW_METHODS)])


@methods
@pytest.mark.parametrize("case", CASES)
def test_a_case_of_cpythons_ends_as_it_must(method: str, case: str) -> None:
    report = run_cases(method)[case]
    if report["outcome"] == "skipped":
        pytest.skip(report["text"])
    if case in CANNOT_HOLD:
        assert report["outcome"] == "failed", f"it holds: take it off the list ({CANNOT_HOLD[case].why})"
        assert report["text"].strip().splitlines()[-1].endswith(CANNOT_HOLD[case].ends_with)
    else:
        assert report["outcome"] == "passed", report["text"]


def test_what_is_listed_is_a_case_of_this_python() -> None:
    assert {case for case, reason in CANNOT_HOLD.items() if reason.since <= sys.version_info[:2]} <= set(CASES)


def test_there_are_the_cases_that_are_to_be_run() -> None:
    """What the suite calls them may change; then they are not to be missed in silence."""
    for kind in ("WithProcessesTestQueue", "WithThreadsTestQueue"):
        for case in ("put", "get", "fork", "qsize", "task_done", "timeout", "closed_queue_put_get_exceptions"):
            assert f"{kind}.test_{case}" in CASES
    assert {"TestSimpleQueue.test_empty", "TestSimpleQueue.test_close"} <= set(CASES)
