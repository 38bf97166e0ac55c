"""What all tests share: memory of their own, which is left as it was found, a watchdog, and which of them are slow."""

from __future__ import annotations

import faulthandler
import gc
import inspect
import os
import shutil
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from support import hung, rooms

WATCHDOG_SECONDS, SLOW_WATCHDOG_SECONDS = 180.0, 600.0  # beside others a test takes many times as long as alone
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # "" is the process that was called
DUMP = pytest.StashKey[int]()
ROOM = pytest.StashKey[str]()
LEFT_OUT = pytest.StashKey["Counter[str]"]()

MINUTES, SLOW_MINUTES = 9, 15  # on two cores of a slow machine
WORKERS_PER_CORE = 2  # many tests wait more than they compute


def pytest_addoption(parser: pytest.Parser) -> None:
    """The complete sweeps, and how tests are kept apart from other programs."""
    text = "kill and interrupt each operation at every bytecode (hours): see tests/kills/test_sweep.py"
    parser.addoption("--every-bytecode", action="store_true", help=text)
    parser.addoption("--share", type=float, default=1.0, help="of these bytecodes, drawn by --seed")
    parser.addoption("--seed", type=int, help="of --share; a new one if it is left out")
    text = "mount no /dev/shm for the tests alone, as where that is not permitted: see tests/support/rooms.py"
    parser.addoption("--share-shm", action="store_true", help=text)
    text = "so many times as slow is this machine, as one that is emulated: the watchdog waits so much longer"
    parser.addoption("--slower", type=float, default=1.0, help=text)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the tests out among processes, unless told otherwise; not so a few that are named."""
    option = config.option
    if WORKER:  # which must not have workers in its turn
        return
    if getattr(option, "numprocesses", 0) is None and not (option.usepdb or option.tx or _named(config)):
        option.numprocesses = WORKERS_PER_CORE * len(os.sched_getaffinity(0))
        option.dist = "worksteal"  # under "loadgroup" a test whose worker dies begins again for ever


def pytest_configure(config: pytest.Config) -> None:
    """Prepare for hangs and for Ctrl-C, and keep apart from other programs."""
    # where a dump of stacks is seen: at the end, if there will be one; else at once, on a stderr that is not captured
    if WORKER:
        config.stash[DUMP] = os.open(hung.folder() / WORKER, os.O_WRONLY | os.O_CREAT)
    else:
        config.stash[DUMP] = os.dup(2)
        hung.prepare()
        if getattr(config.option, "tx", None):
            hung.watch()
    # a shell's background job ignores Ctrl-C, and so would all children of the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[ROOM] = rooms.enter_own(WORKER, config.option.share_shm)
    config.stash[LEFT_OUT] = Counter()
    hypothesis.settings.register_profile("busy", deadline=None)  # as a machine may be
    hypothesis.settings.load_profile("busy")


def pytest_unconfigure() -> None:
    """Leave nothing, whatever happened."""
    rooms.leave()
    if not WORKER:
        shutil.rmtree(hung.folder())


def _seconds(item: pytest.Item) -> float:
    """How long it takes at most, alone."""
    marker = item.get_closest_marker("slow")
    return float(marker.kwargs.get("seconds", SLOW_WATCHDOG_SECONDS)) if marker else 0.0


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dump all stacks and end the process if a test hangs."""
    seconds = _seconds(request.node)
    seconds = max(seconds, SLOW_WATCHDOG_SECONDS) if seconds else WATCHDOG_SECONDS
    seconds *= request.config.option.slower
    faulthandler.dump_traceback_later(seconds, exit=True, file=request.config.stash[DUMP])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def shm_unchanged() -> Iterator[None]:
    """Fail a test that leaves something in `/dev/shm`; children get a moment to go."""
    from support.workers import ringshm_files  # which imports ringshm, and so not before `pytest_configure`

    before = ringshm_files()
    yield
    give_up = time.monotonic() + 5
    while (left := ringshm_files() - before) and time.monotonic() < give_up:
        gc.collect()
        time.sleep(0.02)
    assert not left


@pytest.fixture(autouse=True)
def no_lock_left() -> Iterator[None]:
    """Fail a test that leaves this thread in the lock under which it attaches: others would wait there for ever."""
    yield
    from ringshm.process import registry  # not before `pytest_configure`

    assert not registry._lock._is_owned()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """End the thread with which multiprocessing shares descriptors: a process that is not alone in its thread meets no
    ChannelDeadlock for the views that it keeps, since another thread could drop them.
    """
    yield
    sharer = sys.modules.get("multiprocessing.resource_sharer")
    if sharer is not None:
        sharer.stop(5)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine in an event loop: its parameter `kind` says whose."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    from support.loops import run  # not before `pytest_configure`

    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run(pyfuncitem.obj(**arguments), arguments.get("kind", "asyncio"))
    return True


@pytest.fixture
def name() -> str:
    """A name that no channel has yet."""
    return f"test-{uuid.uuid4().hex[:8]}"


# --- which tests run, and what is said of the others


def _named(config: pytest.Config) -> tuple[str, ...]:
    """The tests that the command line names one by one."""
    return tuple(arg.partition("::")[2] for arg in config.args if "::" in arg)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow ones out, unless they are asked for by `-m` or by name; then the slowest begin."""
    items.sort(key=lambda item: -_seconds(item))
    if config.option.markexpr or config.option.every_bytecode or _named(config):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    config.stash[LEFT_OUT].update(item.nodeid.partition("::")[0] for item in slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """How long it takes."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not (config.option.keyword or config.option.markexpr)
    return [f"shared memory: {config.stash[ROOM]}", *[f"takes about {MINUTES} minutes on two cores"] * whole]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that shows results what was left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear it, from any of them: each has seen all tests."""
    node.config.stash[LEFT_OUT] = Counter(
        getattr(node, "workeroutput", {}).get("left_out", node.config.stash[LEFT_OUT])
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show where tests hung, and say what was left out."""
    if WORKER:  # whose terminal nobody reads
        return
    write = terminalreporter.write_line
    hung.end_left()
    for dump in sorted(hung.folder().iterdir()):
        if text := dump.read_text(encoding="utf-8"):
            terminalreporter.section(f"{dump.name} hung")
            write(text)
    left_out = config.stash[LEFT_OUT]
    if not left_out:
        return
    terminalreporter.section("left out")
    for file, count in sorted(left_out.items()):
        write(f"{count:5} slow tests of {file}")
    write(f"They take about {SLOW_MINUTES} minutes: python -m pytest -m slow")
    write("Each bytecode of each operation, instead of a sample, takes hours: python -m pytest --every-bytecode")
