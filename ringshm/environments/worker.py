"""A worker: a process that steps some of the environments, one after the other, as it is told.

1. It is sent commands, pickled, and answers each of them, and first of all that it has made its environments, with one
   typed message (`answer_spec`), which it writes while it obeys, straight into a slot. What a step has only now and
   then, infos and errors and the results of calls, follows in a note, pickled; the answer says whether there is one.
2. An exception of an environment, an observation that does not fit, a note that cannot be pickled: each fails the
   command that it belongs to, whose note is then a Failure. The worker goes on. Only if its environments cannot be
   made, it ends.
3. It ends when its commands do, or the process that sends them: no exception of the environments is taken for that.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..channel.channel import Receiver, Sender
from ..errors import BrokenChannel, ChannelClosed, ChannelNotFound, EndOfChannel, UndecodableMessage
from ..system import monotonic
from .parts import Parts

OUTCOME = np.dtype([("reward", np.float64), ("terminated", np.bool_), ("truncated", np.bool_)])  # beside observations
LOOK_SECONDS = 0.001  # whoever has waited for less the last time looks for so long before going to sleep
_FEWEST_SKIPS, _MOST_SKIPS = 16, 1024  # waits without a look, after one that took long; twice as many each time
_PARENT_SECONDS = 2.0  # between two looks whether the process that started this one has gone
Played = tuple[Any, Any, bool, bool, dict[str, Any]]  # observation, reward, terminated, truncated, info
_GONE = (EndOfChannel, BrokenChannel, ChannelClosed, ChannelNotFound)


def answer_spec(parts: Parts, count: int) -> dict[str, Any]:
    """The spec of the answers of workers that step up to `count` environments: a tag, which tells whose it is, and
    whether there is a note; of each environment its observation, reward, and whether its episode is over.
    """
    observations = {name: (dtype, (count, *shape)) for name, (dtype, shape) in parts.fields.items()}
    return {**observations, "outcome": (OUTCOME, count), "tag": np.int64, "noted": np.bool_}


class Failure(NamedTuple):
    """Why a command has failed: in words, with the traceback; and the exception, pickled."""

    text: str
    error: bytes


class Lookout:
    """Looks for a message first if one came soon the last time: to go to sleep and to be woken takes longer than many
    a step does; but who looks for long takes the core from those who step.

    Where other work wants the core, a look that yields gives it away for as long as all of that work takes its turns,
    while who sleeps and is woken gets it back at once. So a yield that took long is the last for many waits.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._waited = 0.0  # seconds, the last time
        self._began = 0.0
        self._skipped = 0  # waits without a look that are still to come
        self._skips = _FEWEST_SKIPS

    def look(self) -> None:
        """The wait begins."""
        self._began = now = monotonic()
        if self._waited >= LOOK_SECONDS:
            return
        if self._skipped:
            self._skipped -= 1
            return
        while self._channel.empty() and now < self._began + LOOK_SECONDS:
            os.sched_yield()  # whoever is to send it may be on this core
            before, now = now, monotonic()
            if now > before + 2 * LOOK_SECONDS:
                self._skipped, self._skips = self._skips, min(2 * self._skips, _MOST_SKIPS)
                return
        self._skips = max(self._skips // 2, _FEWEST_SKIPS)

    def end(self) -> None:
        """A message has come."""
        self._waited = monotonic() - self._began


class Worker:
    """Obeys commands; what a step is, a subclass says.

    Args:
        number: which of the workers it is.
        first: the number of its first environment.
        parts: of the observations.
        answers, notes: where it tells.
    """

    def __init__(self, number: int, first: int, parts: Parts, answers: Sender[Any], notes: Sender[Any]) -> None:
        self.first, self.parts, self.answers, self.notes = first, parts, answers, notes
        self.tag = number  # of its answers
        self.envs: list[Any] = []
        self.observations: list[Any] = []
        self.over: list[bool] = []  # whether an environment's last step ended its episode
        self.at = 0  # the environment that is at work: to be named if it fails

    # --- what it can be told to do: each gets its slot, and gives its note, or None

    def make(self, slot: Any, makers: Sequence[Callable[[], Any]]) -> Any:
        """Make the environments, and tell their spaces."""
        for self.at, maker in enumerate(makers):
            self.envs.append(maker())
        self.observations, self.over = [None] * len(makers), [False] * len(makers)
        return [(env.observation_space, env.action_space) for env in self.envs]

    def step(self, slot: Any, actions: Sequence[Any]) -> Any:
        """Step all of them."""
        return self._told(slot, lambda i: self.play(i, actions[i]))

    def play(self, i: int, action: Any) -> Played:
        """A step of an environment: its observation, reward, whether it is terminated or truncated, and infos."""
        raise NotImplementedError

    def reset(self, slot: Any, seeds: Sequence[Any], options: Any, mask: Sequence[bool]) -> Any:
        """Reset those that the mask names; of the others tell the observation again."""

        def play(i: int) -> Played:
            if not mask[i]:
                return self.observations[i], 0.0, self.over[i], False, {}
            observation, info = self.envs[i].reset(seed=seeds[i], options=options)
            return observation, 0.0, False, False, info

        return self._told(slot, play)

    def call(self, slot: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What a method, or an attribute, of each is."""
        results = []
        for i, env in enumerate(self.envs):
            self.at = i
            value = env.get_wrapper_attr(name)
            results.append(value(*args, **kwargs) if callable(value) else value)
        return results

    def set(self, slot: Any, name: str, values: Sequence[Any]) -> Any:
        """Set an attribute of each."""
        for i, env in enumerate(self.envs):
            self.at = i
            env.set_wrapper_attr(name, values[i])

    def echo(self, slot: Any, number: int, tag: int) -> Any:
        """The number, which tells that all earlier commands were obeyed; from here on answers have another tag."""
        self.tag = tag
        return number

    def refuse(self, slot: Any, error: Exception) -> Any:
        """A command that this process cannot unpickle."""
        return self._failure(error, f"a command for the environments from {self.first} on")

    def _told(self, slot: Any, play: Callable[[int], Played]) -> Any:
        """Let each environment play, and write what comes of it; the infos and loose parts are the note."""
        columns: list[NDArray[Any]] = [slot[name] for name in self.parts.fields]
        outcomes, infos, loose = slot["outcome"], [], []
        for i in range(len(self.envs)):
            self.at = i
            observation, reward, ended, cut, info = play(i)
            if not isinstance(info, dict):
                raise TypeError(f"its info is a {type(info).__name__}, no dict")
            loose.append(self.parts.write(observation, columns, i))
            outcomes[i] = (reward, ended, cut)
            self.observations[i], self.over[i] = observation, bool(ended or cut)
            infos.append(info)
        return None if self.parts.all_fixed and not any(infos) else (infos, loose)

    # --- obeying

    def obey(self, name: str, args: Sequence[Any]) -> bool:
        """Do as a command says, and answer; whether it went well."""
        with self.answers.loan() as slot:
            note = self._done(slot, name, args)
            slot["tag"][...], slot["noted"][...] = self.tag, note is not None
        if note is not None:
            self._put_note(note)
        return not isinstance(note, Failure)

    def _done(self, slot: Any, name: str, args: Sequence[Any]) -> Any:
        """The note of a command."""
        try:
            return getattr(self, name)(slot, *args)
        except Exception as error:
            return self._failure(error)

    def _put_note(self, note: Any) -> None:
        try:
            self.notes.put(note)
        except Exception as error:  # it cannot be pickled; if nobody reads notes any more, this fails, too
            self.notes.put(self._failure(error, f"an answer of the environments from {self.first} on"))

    def _failure(self, error: Exception, what: str = "") -> Failure:
        what = what or f"environment {self.first + self.at}"
        text = f"{what} failed in process {os.getpid()}:\n{''.join(traceback.format_exception(error))}"
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            pickled = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return Failure(text, pickled)


def work(worker: Worker, makers: Sequence[Callable[[], Any]], commands: Receiver[Any]) -> None:
    """A worker's process: obeys commands until they end, or whoever gives them."""
    signal.signal(signal.SIGINT, _not_for_us)  # a program that an environment starts does not inherit it
    signal.siginterrupt(signal.SIGINT, False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with contextlib.suppress(*_GONE), commands, worker.answers, worker.notes, contextlib.ExitStack() as stack:
        commands.get()
        stack.callback(_close, worker.envs)  # also those that were made before one failed
        if worker.obey("make", (makers,)):
            _serve(worker, commands)


def _not_for_us(number: int, frame: Any) -> None:
    """Ctrl-C is for the process to obey that has started this one."""


def _close(envs: Sequence[Any]) -> None:
    with contextlib.ExitStack() as stack:  # one that fails does not keep the others from it
        for env in envs:
            stack.callback(env.close)


def _serve(worker: Worker, commands: Receiver[Any]) -> None:
    lookout, parent = Lookout(commands), os.getppid()
    while True:
        lookout.look()
        try:
            command = commands.get(timeout=_PARENT_SECONDS)
        except queue.Empty:
            if os.getppid() != parent:
                return  # a process that an environment has forked may keep the stream of commands open
            continue
        except UndecodableMessage as error:
            command = ("refuse", (error,))
        lookout.end()
        # the actions of a step come bare, and mostly as an array: that is the cheapest message
        worker.obey(*(command if command.__class__ is tuple else ("step", (command,))))
