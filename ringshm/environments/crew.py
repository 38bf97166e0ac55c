"""The workers of a vectorised environment, as the process sees them that it is for.

    crew.send(k, command)                           to worker k; it gets its next one when it has answered
    k, note = crew.take(awaited, timeout, place)    the next answer of those that are awaited, as they come

1. All workers answer on one channel, which has a slot for each of them, so none waits for another. Commands and notes
   have a channel for each worker: `worker.py` says what is in them.
2. No wait outlasts the worker that it is for: it looks every slice whether that process has ended, by its exit code. A
   process that an environment has forked keeps a worker's channels, and its pipes, open; an exit code it cannot hide.
   Nor does it outlast a worker that has left its loop and lives on, for a thread that an environment has started, say:
   that one has let go of its commands. A worker that is stopped lives: a wait for it says so after ten seconds.
3. The workers end with this object; with the interpreter, before multiprocessing waits for those that are no daemons;
   and when this process is killed (`worker.py`, 3).
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import operator
import os
import pickle
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

from gymnasium.vector.utils import CloudpickleWrapper, clear_mpi_env_vars

from ..arguments import whole_number
from ..channel import doubts
from ..channel.channel import Channel, Sender
from ..errors import BrokenChannel, ChannelClosed, EndOfChannel, UndecodableMessage
from ..process.attachment import Attachment
from ..process.seat import levels_to_the_user
from ..ring.diagnosis import process_now
from ..system import monotonic, sleep
from .parts import Parts
from .worker import Failure, Lookout, Worker, answer_spec, work

#: Makes a worker, from its number, that of its first environment, the parts of observations, and its two channels.
WorkerOf = Callable[[int, int, Parts, Sender[Any], Sender[Any]], Worker]
#: Is given a worker's number, and views of its answer, by the names of the fields.
Place = Callable[[int, Any], None]
_SPARE_SLOTS = 2  # of answers: the traceback of an interrupted call, which a notebook keeps, keeps views of a slot
_SLICE_SECONDS = 0.05  # between two looks whether a worker that is waited for has ended
_LEAVE_SECONDS = 5.0  # that a process may take to end that has left its loop, or is told to while it starts


def _has_ended(process: BaseProcess) -> bool:
    """Whether a process has; also where its exit code went to another part of this program."""
    if process.exitcode is not None:
        return True
    try:
        os.kill(process.pid or 0, 0)
    except ProcessLookupError:
        return True
    return False


class Commands(Channel[Any]):
    """What a worker is told. A `put` that waits ends with BrokenChannel, too, when the worker's process has ended."""

    process: BaseProcess | None = None  # once it is started

    def has_no_reader(self) -> bool:
        """Whether the worker has let go of it."""
        return self._open().over_for_senders()

    def _check_open(self, attachment: Attachment) -> None:
        """What each wait does between two looks."""
        super()._check_open(attachment)
        if self.process is not None and _has_ended(self.process):
            raise BrokenChannel(f"process {self.process.pid} has ended")


class Link(NamedTuple):
    """A worker, as this process sees it."""

    process: BaseProcess
    commands: Commands
    notes: Channel[Any]
    envs: slice  # the environments that it steps

    def has_ended(self) -> bool:
        """Whether it obeys no more."""
        return _has_ended(self.process) or self.commands.has_no_reader()

    def __str__(self) -> str:
        return f"process {self.process.pid} ({_named(self.envs)})"


def _named(envs: slice) -> str:
    several = envs.stop - envs.start > 1
    return f"environments {envs.start} to {envs.stop - 1}" if several else f"environment {envs.start}"


class _Doubt:
    """Says of a wait without a time limit after ten seconds, once, which of the workers are stopped that it is for."""

    def __init__(self) -> None:
        self._at = monotonic() + doubts.SECONDS

    def look(self, links: Iterable[Link]) -> None:
        """Between two slices."""
        if monotonic() < self._at:
            return
        stopped = [link for link in links if (process := process_now(link.process.pid or 0)) and process.stopped]
        self._at = math.inf if stopped else monotonic() + doubts.SECONDS
        for link in stopped:
            warnings.warn(
                f"this call has waited for {doubts.SECONDS:.0f} s for {link}, which is stopped: `kill -CONT "
                f"{link.process.pid}` lets it go on, `kill -KILL {link.process.pid}` ends the wait",
                RuntimeWarning,
                stacklevel=levels_to_the_user(),
            )


def count_of_workers(env_fns: Sequence[Callable[[], Any]], num_workers: int | None) -> int:
    """How many workers step the environments: by default one for each core, if there are so many."""
    must = "must be a list of functions that make environments, as [lambda: gymnasium.make(...)] is"
    try:
        num_envs, makers = len(env_fns), iter(env_fns)
    except TypeError:
        raise TypeError(f"env_fns={env_fns!r:.100} {must}") from None
    if wrong := [one for one in makers if not callable(one)]:
        raise TypeError(f"env_fns {must}; it has {wrong[0]!r:.100}")
    if not num_envs:
        raise ValueError("env_fns is empty: give one for each environment")
    if num_workers is None:
        return min(len(os.sched_getaffinity(0)), num_envs)
    return whole_number(num_workers, "num_workers", num_envs, ", the number of env_fns")


def seeds_of(seed: Any, num_envs: int) -> list[int | None]:
    """A seed for each environment, or None: of one number, or of a sequence with one for each."""
    if seed is None:
        return [None] * num_envs
    try:
        first = operator.index(seed)
    except TypeError:
        pass
    else:
        return [first + i for i in range(num_envs)]
    try:
        seeds = [None if one is None else operator.index(one) for one in seed]
    except TypeError:
        raise TypeError(
            f"seed={seed!r:.100} must be an int, None, or a list with one of these for each environment"
        ) from None
    if len(seeds) != num_envs:
        raise ValueError(f"{len(seeds)} seeds for {num_envs} environments: give one for each")
    return seeds


class Crew:
    """Workers, each with some of the environments.

    Args:
        env_fns: make the environments.
        count: how many workers there are.
        parts: of the observations.
        worker_of: makes what a worker's process runs.
        context: the start method; None is the default one.
        daemon: as of `multiprocessing.Process`.

    Raises:
        RuntimeError: if a worker is lost while it starts; says how.
        Whatever the making of an environment raises; the traceback is its cause.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], Any]],
        count: int,
        parts: Parts,
        worker_of: WorkerOf,
        context: str | None,
        daemon: bool,
    ) -> None:
        n = len(env_fns)
        groups = [slice(k * n // count, (k + 1) * n // count) for k in range(count)]
        spec = answer_spec(parts, -(-n // count))
        self.links: list[Link] = []
        self.spaces: list[tuple[Any, Any]] = []  # of each environment: of its observations, of its actions
        self._unread: set[int] = set()  # workers whose answer has come, but not its note
        self._taken = 0  # answers so far
        self._settled = 0  # how often they were settled
        self._ended: dict[int, int] = {}  # workers whose processes have; how many are taken when all of theirs are
        self._next_look = 0.0  # when to look for such
        self._started = False
        self._method = multiprocessing.get_context(context)
        self._answers: Channel[Any] = Channel(count + _SPARE_SLOTS, spec=spec, max_participants=4 * count + 64)
        self._lookout = Lookout(self._answers)
        self._end = Finalize(self, _kill, (self._answers, self.links), exitpriority=0)
        try:
            for k, envs in enumerate(groups):
                self._start(k, envs, env_fns[envs], parts, worker_of, daemon)
            self._meet()
        except BaseException as error:  # those that can close their environments do so; not if a person is in a hurry
            self.end(_LEAVE_SECONDS, terminate=not isinstance(error, Exception))
            raise

    def _start(
        self, k: int, envs: slice, env_fns: Sequence[Any], parts: Parts, worker_of: WorkerOf, daemon: bool
    ) -> None:
        makers = [CloudpickleWrapper(make) for make in env_fns]
        with contextlib.ExitStack() as channels:
            commands = channels.enter_context(Commands(2, "16KiB"))
            commands.put(None)  # the worker's stream of commands has begun: so it ends, should this process die
            notes: Channel[Any] = channels.enter_context(Channel(2, "64KiB"))
            worker = worker_of(k, envs.start, parts, self._answers.sender(), notes.sender())
            process: BaseProcess = self._method.Process(  # type: ignore[attr-defined]
                target=work, args=(worker, makers, commands.receiver()), daemon=daemon
            )
            try:
                with clear_mpi_env_vars(), _interrupts_held(self._method):
                    process.start()
                    commands.process = process
                    self.links.append(Link(process, commands, notes, envs))
                    channels.pop_all()
            except (OSError, EOFError) as error:
                if isinstance(error, OSError) and error.errno is None:  # it is not the kernel's: see errors.is_own
                    raise
                raise RuntimeError(f"the process for {_named(envs)} did not start ({error!r}): {_NOT_BEGUN}") from error

    def _meet(self) -> None:
        """Hear from all workers of the spaces of their environments; raise the first failure, if there is one."""
        awaited = set(range(len(self.links)))
        spaces: list[Any] = [None] * len(self.links)
        while awaited:
            k, note = self.take(awaited, None, lambda k, answer: None)
            if isinstance(note, Exception):
                raise note
            spaces[k] = note
        self.spaces = [pair for pairs in spaces for pair in pairs]
        self._started = True

    # --- commands and answers

    def send(self, k: int, command: Any) -> None:
        """Give a worker its next command. Of one that has ended the answer will tell."""
        with contextlib.suppress(BrokenChannel):
            self.links[k].commands.put(command)

    def take(self, awaited: set[int], timeout: float | None, place: Place) -> tuple[int, Any]:
        """Take the next answer of a worker that is awaited; it is awaited no more.

        Args:
            awaited: the numbers of those that have a command, and have not answered.
            timeout: in seconds; None waits as long as they live.
            place: is given the worker's number, and views of the answer, which last until it returns.

        Returns:
            The worker's number, and its note: None if there is none; an exception if the command has failed, or the
            worker is lost.

        Raises:
            queue.Empty: if no answer came in time.
        """
        until = math.inf if timeout is None else monotonic() + timeout
        for k in self._unread & awaited:  # time was up for a call that had its answer
            return self._noted(k, awaited, until)
        self._lookout.look()
        doubt = None
        while True:
            ended = self._look(awaited)
            answer = None
            if not any(self._ended[k] <= self._taken for k in ended):
                left = 0.0 if ended else max(0.0, min(_SLICE_SECONDS, until - monotonic()))
                answer = self._answer(awaited, left, place)
            if answer is not None:
                self._lookout.end()
                k, noted = answer
                return self._noted(k, awaited, until) if noted else (k, None)
            if ended:
                k = min(ended, key=self._ended.__getitem__)
                awaited.discard(k)
                return k, self._lost(k)
            if monotonic() >= until:
                raise queue.Empty
            if timeout is None:
                doubt = doubt or _Doubt()
                doubt.look(self.links[k] for k in awaited)

    def _look(self, awaited: set[int]) -> list[int]:
        """Those of the awaited that have ended, as of a slice ago. What they have answered is among the next answers,
        as many as the channel can hold: also while others' keep coming a lost one is told of.
        """
        now = monotonic()
        if now >= self._next_look:
            self._next_look = now + _SLICE_SECONDS
            for k in awaited.difference(self._ended):
                if self.links[k].has_ended():
                    self._ended[k] = self._taken + self._answers.capacity
        return [k for k in self._ended if k in awaited] if self._ended else []

    def _answer(self, awaited: set[int], timeout: float, place: Place) -> tuple[int, bool] | None:
        """The next answer: whose it is, and whether there is a note; None if none has come."""
        try:
            with self._answers.borrow(timeout) as answer:
                settled, k = divmod(int(answer["tag"]), len(self.links))
                is_new, noted = settled == self._settled, bool(answer["noted"])
                if is_new:
                    place(k, answer)
                self._taken += 1
                if is_new:
                    (self._unread.add if noted else awaited.discard)(k)
        except queue.Empty:
            return None
        except EndOfChannel:  # all workers have ended, or are about to
            sleep(min(timeout, _SLICE_SECONDS))
            return None
        return (k, noted) if is_new else self._answer(awaited, timeout, place)

    def _noted(self, k: int, awaited: set[int], until: float) -> tuple[int, Any]:
        """The note that belongs to an answer."""
        note = self._note(k, until)
        self._unread.discard(k)
        awaited.discard(k)
        return k, note

    def _note(self, k: int, until: float) -> Any:
        link, lost = self.links[k], False
        while True:
            left = max(0.0, min(_SLICE_SECONDS, until - monotonic()))
            try:
                note = link.notes.get(timeout=0 if lost else left)
                return _error(note) if isinstance(note, Failure) else note
            except UndecodableMessage as error:
                failed = RuntimeError(f"what {link} answered cannot be unpickled here: {error.__cause__!r}")
                failed.__cause__ = error
                return failed
            except (queue.Empty, EndOfChannel):
                if lost:
                    return self._lost(k)
                lost = link.has_ended()
                if not lost and monotonic() >= until:
                    raise queue.Empty from None

    def _lost(self, k: int) -> RuntimeError:
        """Why a worker does not answer: it has ended."""
        link = self.links[k]
        link.process.join(_LEAVE_SECONDS)
        code = link.process.exitcode
        if not _has_ended(link.process):
            how = "obeys no more, though it lives: a thread that an environment has started may keep it from its end"
        elif code is None:
            how = "has ended (another part of this program took its exit code)"
        elif code < 0:
            how = f"was killed by signal {-code}" + " (as the kernel does when memory is short)" * (code == -9)
        else:
            how = f"ended with exit code {code}"
        if self._started:
            return RuntimeError(f"{link} {how}: close this vector environment and make another")
        then = "make this vector environment again" if code is not None and code < 0 else _NOT_BEGUN
        return RuntimeError(f"{link} {how} before it had begun: {then}")

    # --- after an interrupt

    def settle(self) -> None:
        """Have all workers idle, and nothing of theirs unread, whatever an interrupt has left: each echoes a number.

        An answer that was borrowed then may come again even later; it has an older tag.
        """
        self._settled += 1
        n = len(self.links)
        untold, awaited, doubt = set(range(n)), set(range(n)), _Doubt()
        while awaited:
            for k in sorted(untold):
                with contextlib.suppress(queue.Full, BrokenChannel):
                    self.links[k].commands.put_nowait(("echo", (self._settled, self._settled * n + k)))
                    untold.discard(k)
            self._drop_answer()
            awaited = {k for k in awaited if not self._has_echoed(k)}
            doubt.look(self.links[k] for k in awaited)
        while self._drop_answer():
            pass
        self._unread.clear()

    def _has_echoed(self, k: int) -> bool:
        """Whether a worker has, or has ended; what it told before is dropped."""
        ended = self.links[k].has_ended()
        while True:
            try:
                note = self.links[k].notes.get(timeout=0.01)
            except UndecodableMessage:
                continue
            except (queue.Empty, EndOfChannel):
                return ended
            if isinstance(note, int) and note == self._settled:
                return True

    def _drop_answer(self) -> bool:
        try:
            with self._answers.borrow(timeout=0):
                self._taken += 1
        except (queue.Empty, EndOfChannel):
            return False
        return True

    # --- the end

    def end(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Have the workers close their environments, and end.

        Args:
            timeout: kill those that have not ended after so many seconds; None waits as long as they take.
            terminate: kill all at once.
        """
        if not self._end.still_active():
            return
        until = math.inf if timeout is None else monotonic() + timeout
        for link in self.links:
            with contextlib.suppress(ChannelClosed):  # by a call that was interrupted
                link.commands.shutdown(immediate=True)
        if not terminate:
            for link in self.links:  # what they still have to say, nobody reads: they must not wait for that
                link.notes.close()
            self._answers.close()
            doubt = _Doubt()
            while monotonic() < until and not all(_has_ended(link.process) for link in self.links):
                if all(map(Link.has_ended, self.links)):  # some live on for threads of environments
                    until = min(until, monotonic() + _LEAVE_SECONDS)
                if timeout is None:
                    doubt.look(self.links)
                sleep(0.001)
        self._end()


def _close(answers: Channel[Any], links: Sequence[Link]) -> None:
    for link in links:
        link.notes.close()
        link.commands.close()
    answers.close()


def _kill(answers: Channel[Any], links: Sequence[Link]) -> None:
    """Kill the workers that live."""
    for link in links:
        link.process.kill()
    for link in links:
        link.process.join()
    _close(answers, links)


def _error(failure: Failure) -> Exception:
    """The exception that an environment has raised; its cause is the traceback."""
    try:
        error = pickle.loads(failure.error)
    except Exception:  # its class is not to be had in this process
        error = RuntimeError("an environment has failed, with an exception that cannot be unpickled here")
    error.__cause__ = RuntimeError(failure.text)
    return error  # type: ignore[no-any-return]


@contextlib.contextmanager
def _interrupts_held(method: Any) -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended, whichever thread the kernel gives it to; a process that is started in
    it does not hear one while it starts, unless a server forks it, which is the whole program's.
    """
    resource_tracker.ensure_running()  # else the first start does that, and ends this early
    if method.get_start_method() == "forkserver":
        forkserver.ensure_running()
    came: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        handler = None  # handlers are not for this thread to set, and do not run in it
    if handler is not None:
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


_NOT_BEGUN = (
    "its traceback, if there is one, has gone to stderr; under spawn and forkserver a worker imports the program "
    'again, which must start nothing outside of `if __name__ == "__main__":`'
)
