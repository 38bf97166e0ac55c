"""Environments by their names."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from .vector_env import RingVectorEnv


def make_vec(
    id: str | EnvSpec,
    num_envs: int = 1,
    vector_kwargs: dict[str, Any] | None = None,
    wrappers: Sequence[Callable[[Any], Any]] | None = None,
    **kwargs: Any,
) -> RingVectorEnv:
    """Gymnasium's `make_vec`, which knows its own modes alone, with a `RingVectorEnv`.

    The `spec` of what it returns leads `gymnasium.make_vec` to another of the kind.

    >>> envs = make_vec("CartPole-v1", 4, vector_kwargs={"num_workers": 1}, max_episode_steps=50)
    >>> envs
    RingVectorEnv(CartPole-v1, num_envs=4)
    >>> envs.close()

    Args:
        id: of the environment, with its version, as in `"CartPole-v1"`, or `"module:Env-v0"` to import a module first;
            or an EnvSpec.
        num_envs: how many.
        vector_kwargs: arguments of `RingVectorEnv`, by their names.
        wrappers: are put around each environment.
        **kwargs: arguments of the environments.

    Raises:
        As `gymnasium.make_vec` and `RingVectorEnv`.
    """
    if isinstance(vector_kwargs, str) or "vectorization_mode" in kwargs:
        raise TypeError("this make_vec makes a RingVectorEnv: leave out `vectorization_mode`")
    if isinstance(id, str):
        module, _, name = id.rpartition(":")
        if module:
            importlib.import_module(module)
        id = gymnasium.spec(name)
    single = copy.deepcopy(id)
    single.kwargs, single.vector_entry_point = {}, None
    found = copy.deepcopy(id)
    found.additional_wrappers = ()
    found.vector_entry_point = functools.partial(_make_vec, single, vector_kwargs or {}, wrappers or ())
    envs: Any = gymnasium.make_vec(found, num_envs, "vector_entry_point", **kwargs)
    return envs  # type: ignore[no-any-return]


def _make_vec(
    spec: EnvSpec, vector_kwargs: dict[str, Any], wrappers: Sequence[Callable[[Any], Any]], num_envs: int, **kwargs: Any
) -> RingVectorEnv:
    return RingVectorEnv([functools.partial(_make, spec, wrappers, kwargs)] * num_envs, **vector_kwargs)


def _make(spec: EnvSpec, wrappers: Sequence[Callable[[Any], Any]], kwargs: dict[str, Any]) -> Any:
    env = gymnasium.make(spec, **kwargs)
    for wrapper in wrappers:
        env = wrapper(env)
    return env
