"""CPython's own tests of multiprocessing's queues, unchanged, on ringshm's: what test_cpython_queues.py starts.

    python tests/cpython_queues.py METHOD CASE...

`multiprocessing` makes its queues from three names in `multiprocessing.queues`, where ringshm's stand here instead. The
cases and their fixtures are those that CPython's suite installs for a start method; children import this file again.
Reports one line of JSON for each case.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import multiprocessing.queues
import sys
import time
import unittest
from collections.abc import Iterator
from typing import Any

from test import _test_multiprocessing as cpython

import ringshm

#: Seconds for all cases together, without and with interpreters to start; then all stacks are dumped.
LIMIT, SLOW_LIMIT = 50.0, 500.0
#: Cases of threads make their queues elsewhere: they get ringshm's here.
THREADS = "WithThreadsTestQueue"


def install(names: dict[str, Any], method: str) -> None:
    """Put ringshm's queues in the place of multiprocessing's, and CPython's cases into a module's names."""
    for kind in ("Queue", "JoinableQueue", "SimpleQueue"):
        setattr(multiprocessing.queues, kind, getattr(ringshm, kind))
    cpython.install_tests_in_module_dict(names, method)
    names[THREADS].Queue = staticmethod(ringshm.Queue)
    names[THREADS].JoinableQueue = staticmethod(ringshm.JoinableQueue)


def cases() -> Iterator[str]:
    """Names of all cases about queues, and of those elsewhere in the suite that make one between processes."""
    names: dict[str, Any] = {"__name__": "cpython"}
    cpython.install_tests_in_module_dict(names, "fork")
    for kind in names.values():
        if not (isinstance(kind, type) and issubclass(kind, unittest.TestCase)):
            continue
        name = kind.__name__
        about_queues = name in ("WithProcessesTestQueue", THREADS, "TestSimpleQueue")
        others = not name.startswith(("WithManager", "WithThreads"))
        for case in unittest.defaultTestLoader.getTestCaseNames(kind):
            if about_queues or (others and "Queue(" in inspect.getsource(getattr(kind, case))):
                yield f"{name}.{case}"


class Report(unittest.TestResult):
    """Says of each case how it went: "passed", "failed" or "skipped", and why."""

    def startTest(self, test: unittest.TestCase) -> None:
        self._outcome, self._text = "passed", ""
        self._begin = time.monotonic()
        super().startTest(test)

    def _note(self, outcome: str, text: str) -> None:
        self._outcome, self._text = outcome, text

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        if not isinstance(test, unittest.TestCase):  # a fixture of the module or a class
            raise SystemExit(self.errors[-1][1])
        self._note("failed", self.errors[-1][1])

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self._note("failed", self.failures[-1][1])

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._note("failed", (self.failures + self.errors)[-1][1])

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._note("skipped", reason)

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        name = f"{type(test).__name__}.{test._testMethodName}"
        seconds = time.monotonic() - self._begin
        print(json.dumps({"case": name, "outcome": self._outcome, "text": self._text, "seconds": seconds}), flush=True)


def main() -> None:
    """Run the cases that the command line names."""
    from support.workers import die_with_parent  # not in the children, which import this file, too

    die_with_parent()
    faulthandler.dump_traceback_later(LIMIT if sys.argv[1] == "fork" else SLOW_LIMIT, exit=True)
    suite = unittest.TestSuite()
    for name in sys.argv[2:]:
        kind, case = name.split(".")
        suite.addTest(globals()[kind](case))
    suite.run(Report())
    faulthandler.cancel_dump_traceback_later()


if __name__ in ("__main__", "__mp_main__"):
    install(globals(), sys.argv[1])
if __name__ == "__main__":
    main()
