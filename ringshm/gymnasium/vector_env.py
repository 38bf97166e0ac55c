"""The vectorised environment."""

from __future__ import annotations

import functools
import multiprocessing
import queue
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError, ResetNeeded
from gymnasium.spaces.utils import is_space_dtype_shape_equiv
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_differing_spaces, batch_space, iterate

from ..arguments import check_timeout, whole_number
from ..environments.crew import Crew, count_of_workers, seeds_of
from ..environments.parts import Parts
from ..errors import check_fails_again
from ..system import monotonic
from .batch import Batch
from .worker import AutoresetWorker

_UNSURE = "what was interrupted"  # is pending where an interrupt has left open who has a command, and who has answered
_BEGINS_ANEW = "an earlier call was interrupted, or could not be sent: `reset` or `async_reset` begins anew"
_QUESTIONS = ("call", "set_attr")  # of the calls, those that step nobody


class RingVectorEnv(VectorEnv[Any, Any, Any]):
    """Steps environments in processes of their own, in place of Gymnasium's `AsyncVectorEnv`.

    Observations of a fixed size travel in slots of shared memory; Text, Sequence, Graph and OneOf spaces, and those of
    the user's own, travel pickled beside them.

    An exception of an environment arrives here, with its traceback as the cause. So does an observation that does not
    fit its space, or an info that cannot be sent. It has failed that call; the environments go on after a `reset`. A
    worker that was killed, or has exited, is told within seconds by the call that needs it, a RuntimeError that says
    how it ended, and by each later one: close the whole, and make another.

    Workers do not hear Ctrl-C, which is for the process that made them. If it ends a call there, go on with `reset`.
    They end with that process, also where nobody has called `close`.

    With `batch_size`, `async_reset`, `recv` and `send` step the environments that are ready first, as EnvPool does;
    `reset` and `step` still take all of them.

    >>> import gymnasium
    >>> envs = RingVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3)
    >>> observations, infos = envs.reset(seed=42)
    >>> observations.shape
    (3, 4)
    >>> observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
    >>> rewards
    array([1., 1., 1.])
    >>> envs.close()

    Args:
        env_fns: make the environments; lambdas may be among them. The first one is also called in this process, for
            its spaces and metadata.
        shared_memory: as `AsyncVectorEnv` has it. Both values mean the same here: what has a fixed size is shared.
        copy: whether `step` and `reset` give arrays of their own; else the same ones each time.
        context: the start method of the workers; None is the default one of multiprocessing.
        daemon: as of `multiprocessing.Process`: a daemon may start no processes by multiprocessing.
        worker: not offered: must be None.
        observation_mode: "same", "different" or a pair of spaces, of all environments and of each, as Gymnasium has it.
        autoreset_mode: what becomes of an environment whose episode is over.
        max_concurrency: how many environments run at once, at most: there are no more workers.
        num_workers: processes that step the environments. By default one for each core, or each environment if these
            are fewer; with `batch_size` one for each environment.
        batch_size: how many environments `recv` gives.

    Raises:
        ValueError, TypeError: if an argument is none that it can be; names it.
        RuntimeError: if spaces of the environments differ that must not; or a worker is lost while it starts, with its
            exit code.
        Whatever an environment raises while it is made, with its traceback as the cause.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], Any]],
        shared_memory: bool = True,
        copy: bool = True,
        context: str | None = None,
        daemon: bool = True,
        worker: None = None,
        observation_mode: Any = "same",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_concurrency: int | None = None,
        *,
        num_workers: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        if worker is not None:
            raise ValueError(
                "`worker` is not offered: a worker of RingVectorEnv steps several environments and writes into slots, "
                "so one made for AsyncVectorEnv cannot take its place: wrap the environments, or use AsyncVectorEnv"
            )
        count = _count_of_workers(env_fns, num_workers, batch_size, max_concurrency)
        self.num_envs, self.copy, self.shared_memory = len(env_fns), copy, shared_memory
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.batch_size = batch_size
        example = env_fns[0]()
        self.metadata = {**example.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode, self.single_action_space = example.render_mode, example.action_space
        self.single_observation_space = example.observation_space
        example.close()
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        if isinstance(observation_mode, tuple) and len(observation_mode) == 2:
            self.observation_space, self.single_observation_space = observation_mode
            if not all(isinstance(space, gymnasium.Space) for space in observation_mode):
                raise TypeError(f"Expected both elements of observation_mode to be Spaces, got {observation_mode}")
        elif observation_mode not in ("same", "different"):
            raise ValueError(
                "Invalid `observation_mode`, expected: 'same' or 'different' or tuple of single and batch observation "
                f"space, actual got {observation_mode}"
            )
        self._parts = Parts(self.single_observation_space)
        self._pending = ""  # what was begun and is not yet ended: "step", "reset", "call", "set_attr", "recv"
        self._cut = False  # whether an interrupt has left open who has stepped
        self._awaited: set[int] = set()  # the workers that have yet to answer
        self._failures: dict[int, Exception] = {}  # of workers
        self._batch = Batch(self._parts, self.num_envs)
        self._results: list[Any] = []
        self._crew = Crew(
            env_fns, count, self._parts, functools.partial(AutoresetWorker, self.autoreset_mode), context, daemon
        )
        try:
            self._check_spaces(observation_mode)
        except BaseException:
            self._crew.end(terminate=True)
            raise

    def _check_spaces(self, mode: Any) -> None:
        observation_spaces, action_spaces = zip(*self._crew.spaces, strict=True)
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

    # --- commands and answers

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError(f"Trying to operate on `{type(self).__name__}`, after a call to `close()`.")

    def _checked_batch_size(self) -> int:
        self._check_open()
        if self.batch_size is None:
            raise ValueError("`async_reset`, `recv` and `send` need `batch_size`: give it where this is made")
        return self.batch_size

    def _check_idle(self, name: str) -> None:
        self._check_open()
        if self._pending == _UNSURE:
            self._crew.settle()
            self._awaited.clear()
            self._failures.clear()
            self._pending = ""
        if self._pending == "recv" and not self._awaited and not self._batch.env_ids:
            self._pending = ""  # all who were sent an action have failed
        if self._pending:
            raise AlreadyPendingCallError(
                f"Calling `{name}` while waiting for a pending call to `{self._pending}` to complete",
                self._pending,
            )

    def _check_whole(self) -> None:
        """Refuse to step on where steps may have been lost."""
        if self._cut:
            raise ResetNeeded(_BEGINS_ANEW)

    def _check_certain(self, name: str) -> None:
        if self._pending == _UNSURE:
            raise NoAsyncCallError(_BEGINS_ANEW, name)

    def _doubt(self, name: str) -> None:
        """Nobody knows who has a command of that call, and who has answered."""
        self._cut = self._cut or name not in _QUESTIONS
        self._pending = _UNSURE

    def _begun(self, name: str) -> None:
        """All have their commands."""
        self._pending = name
        self._cut = self._cut and name in _QUESTIONS

    def _each_action(self, actions: Any, count: int) -> Any:
        """An array, or a list, with an action for each of so many environments."""
        if isinstance(self.action_space, gymnasium.spaces.Dict) and isinstance(actions, (list, tuple)):
            actions = list(actions)
        elif not isinstance(actions, np.ndarray) or not actions.ndim:
            actions = list(iterate(self.action_space, actions))
        if len(actions) != count:
            raise ValueError(f"{len(actions)} actions for {count} environments: give one for each")
        return actions

    def _send(self, name: str, commands: Mapping[int, Any]) -> None:
        """Give workers their commands. If that fails, or Ctrl-C ends it, nobody knows who has one."""
        self._doubt(name)
        try:
            self._send_each(commands)
        except Exception:
            if name == "recv":  # an action that cannot be pickled: only those before it are at work
                self._begun(name)
            raise
        self._begun(name)

    def _send_each(self, commands: Mapping[int, Any]) -> None:
        for k, command in commands.items():
            self._crew.send(k, command)
            self._awaited.add(k)

    def _finish(self, name: str, timeout: float | None, hear: Callable[[int, Any], None]) -> None:
        """Take the answers of all workers; then raise what the first of those that have failed says."""
        self._check_open()
        self._check_certain(name)
        if self._pending != name:
            raise NoAsyncCallError(f"Calling `{name}_wait` without any prior call to `{name}_async`.", name)
        deadline = None if timeout is None else monotonic() + check_timeout(timeout)
        while self._awaited:
            self._hear(None if deadline is None else max(0.0, deadline - monotonic()), timeout, hear)
        self._pending = ""
        if self._failures:
            failures, self._failures = self._failures, {}
            raise failures[min(failures)]

    def _hear(self, left: float | None, timeout: float | None, hear: Callable[[int, Any], None]) -> None:
        """Take an answer; `hear` is given the worker and the note."""
        try:
            self._hear_note(*self._crew.take(self._awaited, left, self._place), hear)
        except queue.Empty:
            call = "recv" if self._pending == "recv" else f"{self._pending}_wait"
            raise multiprocessing.TimeoutError(
                f"The call to `{call}` has timed out after {timeout} second(s): it may be made again."
            ) from None
        except BaseException:
            self._doubt(self._pending)
            raise

    def _hear_note(self, k: int, note: Any, hear: Callable[[int, Any], None]) -> None:
        if isinstance(note, Exception):
            self._failures[k] = note
            return
        try:
            hear(k, note)
        except Exception as error:
            check_fails_again(functools.partial(hear, k, note), error)
            # an info that cannot be put together with others: one that holds itself, say
            failure = RuntimeError(f"infos of {self._crew.links[k]} cannot be put together: {error!r:.200}")
            failure.__cause__ = error
            self._failures[k] = failure

    def _rows(self, k: int) -> slice:
        """Where the batch has what a worker tells."""
        if self._pending != "recv":
            return self._crew.links[k].envs
        row = len(self._batch.env_ids)
        return slice(row, row + 1)

    def _place(self, k: int, answer: Mapping[str, Any]) -> None:
        if self._pending not in ("call", "set_attr"):
            self._batch.place(self._rows(k), answer)

    def _hear_step(self, k: int, note: Any) -> None:
        if note is not None:
            self._batch.note(self._rows(k), note)

    def _new_batch(self, n: int) -> Batch:
        again = not self.copy and len(self._batch.outcomes) == n
        return Batch(self._parts, n, self._batch.columns if again else None)

    # --- all environments together

    def step_async(self, actions: Any) -> None:
        """Begin a step of all environments.

        Args:
            actions: a batch of `action_space`, or a sequence of an action for each environment.

        Raises:
            ResetNeeded: if an earlier call was interrupted amid steps.
        """
        self._check_open()
        self._check_whole()
        self._check_idle("step_async")
        actions = self._each_action(actions, self.num_envs)
        self._batch = self._new_batch(self.num_envs)
        self._send("step", {k: actions[link.envs] for k, link in enumerate(self._crew.links)})

    def step_wait(self, timeout: float | None = None) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """End it.

        Args:
            timeout: in seconds, for all; None waits as long as the workers live.

        Returns:
            Observations, rewards, terminations, truncations, infos.

        Raises:
            TimeoutError: of multiprocessing, if time is up; the call may be made again.
            RuntimeError: if a worker is lost.
            Whatever an environment has raised.
        """
        self._finish("step", timeout, self._hear_step)
        return self._batch.step()

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments: `step_async` and `step_wait`."""
        self.step_async(actions)
        return self.step_wait()

    def reset_async(self, seed: Any = None, options: dict[str, Any] | None = None) -> None:
        """Begin a reset of all environments, or of those that `options["reset_mask"]` names.

        After `send`, and after an interrupt, this waits until the environments have ended their steps.

        Args:
            seed: `seed`, `seed` + 1, ... for the environments if it is an int; or a list, with an int or None for each.
            options: what the environments are given, without the mask.
        """
        seeds, options, mask = self._reset_arguments(seed, options)
        if self._pending == "recv":  # all begin anew, whatever was sent
            self._doubt(self._pending)
        self._check_idle("reset_async")
        self._batch = self._new_batch(self.num_envs)
        self._send(
            "reset",
            {k: ("reset", (seeds[at], options, mask[at])) for k, (*_, at) in enumerate(self._crew.links)},
        )

    def _reset_arguments(self, seed: Any, options: dict[str, Any] | None) -> tuple[list[Any], Any, list[bool]]:
        """A seed for each environment, the options without the mask, and the mask."""
        seeds = seeds_of(seed, self.num_envs)
        options = None if options is None else dict(options)
        mask = None if options is None else options.pop("reset_mask", None)
        if mask is None:
            return seeds, options, [True] * self.num_envs
        must = "`options['reset_mask']` must"
        if not isinstance(mask, np.ndarray):
            raise TypeError(f"{must} be a numpy array, got {type(mask)}")
        if mask.shape != (self.num_envs,):
            raise ValueError(f"{must} have shape `({self.num_envs},)`, got {mask.shape}")
        if mask.dtype != np.bool_:
            raise TypeError(f"{must} have `dtype=np.bool_`, got {mask.dtype}")
        if not mask.any():
            raise ValueError(f"{must} contain a boolean array with at least one True value, got reset_mask={mask}")
        return seeds, options, mask.tolist()

    def reset_wait(self, timeout: float | None = None) -> tuple[Any, dict[str, Any]]:
        """End it: observations and infos. Args and Raises as `step_wait`."""
        self._finish("reset", timeout, self._hear_step)
        return self._batch.observations(), self._batch.infos

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset all environments, or some: `reset_async` and `reset_wait`."""
        self.reset_async(seed=seed, options=options)
        return self.reset_wait()

    # --- those that are ready first

    def async_reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> None:
        """Begin a reset of the environments, which `recv` tells of. Args as `reset_async`: those alone are reset that
        a mask names.

        Raises:
            AlreadyPendingCallError: if one of them was sent an action, and `recv` has not told of it.
        """
        seeds, options, mask = self._reset_arguments(seed, options)
        env_ids = [i for i, named in enumerate(mask) if named]
        self._send_some("async_reset", env_ids, [("reset", ([seeds[i]], options, [True])) for i in env_ids])

    def send(self, actions: Any, env_ids: Any) -> None:
        """Begin a step of some environments, which `recv` tells of.

        Args:
            actions: a batch of as many as there are numbers; or a sequence of them.
            env_ids: the numbers of the environments, as `infos["env_id"]` has them.

        Raises:
            AlreadyPendingCallError: if one of them was sent an action before, and `recv` has not told of it.
            ResetNeeded: if an earlier call was interrupted amid steps.
            TypeError: if `env_ids` are no ints, or the actions cannot be told apart.
            ValueError: if there is no such environment, or there are not as many actions.
        """
        self._checked_batch_size()
        self._check_whole()
        numbers = np.asarray(env_ids)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise TypeError(f"env_ids={env_ids!r:.100} must be a list or an array of ints, as infos['env_id'] is")
        actions = self._each_action(actions, len(numbers))
        self._send_some("send", numbers.tolist(), [actions[row : row + 1] for row in range(len(numbers))])

    def _send_some(self, name: str, env_ids: list[int], commands: Sequence[Any]) -> None:
        size = self._checked_batch_size()
        if self._pending != "recv":
            self._check_idle(name)
        if not all(0 <= i < self.num_envs for i in env_ids) or len(set(env_ids)) < len(env_ids):
            raise ValueError(f"env_ids={env_ids} must be different numbers from 0 to {self.num_envs - 1}")
        untold = self._awaited.union(self._batch.env_ids if self._pending else ())
        if busy := untold.intersection(env_ids):
            raise AlreadyPendingCallError(
                f"environments {sorted(busy)} are not ready: `recv` tells when they are", "recv"
            )
        if not self._pending:
            self._batch = self._new_batch(size)
        self._send("recv", dict(zip(env_ids, commands, strict=True)))

    def recv(self, timeout: float | None = None) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Wait for the first `batch_size` environments that are ready.

        If an environment has failed, that is raised, and the next call tells of those that are ready: the failed one
        is not waited for, and may be reset. So is one whose info has a key "env_id" of its own: rename that by a
        wrapper. If time is up, none is lost: the call may be made again.

        Args:
            timeout: in seconds; None waits as long as their workers live.

        Returns:
            Observations, rewards, terminations, truncations, infos, of `batch_size` environments; `infos["env_id"]` has
            their numbers. Those that were reset have reward 0.

        Raises:
            NoAsyncCallError: if so few environments were sent an action, or reset, that it would wait for ever; or an
                earlier call was interrupted.
            TimeoutError: of multiprocessing, if time is up.
            RuntimeError: if a worker is lost.
            Whatever an environment has raised.
        """
        size = self._checked_batch_size()
        self._check_certain("recv")
        deadline = None if timeout is None else monotonic() + check_timeout(timeout)
        while self._pending != "recv" or len(self._batch.env_ids) < size:
            if self._pending != "recv" or len(self._batch.env_ids) + len(self._awaited) < size:
                raise NoAsyncCallError(
                    f"Calling `recv` for {size} environments while {len(self._awaited)} are at work: call "
                    "`async_reset` or `send` first",
                    "recv",
                )
            self._hear(None if deadline is None else max(0.0, deadline - monotonic()), timeout, self._hear_some)
            if self._failures:
                raise self._failures.popitem()[1]
        batch = self._batch
        batch.infos["env_id"] = np.array(batch.env_ids)
        if self._awaited:
            self._batch = self._new_batch(size)
        else:
            self._pending = ""
        return batch.step()

    def _hear_some(self, k: int, note: Any) -> None:
        if note is not None and "env_id" in note[0][0]:
            raise ValueError("the info has a key 'env_id', where recv gives the numbers: rename it by a wrapper")
        self._hear_step(k, note)
        self._batch.env_ids.append(k)

    # --- methods and attributes

    def call_async(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        """Begin a call of a method of each environment.

        Args:
            name: of the method, or of an attribute.
            *args, **kwargs: what it is given.
        """
        self._check_idle("call_async")
        if name in ("reset", "step", "close"):
            raise ValueError(f"Trying to call function `{name}` with `call`, use `{name}` directly instead.")
        self._results = [None] * self.num_envs
        self._send("call", dict.fromkeys(range(len(self._crew.links)), ("call", (name, args, kwargs))))

    def call_wait(self, timeout: float | None = None) -> tuple[Any, ...]:
        """End it: what each has returned. Args and Raises as `step_wait`."""
        self._finish("call", timeout, self._hear_results)
        return tuple(self._results)

    def _hear_results(self, k: int, note: Any) -> None:
        self._results[self._crew.links[k].envs] = note

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What a method of each environment returns, or what an attribute is: `call_async` and `call_wait`."""
        self.call_async(name, *args, **kwargs)
        return self.call_wait()

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of each environment."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of each environment.

        Args:
            name: of the attribute.
            values: a list or tuple, with a value for each environment; or the one value.
        """
        self._check_idle("set_attr")
        values = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(f"{len(values)} values for {self.num_envs} environments: give one, or one for each")
        self._send("set_attr", {k: ("set", (name, values[link.envs])) for k, link in enumerate(self._crew.links)})
        self._finish("set_attr", None, lambda k, note: None)

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

    # --- the end

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """End the workers, each when it has ended its step and closed its environments: what `close` does.

        Args:
            timeout: kill those that have not ended after so many seconds; None waits as long as they take.
            terminate: kill all at once.
        """
        if self._pending not in ("", "recv", _UNSURE):
            gymnasium.logger.warn(f"Calling `close` while waiting for a pending call to `{self._pending}` to complete.")
        self._crew.end(timeout, terminate)

    def __del__(self) -> None:
        """Nothing is left to do: the workers end with the `Crew`."""


def _count_of_workers(
    env_fns: Sequence[Callable[[], Any]], num_workers: int | None, batch_size: int | None, most: int | None
) -> int:
    """How many workers there are, if the arguments are sound."""
    if most is not None and (not isinstance(most, (int, np.integer)) or most < 1):
        raise ValueError(f"`max_concurrency` must be a positive integer or None, got {most!r}")
    count, num_envs = count_of_workers(env_fns, num_workers), len(env_fns)
    if batch_size is None:
        return count if most is None else min(count, int(most))
    whole_number(batch_size, "batch_size", num_envs, ", the number of env_fns")
    if num_workers not in (None, num_envs) or (most is not None and most < num_envs):
        raise ValueError(
            f"batch_size={batch_size} takes a worker for each of the {num_envs} environments: give neither num_workers "
            "nor max_concurrency"
        )
    return num_envs
