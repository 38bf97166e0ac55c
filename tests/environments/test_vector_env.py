"""The vectorised environment does what Gymnasium's own ones do."""

from __future__ import annotations

import contextlib
import functools
import inspect
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.workers import may_fork

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")
pytestmark = may_fork

from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError  # noqa: E402
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv  # noqa: E402
from support.environments import MODES, Faulty, Loose, Nested, assert_same, cartpole, pong  # noqa: E402

from ringshm.gymnasium import RingVectorEnv, make_vec  # noqa: E402

# --- the same as Gymnasium's


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("maker", "steps", "episodes"),
    [(cartpole, 300, 20), (Nested, 200, 60), (pong, 45, 4)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_trajectories_are_those_of_sync_vector_env(
    make: Any, maker: Callable[[], Any], steps: int, episodes: int, mode: AutoresetMode
) -> None:
    makers = [maker] * 3
    ours, theirs = make(makers, num_workers=2, autoreset_mode=mode), SyncVectorEnv(makers, autoreset_mode=mode)
    for name in ("num_envs", "observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.metadata, ours.render_mode, ours.spec) == (theirs.metadata, theirs.render_mode, theirs.spec)
    assert_same(ours.reset(seed=5, options={"a": 1}), theirs.reset(seed=5, options={"a": 1}))
    ours.action_space.seed(5)
    ended = 0
    for step in range(steps):
        actions = ours.action_space.sample()
        answer = ours.step(actions)
        assert_same(answer, theirs.step(actions), f"step {step}")
        over = answer[2] | answer[3]
        ended += int(over.sum())
        if mode is AutoresetMode.DISABLED and over.any():
            seeds = [step, None, step + 1]
            assert_same(
                ours.reset(seed=seeds, options={"reset_mask": over}),
                theirs.reset(seed=list(seeds), options={"reset_mask": over}),
                f"reset after step {step}",
            )
    assert ended >= episodes
    assert_same(ours.reset(seed=[1, None, 3]), theirs.reset(seed=[1, None, 3]))
    theirs.close()


def test_lambdas_go_to_workers_that_are_spawned(make: Any) -> None:
    length = 1.5
    makers = [lambda: gymnasium.make("CartPole-v1"), lambda: gymnasium.make("CartPole-v1", max_episode_steps=3)]
    ours, theirs = make(makers, context="spawn"), SyncVectorEnv(makers)
    for envs in (ours, theirs):
        envs.set_attr("length", length)
    assert_same(ours.reset(seed=1), theirs.reset(seed=1))
    for _ in range(10):
        assert_same(ours.step(np.array([0, 1])), theirs.step(np.array([0, 1])))
    assert ours.get_attr("length") == (length, length)


def test_there_may_be_a_worker_for_all_or_for_each(make: Any) -> None:
    for workers in (1, 3):
        envs = make([cartpole] * 3, num_workers=workers)
        assert len(multiprocessing.active_children()) == workers
        assert_same(envs.reset(seed=0), SyncVectorEnv([cartpole] * 3).reset(seed=0))
        envs.close()


def test_attributes_methods_and_frames_come_from_each_environment(make: Any) -> None:
    envs = make([functools.partial(gymnasium.make, "CartPole-v1", render_mode="rgb_array")] * 3, num_workers=2)
    envs.reset(seed=7)
    assert envs.np_random_seed == (7, 8, 9)
    for seed, seeds in [(np.int64(5), (5, 6, 7)), (np.array([3, 1, 2]), (3, 1, 2)), ([np.uint8(4), 5, 6], (4, 5, 6))]:
        envs.reset(seed=seed)
        assert envs.np_random_seed == seeds
    for wrong in (1.5, "abc", [1.0, 2.0, 3.0], [[1], [2], [3]]):
        with pytest.raises(TypeError, match=r"seed=.* must be an int, None, or a list"):
            envs.reset(seed=wrong)
    with pytest.raises(ValueError, match="2 seeds for 3 environments"):
        envs.reset(seed=[1, 2])
    assert [rng.random() for rng in envs.np_random] != [0, 0, 0]
    envs.set_attr("gravity", [1.0, 2.0, 3.0])
    assert envs.get_attr("gravity") == (1.0, 2.0, 3.0)
    envs.set_attr("gravity", 4.0)
    assert envs.call("gravity") == (4.0, 4.0, 4.0)
    assert envs.call("has_wrapper_attr", "no_such") == (False, False, False)
    try:
        import pygame  # noqa: F401
    except ImportError:
        return
    assert [frame.shape for frame in envs.render()] == [(400, 600, 3)] * 3


def test_observations_are_copies_unless_they_need_not_be(make: Any) -> None:
    actions = np.zeros(2, np.int64)
    own, shared = make([cartpole] * 2), make([cartpole] * 2, copy=False)
    first, same = own.reset(seed=0)[0], shared.reset(seed=0)[0]
    kept = first.copy()
    assert shared.step(actions)[0] is same
    assert own.step(actions)[0] is not first
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(own.step(actions)[0], shared.step(actions)[0])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_what_has_no_fixed_size_travels_beside_what_has(make: Any, method: str) -> None:
    ours, theirs = make([Loose] * 3, num_workers=2, context=method), SyncVectorEnv([Loose] * 3)
    assert_same(ours.reset(seed=4), theirs.reset(seed=4))
    ours.action_space.seed(4)
    for step in range(30):
        actions = ours.action_space.sample()
        assert_same(ours.step(actions), theirs.step(actions), f"step {step}")


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, min(len(os.sched_getaffinity(0)), 5)),
        ({"num_workers": 3}, 3),
        ({"num_workers": 3, "max_concurrency": 1}, 1),
        ({"batch_size": 2}, 5),
    ],
)
def test_there_are_so_many_workers(make: Any, options: Any, count: int) -> None:
    assert len({*make([Faulty] * 5, **options).get_attr("pid")}) == count


def test_arguments_are_those_of_async_vector_env() -> None:
    ours, theirs = (inspect.signature(kind).parameters.values() for kind in (RingVectorEnv, AsyncVectorEnv))
    given = [(one.name, one.default) for one in ours if one.kind is not one.KEYWORD_ONLY]
    assert given[: len(theirs)] == [(one.name, one.default) for one in theirs]
    ours, theirs = (
        inspect.signature(kind.close_extras).parameters.values() for kind in (RingVectorEnv, AsyncVectorEnv)
    )
    assert [(one.name, one.default) for one in ours] == [(one.name, one.default) for one in theirs]


# --- made by name


def wrapped(env: Any) -> Any:
    return gymnasium.wrappers.TransformReward(env, lambda reward: 2 * reward)


def test_make_vec_makes_what_gymnasiums_own_makes() -> None:
    arguments = {"wrappers": [wrapped], "max_episode_steps": 7, "sutton_barto_reward": True}
    ours = make_vec("CartPole-v1", 3, vector_kwargs={"num_workers": 1, "autoreset_mode": "SameStep"}, **arguments)
    theirs = gymnasium.make_vec("CartPole-v1", 3, "sync", vector_kwargs={"autoreset_mode": "SameStep"}, **arguments)
    with contextlib.closing(ours):
        assert (type(ours), repr(ours)) == (RingVectorEnv, "RingVectorEnv(CartPole-v1, num_envs=3)")
        assert_same(ours.reset(seed=1), theirs.reset(seed=1))
        for _ in range(20):
            assert_same(ours.step(np.array([0, 1, 0])), theirs.step(np.array([0, 1, 0])))
    with contextlib.closing(gymnasium.make_vec(ours.spec)) as again:
        assert (type(again), again.num_envs, again.autoreset_mode) == (RingVectorEnv, 3, AutoresetMode.SAME_STEP)
        assert_same(again.reset(seed=1), theirs.reset(seed=1))


def test_make_vec_says_what_it_does_not_find() -> None:
    with pytest.raises(gymnasium.error.NameNotFound, match="NoSuch"):
        make_vec("NoSuch-v1")
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        make_vec("no_such:CartPole-v1")
    for call in (
        lambda: make_vec("CartPole-v1", 2, "async"),
        lambda: make_vec("CartPole-v1", vectorization_mode="async"),
    ):
        with pytest.raises(TypeError, match="leave out `vectorization_mode`"):
            call()


# --- begun and ended apart


def test_a_step_that_has_timed_out_may_still_be_ended(make: Any) -> None:
    envs = make([Faulty] * 2)
    envs.reset()
    envs.step_async(np.array([Faulty.FINE, Faulty.SLEEP]))
    with pytest.raises(multiprocessing.TimeoutError, match="step_wait"):
        envs.step_wait(timeout=0.01)
    with pytest.raises(AlreadyPendingCallError, match="pending call to `step`"):
        envs.reset()
    with pytest.raises(NoAsyncCallError, match="`call_wait` without any prior call to `call_async`"):
        envs.call_wait()
    assert envs.step_wait()[1].tolist() == [Faulty.FINE, Faulty.SLEEP]
    assert envs.step(np.array([0, 0]))[1].tolist() == [0, 0]


def test_time_is_up_for_infos_too(make: Any) -> None:
    envs = make([Faulty], num_workers=1)
    (pid,) = envs.get_attr("pid")
    envs.reset()
    envs.step_async(np.array([Faulty.LARGE]))
    time.sleep(0.3)  # the infos are on their way: they do not fit into the ring
    os.kill(pid, signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises(multiprocessing.TimeoutError):
            envs.step_wait(timeout=0.1)
    os.kill(pid, signal.SIGCONT)
    np.testing.assert_array_equal(envs.step_wait()[-1]["large"][0], np.arange(100_000))


def test_close_amid_a_step_warns_and_ends_the_workers(make: Any) -> None:
    envs = make([Faulty] * 2)
    envs.reset()
    envs.step_async(np.array([Faulty.LARGE, Faulty.LARGE]))
    with pytest.warns(UserWarning, match="pending call to `step`"):
        envs.close()
    assert not multiprocessing.active_children()
    with pytest.raises(ClosedEnvironmentError):
        envs.step(np.array([0, 0]))
    envs.close()


@pytest.mark.parametrize("options", [{"terminate": True}, {"timeout": 0.05}])
def test_close_does_not_wait_longer_than_it_may(make: Any, options: Any) -> None:
    gate = multiprocessing.Event()

    class Waits(Faulty):
        def close(self) -> None:
            gate.wait()

    envs = make([Faulty, Waits], num_workers=2)
    envs.close(**options)
    assert not multiprocessing.active_children()
    with pytest.raises(ClosedEnvironmentError):
        envs.get_attr("pid")


def test_close_waits_for_an_environment_to_close(make: Any, tmp_path: Path) -> None:
    class Slow(Faulty):
        def close(self) -> None:
            if multiprocessing.parent_process():
                time.sleep(0.3)
                (tmp_path / "closed").touch()

    make([Slow]).close()
    assert (tmp_path / "closed").exists()


def test_workers_end_with_an_environment_that_nobody_has_closed() -> None:
    envs = RingVectorEnv([Faulty] * 2, context="fork")
    assert len(multiprocessing.active_children()) == 2
    del envs
    assert not multiprocessing.active_children()
