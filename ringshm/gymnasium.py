"""For Gymnasium: a vectorised environment whose workers write observations straight into loaned slots.

    envs = RingVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(8)])

stands where `AsyncVectorEnv` stood: the same methods, and the trajectories that it and `SyncVectorEnv` give for the
same seeds. A worker's process steps several environments, one after the other, and tells of all of them in one message:
with a worker for each core nobody waits for a core, and a step costs two messages for each worker, not two for each
environment. Where a step takes but some microseconds, as CartPole's, fewer workers are faster: on two cores, one.

A worker has three channels: its commands, pickled; the steps, typed (`step_spec`); and its notes, pickled, for what a
step has only now and then: infos, results of calls, errors. Importing this module imports Gymnasium, which
`import ringshm` does not.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.spaces.utils import is_space_dtype_shape_equiv
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_differing_spaces, batch_space, create_empty_array, iterate

from .channel.channel import Channel
from .errors import BrokenChannel, ChannelClosed, ChannelNotFound, EndOfChannel

__all__ = ["RingVectorEnv"]

Path = tuple[Any, ...]  # the keys and indices that lead to an array of an observation
SILENT, NOTED, FAILED = range(3)  # the kind of a step: all is said; infos are in the notes; an error is in the notes
OUTCOME = np.dtype([("reward", np.float64), ("terminated", np.bool_), ("truncated", np.bool_)])  # beside observations
LOOK_SECONDS = 0.001  # whoever has waited for less the last time looks for so long before going to sleep


def leaves(space: spaces.Space[Any], path: Path = ()) -> Iterator[tuple[Path, spaces.Space[Any]]]:
    """The arrays of which an observation consists."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts: Any = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, part in parts:
            yield from leaves(part, (*path, key))
    elif isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)):
        yield path, space
    else:
        raise ValueError(f"observations of {space} have no fixed size, so no slot can hold them: use SyncVectorEnv")


def leaf(observation: Any, path: Path) -> Any:
    """The array to which a path leads."""
    for key in path:
        observation = observation[key]
    return observation


def step_spec(space: spaces.Space[Any], count: int) -> dict[str, Any]:
    """What a worker tells of a step of its environments: the spec of its messages."""
    observations = {f"obs{k}": (part.dtype, (count, *(part.shape or ()))) for k, (_, part) in enumerate(leaves(space))}
    return {**observations, "outcome": (OUTCOME, count), "kind": np.uint8}


class Inbox:
    """Receives from a channel, and looks for a message first if one came soon the last time: to go to sleep and to be
    woken takes longer than many a step does; but who looks for long takes the core from those who step.
    """

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.waited = 0.0  # seconds, the last time

    def get(self, timeout: float | None = None, out: Any = None) -> Any:
        """As the channel's."""
        began = time.monotonic()
        if self.waited < LOOK_SECONDS:
            while self.channel.empty() and time.monotonic() < began + LOOK_SECONDS:
                os.sched_yield()  # whoever is to send it may be on this core
        message = self.channel.get(timeout=timeout, out=out)
        self.waited = time.monotonic() - began
        return message


# --- The workers' processes ----------------------------------------------------------------------------------


class Worker:
    """Steps some of the environments, from number `first` on."""

    def __init__(self, first: int, autoreset: AutoresetMode, paths: list[Path], steps: Any, notes: Any) -> None:
        self.first, self.autoreset, self.paths, self.steps, self.notes = first, autoreset, paths, steps, notes
        self.envs: list[Any] = []
        self.observations: list[Any] = []
        self.over: list[bool] = []
        self.at = 0  # the environment that is at work: to be named if it fails

    def make(self, makers: Sequence[Any]) -> None:
        """Make the environments, and tell their spaces."""
        for self.at, maker in enumerate(makers):
            self.envs.append(maker())
        self.observations, self.over = [None] * len(makers), [False] * len(makers)
        self.notes.put([(env.observation_space, env.action_space) for env in self.envs])

    def told(self, play: Callable[[int], tuple[Any, Any, bool, bool, dict[str, Any]]]) -> None:
        """Let each environment play, and write into a slot what comes of it; if one fails, nothing is sent."""
        with self.steps.loan() as slot:
            observations = [(slot[f"obs{k}"], path) for k, path in enumerate(self.paths)]
            outcomes = slot["outcome"]
            infos = []
            for i in range(len(self.envs)):
                self.at = i
                self.observations[i], reward, ended, cut, info = play(i)
                outcomes[i], self.over[i] = (reward, ended, cut), ended or cut
                infos.append(info)
                for array, path in observations:
                    array[i] = leaf(self.observations[i], path)
            slot["kind"][...] = NOTED if any(infos) else SILENT
        if any(infos):
            self.notes.put(infos)

    def step(self, actions: Sequence[Any]) -> None:
        """Step all of them, or reset those whose time it is."""

        def play(i: int) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
            env = self.envs[i]
            if self.over[i] and self.autoreset is AutoresetMode.NEXT_STEP:
                observation, info = env.reset()
                return observation, 0.0, False, False, info
            if self.over[i] and self.autoreset is AutoresetMode.DISABLED:
                raise AssertionError(
                    "its episode is over: call reset(options={'reset_mask': ...}) before the next step"
                )
            observation, reward, ended, cut, info = env.step(actions[i])
            if (ended or cut) and self.autoreset is AutoresetMode.SAME_STEP:
                final = {"final_obs": observation, "final_info": info}
                observation, info = env.reset()
                info = {**final, **info}
            return observation, reward, ended, cut, info

        self.told(play)
        if self.autoreset is AutoresetMode.SAME_STEP:
            self.over = [False] * len(self.envs)

    def reset(self, seeds: Sequence[Any], options: Any, mask: Sequence[bool]) -> None:
        """Reset those that the mask names; of the others tell the observation again."""

        def play(i: int) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
            if not mask[i]:
                return self.observations[i], 0.0, self.over[i], False, {}
            observation, info = self.envs[i].reset(seed=seeds[i], options=options)
            return observation, 0.0, False, False, info

        self.told(play)

    def call(self, name: str, args: Any, kwargs: Any) -> None:
        """Tell what a method, or an attribute, of each is."""
        results = []
        for i, env in enumerate(self.envs):
            self.at = i
            value = env.get_wrapper_attr(name)
            results.append(value(*args, **kwargs) if callable(value) else value)
        self.notes.put(results)

    def set(self, name: str, values: Sequence[Any]) -> None:
        """Set an attribute of each."""
        for i, env in enumerate(self.envs):
            self.at = i
            env.set_wrapper_attr(name, values[i])
        self.notes.put([])

    def fail(self, error: Exception, stepped: bool) -> None:
        """Tell the error, which is the last that this worker does."""
        text = f"environment {self.first + self.at} failed in process {os.getpid()}:\n{traceback.format_exc()}"
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        if stepped:
            with self.steps.loan() as slot:
                slot["kind"][...] = FAILED
        self.notes.put((error, text))


def work(worker: Worker, makers: Sequence[Any], commands: Any) -> None:
    """A worker's process: does what it is told until its commands end, or whoever gives them."""
    gone = (EndOfChannel, BrokenChannel, ChannelClosed, ChannelNotFound)
    name = ""
    with contextlib.suppress(*gone), commands, worker.steps, worker.notes, contextlib.ExitStack() as stack:
        try:
            commands.get()
            worker.make(makers)
            for env in worker.envs:
                stack.callback(env.close)
            inbox = Inbox(commands)
            while True:
                command = inbox.get()
                # the actions of a step come bare, and mostly as an array: that is the cheapest message
                name, args = command if command.__class__ is tuple else ("step", (command,))
                getattr(worker, name)(*args)
        except gone:
            raise
        except Exception as error:
            worker.fail(error, name in ("step", "reset"))
            sys.exit(1)


# --- The user's process --------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended; processes that are started in it never hear one."""
    resource_tracker.ensure_running()  # else the first start does that, and ends this early
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Link(NamedTuple):
    """A worker, as the user's process sees it."""

    process: BaseProcess
    commands: Channel
    steps: Inbox
    notes: Inbox
    envs: slice  # the environments that it steps


class RingVectorEnv(VectorEnv[Any, Any, Any]):
    """Steps environments in processes of their own: see this file's beginning, and Gymnasium's `AsyncVectorEnv`.

    An exception of an environment arrives here, with its traceback as the cause; its worker has ended then, and so has
    one that was killed: every later call that needs it raises RuntimeError. Close the whole, and make another.

    Args:
        env_fns: make the environments; lambdas may be among them.
        num_workers: processes that step them; by default one for each core, or each environment if these are fewer.
        copy: whether `step` and `reset` give arrays of their own; else the same ones each time.
        context: the start method of the workers.
        observation_mode: "same", "different" or a pair of spaces, as Gymnasium has it.
        autoreset_mode: what becomes of an environment whose episode is over.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], Any]],
        num_workers: int | None = None,
        copy: bool = True,
        context: str | None = None,
        observation_mode: Any = "same",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> None:
        self.num_envs, cores = len(env_fns), len(os.sched_getaffinity(0))
        count = min(cores, self.num_envs) if num_workers is None else num_workers
        if not 1 <= count <= self.num_envs:
            raise ValueError(f"num_workers={num_workers} must be 1 to {self.num_envs}, which is the number of env_fns")
        self.copy, self.pending = copy, ""  # what was begun and is not yet ended: "step", "reset", "call"
        self.links: list[Link] = []
        self.awaited: list[Link] = []  # that have yet to answer
        self.results: list[Any] = []
        self.failures: list[Exception] = []
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        example = env_fns[0]()
        self.metadata = {**example.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode, self.single_action_space = example.render_mode, example.action_space
        self.single_observation_space = example.observation_space
        example.close()
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        if isinstance(observation_mode, tuple):
            self.observation_space, self.single_observation_space = observation_mode
        elif observation_mode not in ("same", "different"):
            raise ValueError(
                "Invalid `observation_mode`, expected: 'same' or 'different' or tuple of single and batch observation "
                f"space, actual got {observation_mode}"
            )
        self.paths = [path for path, _ in leaves(self.single_observation_space)]
        self.new_observations = functools.partial(
            create_empty_array, self.single_observation_space, self.num_envs, fn=np.empty
        )
        self.observations = self.new_observations()
        try:
            self._start(env_fns, count, multiprocessing.get_context(context))
            self.pending, self.awaited = "call", list(self.links)  # they begin with their spaces
            self._check_spaces(observation_mode, self.call_wait())
        except BaseException:
            self.close(terminate=True)
            raise

    def _start(self, env_fns: Sequence[Callable[[], Any]], count: int, context: Any) -> None:
        for k in range(count):
            envs = slice(k * self.num_envs // count, (k + 1) * self.num_envs // count)
            makers = [CloudpickleWrapper(make) for make in env_fns[envs]]
            with contextlib.ExitStack() as channels:
                commands = channels.enter_context(Channel(2, "16KiB"))
                commands.put(None)  # the worker's stream of commands has begun: so it ends, should this process die
                spec = step_spec(self.single_observation_space, len(makers))
                steps = channels.enter_context(Channel(1, spec=spec))
                notes = channels.enter_context(Channel(2, "64KiB"))
                worker = Worker(envs.start, self.autoreset_mode, self.paths, steps.sender(), notes.sender())
                process = context.Process(target=work, args=(worker, makers, commands.receiver()), daemon=True)
                with interrupts_held():
                    process.start()
                channels.pop_all()
            self.links.append(Link(process, commands, Inbox(steps), Inbox(notes), envs))

    def _check_spaces(self, mode: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
        observation_spaces, action_spaces = zip(*pairs, strict=True)
        single = self.single_observation_space
        if mode == "same":
            self.observation_space = batch_space(single, self.num_envs)
            if any(space != single for space in observation_spaces):
                raise RuntimeError(
                    "the sub-environments observation spaces are not equivalent. If this is intentional, use "
                    "`observation_mode='different'` instead."
                )
        elif not all(is_space_dtype_shape_equiv(space, single) for space in observation_spaces):
            raise RuntimeError("the sub-environments observation spaces do not share a common shape and dtype")
        elif mode == "different":
            self.observation_space = batch_differing_spaces(list(observation_spaces))
        if any(space != self.single_action_space for space in action_spaces):
            raise RuntimeError(f"the sub-environments action spaces are not all {self.single_action_space}")

    # --- commands

    def _send(self, name: str, commands: Sequence[Any]) -> None:
        """Give each worker its command."""
        if self.closed:
            raise ClosedEnvironmentError(f"Trying to operate on `{type(self).__name__}`, after a call to `close()`.")
        if self.pending:
            raise AlreadyPendingCallError(
                f"Calling `{name}_async` while waiting for a pending call to `{self.pending}` to complete", self.pending
            )
        for link, command in zip(self.links, commands, strict=True):
            with contextlib.suppress(BrokenChannel):  # it has gone: so its answer will tell
                link.commands.put(command)
        self.pending, self.awaited = name, list(self.links)

    def _finish(self, name: str, timeout: float | None, take: Callable[[Link, float | None], None]) -> None:
        """Take the answers of all workers; then raise, if one has failed."""
        if self.closed:
            raise ClosedEnvironmentError(f"Trying to operate on `{type(self).__name__}`, after a call to `close()`.")
        if self.pending != name:
            raise NoAsyncCallError(f"Calling `{name}_wait` without any prior call to `{name}_async`.", name)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self.awaited:
            try:
                take(self.awaited[0], None if timeout is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise multiprocessing.TimeoutError(
                    f"The call to `{name}_wait` has timed out after {timeout} second(s): it may be made again."
                ) from None
            except EndOfChannel:
                self.failures.append(self._lost(self.awaited[0]))
            self.awaited.pop(0)
        self.pending = ""
        if self.failures:
            failures, self.failures = self.failures, []
            raise failures[0]

    def _lost(self, link: Link) -> RuntimeError:
        """Why a worker does not answer."""
        link.process.join(5)
        code = link.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return RuntimeError(
            f"process {link.process.pid}, which stepped environments {link.envs.start} to {link.envs.stop - 1}, {how}: "
            "close this vector environment and make another"
        )

    def _note(self, link: Link, timeout: float | None = None) -> list[Any]:
        """What else a worker has to say, for each of its environments."""
        note = link.notes.get(timeout)
        if isinstance(note, tuple):
            error, text = note
            error.__cause__ = RuntimeError(text)
            self.failures.append(error)
            return []
        return list(note)

    # --- what Gymnasium asks for

    def _begin(self, name: str, commands: Sequence[Any]) -> None:
        self._send(name, commands)
        if self.copy:
            self.observations = self.new_observations()
        self.arrays = [(f"obs{k}", leaf(self.observations, path)) for k, path in enumerate(self.paths)]
        self.arrays.append(("outcome", np.empty(self.num_envs, OUTCOME)))
        self.infos: dict[str, Any] = {}

    def _take_step(self, link: Link, timeout: float | None) -> None:
        """Copy what a worker tells of a step to its place in the batch."""
        step = link.steps.get(timeout, out={name: array[link.envs] for name, array in self.arrays})
        if step["kind"] != SILENT:
            for i, info in enumerate(self._note(link), link.envs.start):
                self.infos = self._add_info(self.infos, info, i)

    def step_async(self, actions: Any) -> None:
        """Begin a step of all environments."""
        if not isinstance(actions, np.ndarray):
            actions = list(iterate(self.action_space, actions))
        if len(actions) != self.num_envs:
            raise ValueError(f"{len(actions)} actions for {self.num_envs} environments: give one for each")
        self._begin("step", [actions[link.envs] for link in self.links])

    def step_wait(self, timeout: float | None = None) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """End it: observations, rewards, terminations, truncations, infos."""
        self._finish("step", timeout, self._take_step)
        outcomes = self.arrays[-1][1]
        return (self.observations, *(outcomes[name].copy() for name in OUTCOME.names or ()), self.infos)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments."""
        self.step_async(actions)
        return self.step_wait()

    def reset_async(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> None:
        """Begin a reset of all environments, or of those that `options["reset_mask"]` names."""
        seeds = [None] * self.num_envs if seed is None else seed
        if isinstance(seed, int):
            seeds = [seed + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: give one for each")
        options = None if options is None else dict(options)
        mask = None if options is None else options.pop("reset_mask", None)
        if mask is not None:
            must = "`options['reset_mask']` must"
            if not isinstance(mask, np.ndarray):
                raise TypeError(f"{must} be a numpy array, got {type(mask)}")
            if mask.shape != (self.num_envs,):
                raise ValueError(f"{must} have shape `({self.num_envs},)`, got {mask.shape}")
            if mask.dtype != np.bool_:
                raise TypeError(f"{must} have `dtype=np.bool_`, got {mask.dtype}")
            if not mask.any():
                raise ValueError(f"{must} contain a boolean array with at least one True value, got reset_mask={mask}")
        named = [True] * self.num_envs if mask is None else mask.tolist()
        self._begin("reset", [("reset", (seeds[link.envs], options, named[link.envs])) for link in self.links])

    def reset_wait(self, timeout: float | None = None) -> tuple[Any, dict[str, Any]]:
        """End it: observations and infos."""
        self._finish("reset", timeout, self._take_step)
        return self.observations, self.infos

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset all environments; with seeds `seed`, `seed` + 1, ..., if it is an int, or those of a list."""
        self.reset_async(seed=seed, options=options)
        return self.reset_wait()

    def call_async(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Begin a call of a method of each environment."""
        self._send("call", [("call", (name, args, kwargs))] * len(self.links))
        self.results = []

    def call_wait(self, timeout: float | None = None) -> tuple[Any, ...]:
        """End it: what each has returned."""
        self._finish("call", timeout, self._take_results)
        return tuple(self.results)

    def _take_results(self, link: Link, timeout: float | None) -> None:
        self.results += self._note(link, timeout)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What a method of each environment returns, or what an attribute is."""
        self.call_async(name, *args, **kwargs)
        return self.call_wait()

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of each environment."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of each environment: to its own of a list or tuple, or to the one value."""
        values = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(f"{len(values)} values for {self.num_envs} environments: give one, or one for each")
        self._send("set_attr", [("set", (name, values[link.envs])) for link in self.links])
        self.results = []
        self._finish("set_attr", None, self._take_results)

    def render(self) -> tuple[Any, ...] | None:
        """What each environment renders."""
        return self.call("render")

    @property  # type: ignore[misc]
    def np_random(self) -> Any:
        """The random number generator of each environment: a copy."""
        return self.get_attr("np_random")

    @property
    def np_random_seed(self) -> Any:
        """The seed of each."""
        return self.get_attr("np_random_seed")

    def close_extras(self, terminate: bool = False) -> None:
        """End the workers; or kill them at once, as those are that do not end."""
        if self.pending:
            gymnasium.logger.warn(f"Calling `close` while waiting for a pending call to `{self.pending}` to complete.")
        for link in self.links:
            link.commands.shutdown(immediate=True)
            if terminate:
                link.process.kill()
        for link in self.links:
            # what it still has to say, nobody reads: it must not wait for that
            for channel in (link.steps.channel, link.notes.channel, link.commands):
                channel.close()
        with interrupts_held():
            for link in self.links:
                link.process.join(30)
                link.process.kill()
                link.process.join()

    def __del__(self) -> None:
        if not self.closed and hasattr(self, "links"):
            self.close(terminate=True)
