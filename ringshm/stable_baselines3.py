"""For Stable-Baselines3: a vectorised environment whose workers write observations straight into slots.

    envs = RingVecEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(8)])
    envs = make_vec_env("CartPole-v1", 8, vec_env_cls=RingVecEnv)

stands where `SubprocVecEnv` stood: the same methods, and the observations, rewards and infos that `DummyVecEnv` gives
for the same seeds. A worker's process steps several environments, one after the other, and tells of all of them in one
message; it imports neither Stable-Baselines3 nor PyTorch unless the environments do.

Importing this module imports both, which `import ringshm` does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import missing

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise missing("ringshm.stable_baselines3", "Stable-Baselines3", "sb3", error) from error
from gymnasium.error import ClosedEnvironmentError

from .environments.crew import Crew, count_of_workers, seeds_of
from .environments.parts import Parts
from .environments.rows import Rows
from .environments.vec_env import VecEnvWorker, attribute_of, call_method, has_attribute, is_wrapped, patched

__all__ = ["RingVecEnv"]


class RingVecEnv(VecEnv):
    """Steps environments in processes of their own, in place of `SubprocVecEnv`.

    An exception of an environment arrives here, with its traceback as the cause. So does an observation that does not
    fit its space, or an info that cannot be sent. It has failed that call; the environments go on after a `reset`. A
    worker that was killed, or has exited, is told within seconds by the call that needs it, a RuntimeError that says
    how it ended, and by each later one: close the whole, and make another.

    Workers do not hear Ctrl-C, which is for the process that made them. They end with it, also where nobody has called
    `close`. After a Ctrl-C amid a step `reset` begins anew, and so does an algorithm's next `learn`.

    >>> import gymnasium
    >>> envs = RingVecEnv([lambda: gymnasium.make("CartPole-v1")] * 3, start_method="fork")
    >>> envs.seed(42)
    [42, 43, 44]
    >>> envs.reset().shape
    (3, 4)
    >>> observations, rewards, dones, infos = envs.step([0, 1, 0])
    >>> rewards
    array([1., 1., 1.], dtype=float32)
    >>> envs.close()

    Args:
        env_fns: make the environments; lambdas may be among them. The first one is also called in this process, for
            the space of observations.
        start_method: of the workers; None is "forkserver", as of `SubprocVecEnv`: the program's main module needs its
            `if __name__ == "__main__":`.
        num_workers: processes that step the environments. By default one for each core, or each environment if these
            are fewer. Where a step takes but some microseconds, as CartPole's, one is fastest.

    Raises:
        ValueError, TypeError: if an argument is none that it can be; ValueError also if several of `env_fns` return the
            same environment.
        RuntimeError: if a worker is lost while it starts, with its exit code.
        Whatever an environment raises while it is made, with its traceback as the cause.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], Any]],
        start_method: str | None = None,
        *,
        num_workers: int | None = None,
    ) -> None:
        count, n = count_of_workers(env_fns, num_workers), len(env_fns)
        example = patched(env_fns[0]())
        self._parts = Parts(example.observation_space)
        example.close()
        self.closed = False
        self.waiting = False  # whether a step was begun, and is not yet ended
        self._torn = False  # whether an interrupt has left open what the workers were told, and what they have told
        self._cut = False  # whether it was amid the step that is pending
        self._awaited: set[int] = set()  # the workers that have yet to answer
        self._failures: list[Exception] = []  # of the step
        self._rows, self._infos = Rows(self._parts, n), [dict[str, Any]() for _ in range(n)]
        self._crew = Crew(env_fns, count, self._parts, VecEnvWorker, start_method or "forkserver", daemon=True)
        try:
            super().__init__(n, *self._crew.spaces[0])
        except BaseException:
            self._crew.end(terminate=True)
            raise

    # --- commands and answers

    def _settle(self) -> None:
        """Have the workers idle. The answers to a step that is pending are kept."""
        if self.closed:
            raise ClosedEnvironmentError("this RingVecEnv is closed: make another")
        if self._torn:
            self._crew.settle()
            self._awaited.clear()
            self._cut = self.waiting
            self._torn = False
        if self.waiting and not self._cut:
            self._failures += self._take(self._place, self._hear_step)

    def _send(self, commands: Mapping[int, Any]) -> None:
        """Give workers their commands."""
        self._torn = True  # until all have answered, or at least have their commands
        for k, command in commands.items():
            self._crew.send(k, command)
            self._awaited.add(k)

    def _take(self, place: Callable[[int, Any], Any], hear: Callable[[int, Any], Any]) -> list[Exception]:
        """Take all answers that are awaited; return the failures among them."""
        self._torn = True
        failures = []
        while self._awaited:
            k, note = self._crew.take(self._awaited, None, place)
            if isinstance(note, Exception):
                failures.append(note)
            elif note is not None:
                hear(k, note)
        self._torn = False
        return failures

    def _place(self, k: int, answer: Mapping[str, Any]) -> None:
        self._rows.place(self._crew.links[k].envs, answer)

    def _hear_step(self, k: int, note: Any) -> None:
        envs = self._crew.links[k].envs
        self._infos[envs], self._rows.loose[envs], reset_infos = note
        for i, info in reset_infos.items():
            self.reset_infos[envs.start + i] = info

    def _hear_reset(self, k: int, note: Any) -> None:
        envs = self._crew.links[k].envs
        self.reset_infos[envs], self._rows.loose[envs] = note

    # --- steps

    def step_async(self, actions: Any) -> None:
        """Begin a step of all environments.

        Args:
            actions: one for each environment: an array, or a sequence of them.

        Raises:
            RuntimeError: if a step is pending.
            ValueError: if there are not as many actions as environments.
        """
        if self.waiting:
            raise RuntimeError("a step is pending, or was interrupted: call step_wait, or reset, before the next one")
        self._settle()
        if not isinstance(actions, np.ndarray):
            actions = list(actions)
        if len(actions) != self.num_envs:
            raise ValueError(f"{len(actions)} actions for {self.num_envs} environments: give one for each")
        self._rows, self._infos = Rows(self._parts, self.num_envs), [{} for _ in range(self.num_envs)]
        self._torn = self.waiting = True  # in this order
        self._send({k: actions[link.envs] for k, link in enumerate(self._crew.links)})
        self._torn = False

    def step_wait(self) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
        """End it.

        Returns:
            Observations, rewards (float32), whether episodes are over, infos. Of an environment whose episode is over
            the observation is the first one of the next episode; `info["terminal_observation"]` is the last one.

        Raises:
            RuntimeError: if no step was begun, or it was interrupted; or a worker is lost.
            Whatever an environment has raised.
        """
        if not self.waiting and not self.closed:
            raise RuntimeError("no step is pending: call step_async before step_wait")
        self._settle()
        if self._cut:
            raise RuntimeError("the step was interrupted: reset begins anew")
        self.waiting = False
        failures, self._failures = self._failures, []
        _raise_first(failures)
        ended, cut = self._rows.outcomes["terminated"], self._rows.outcomes["truncated"]
        for info, is_cut in zip(self._infos, (cut & ~ended).tolist(), strict=True):
            info["TimeLimit.truncated"] = is_cut
        rewards = self._rows.outcomes["reward"].astype(np.float32)
        return self._rows.observations(), rewards, ended | cut, self._infos

    def reset(self) -> Any:
        """Reset all environments, with what `seed` and `set_options` were given since the last time.

        A step that is pending is dropped. What the environments tell is in `reset_infos`.

        Returns:
            Their observations.

        Raises:
            RuntimeError: if a worker is lost.
            Whatever an environment has raised.
        """
        self._settle()
        seeds = seeds_of(self._seeds, self.num_envs)
        if len(self._options) != self.num_envs:
            raise ValueError(f"set_options was given {len(self._options)} options for {self.num_envs} environments")
        self.waiting, self._cut, self._failures = False, False, []
        self._rows = Rows(self._parts, self.num_envs)
        self.reset_infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        envs_of = [link.envs for link in self._crew.links]
        self._send({k: ("reset_each", (seeds[envs], self._options[envs])) for k, envs in enumerate(envs_of)})
        _raise_first(self._take(self._place, self._hear_reset))
        self._reset_seeds()
        self._reset_options()
        return self._rows.observations()

    # --- methods and attributes

    def _ask(self, indices: int | Iterable[int] | None, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function returns of some environments, in their order."""
        self._settle()
        asked = [range(self.num_envs)[i] for i in self._get_indices(indices)]
        envs_of = [range(self.num_envs)[link.envs] for link in self._crew.links]
        places = [[place for place, i in enumerate(asked) if i in envs] for envs in envs_of]
        results: list[Any] = [None] * len(asked)

        def hear(k: int, note: Any) -> None:
            for place, result in zip(places[k], note, strict=True):
                results[place] = result

        self._send({
            k: ("ask", ([envs.index(asked[place]) for place in places[k]], function, args))
            for k, envs in enumerate(envs_of) if places[k]
        })  # fmt: skip
        _raise_first(self._take(_ignore, hear))
        return results

    def has_attr(self, attr_name: str) -> bool:
        """Whether each environment has an attribute, which need not be one that can be sent."""
        return all(self._ask(None, has_attribute, attr_name))

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """An attribute of some environments.

        Args:
            attr_name: its name.
            indices: the numbers of the environments, which alone are asked; None is all of them.

        Raises:
            AttributeError: if one has no such attribute.
        """
        return self._ask(indices, attribute_of, attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Set an attribute of some environments, of the outermost wrapper.

        Args:
            attr_name: its name.
            value: the one value for all.
            indices: as `get_attr`.
        """
        self._ask(indices, setattr, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        """What a method of some environments returns.

        Args:
            method_name: its name.
            *method_args, **method_kwargs: what it is given.
            indices: as `get_attr`.
        """
        return self._ask(indices, call_method, method_name, method_args, method_kwargs)

    def env_is_wrapped(self, wrapper_class: type, indices: int | Iterable[int] | None = None) -> list[bool]:
        """Whether some environments have a wrapper of a class.

        Args:
            wrapper_class: a subclass of `gymnasium.Wrapper`.
            indices: as `get_attr`.
        """
        return self._ask(indices, is_wrapped, wrapper_class)

    def get_images(self) -> list[Any]:
        """What each environment renders: None, with a warning, unless their mode is "rgb_array"."""
        if self.render_mode != "rgb_array":
            warnings.warn(f"render_mode={self.render_mode!r}: only 'rgb_array' gives images", stacklevel=2)
            return [None] * self.num_envs
        return self.env_method("render")

    # --- the end

    def close(self) -> None:
        """End the workers, each when it has ended its step and closed its environments. Once is enough, unless it was
        interrupted.
        """
        self.closed = True
        self._crew.end()


def _ignore(k: int, answer: Any) -> None:
    """What a worker tells is not needed."""


def _raise_first(failures: Sequence[Exception]) -> None:
    if failures:
        raise failures[0]
