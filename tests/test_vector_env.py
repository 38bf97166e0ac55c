"""The vectorised environment does what Gymnasium's own ones do, and says who failed and why."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")

from gymnasium import spaces  # noqa: E402
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError  # noqa: E402
from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: E402

from ringshm.gymnasium import RingVectorEnv  # noqa: E402

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


class Nested(gymnasium.Env[Any, Any]):
    """Episodes of random length, observations of several arrays, infos of all kinds, some of which are seldom there."""

    _PAIR = spaces.Tuple((spaces.Discrete(7, start=-2), spaces.MultiBinary(4)))
    _IMAGE, _MANY = spaces.Box(0, 255, (6, 5, 3), np.uint8), spaces.MultiDiscrete([3, 5])
    observation_space = spaces.Dict({"image": _IMAGE, "pair": _PAIR, "many": _MANY})
    action_space = spaces.Dict({"push": spaces.Box(-1, 1, (2,), np.float32), "fire": spaces.Discrete(2)})

    def _look(self) -> dict[str, Any]:
        rng = self.np_random
        return {
            "image": rng.integers(0, 256, (6, 5, 3), np.uint8),
            "pair": (int(rng.integers(-2, 5)), rng.integers(0, 2, 4, np.int8)),
            "many": rng.integers(0, 3, 2),
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._look(), {"options": str(options), "drawn": self.np_random.random()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        draw = self.np_random.random()
        infos: dict[str, Any] = {"nested": {"array": np.arange(3) * draw}} if draw < 0.3 else {}
        reward = float(action["push"].sum()) + float(action["fire"])
        return self._look(), reward, draw < 0.1, 0.1 < draw < 0.2, infos


class Faulty(gymnasium.Env[Any, Any]):
    """Does as it is told by its actions."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(8)
    FINE, RAISE, DIE, LARGE, SECRET, SLEEP, STRANGE = range(7)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if options:
            raise KeyError("lost")
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        infos: dict[str, Any] = {}
        if action == self.RAISE:
            raise ZeroDivisionError("one over nought")
        if action == self.STRANGE:
            raise Unpicklable("strange")
        if action == self.DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if action == self.SLEEP:
            time.sleep(0.5)
        if action == self.LARGE:
            infos["large"] = np.arange(100_000)
        if action == self.SECRET:
            infos["secret"] = lambda: None
        return np.ones(2, np.float32), float(action), False, False, infos


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


def cartpole() -> Any:
    return gymnasium.make("CartPole-v1")


def pong() -> Any:
    gymnasium.register_envs(pytest.importorskip("ale_py"))
    return gymnasium.make("ALE/Pong-v5", max_episode_steps=20)


@pytest.fixture
def make() -> Iterator[Callable[..., RingVectorEnv]]:
    """Makes vectorised environments that are closed in the end; then no child is left."""
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **options: Any) -> RingVectorEnv:
            envs = RingVectorEnv(*args, **{"context": "fork", **options})
            stack.callback(envs.close)
            return envs

        yield make
    assert not multiprocessing.active_children()


def assert_same(ours: Any, theirs: Any, where: str = "it") -> None:
    """Equal to the last bit and dtype; of dicts the order of keys may differ."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert set(ours) == set(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs), where
        for k, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(our, their, f"{where}[{k}]")
    elif isinstance(ours, np.ndarray) and ours.dtype == object:
        assert_same(list(ours), list(theirs), where)
    elif isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        np.testing.assert_array_equal(ours, theirs, where)
    else:
        assert ours == theirs, where


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
    np.testing.assert_array_equal(same, own.observations)


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


def test_workers_end_with_an_environment_that_nobody_has_closed() -> None:
    envs = RingVectorEnv([Faulty] * 2, context="fork")
    assert len(multiprocessing.active_children()) == 2
    del envs
    assert not multiprocessing.active_children()


# --- what goes wrong


def test_infos_may_be_larger_than_a_slot(make: Any) -> None:
    envs = make([Faulty] * 3, num_workers=1)
    envs.reset()
    for _ in range(3):
        *_, infos = envs.step(np.array([Faulty.LARGE, Faulty.FINE, Faulty.LARGE]))
        assert infos["_large"].tolist() == [True, False, True]
        np.testing.assert_array_equal(infos["large"][2], np.arange(100_000))
        assert envs.step(np.zeros(3, np.int64))[-1] == {}


FAULTS = [
    (Faulty.RAISE, ZeroDivisionError, "one over nought"),
    (Faulty.STRANGE, RuntimeError, "Unpicklable: strange"),
    (Faulty.SECRET, Exception, "lambda|local object"),
]


@pytest.mark.parametrize(("action", "kind", "text"), FAULTS)
def test_an_exception_arrives_with_the_environment_and_its_traceback(
    make: Any, action: int, kind: type[Exception], text: str
) -> None:
    envs = make([Faulty] * 4, num_workers=2)
    envs.reset()
    with pytest.raises(kind, match=text) as caught:
        envs.step(np.array([0, 0, 0, action]))
    assert re.search(r"environment 3 failed in process \d+:\nTraceback(?s:.*)", str(caught.value.__cause__))
    with pytest.raises(RuntimeError, match="stepped environments 2 to 3, ended with exit code 1: close this"):
        envs.step(np.zeros(4, np.int64))


def test_an_exception_in_reset_arrives_too(make: Any) -> None:
    envs = make([Faulty] * 2)
    with pytest.raises(KeyError, match="lost") as caught:
        envs.reset(options={"any": 1})
    assert "environment 0 failed" in str(caught.value.__cause__)


def test_a_finished_episode_is_not_stepped_where_autoreset_is_off(make: Any) -> None:
    envs = make([functools.partial(gymnasium.make, "CartPole-v1", max_episode_steps=1)], autoreset_mode="Disabled")
    envs.reset()
    envs.step(np.array([0]))
    with pytest.raises(AssertionError, match="reset_mask"):
        envs.step(np.array([0]))


@pytest.mark.parametrize("moment", ["amid a step", "between steps", "stopped"])
def test_a_worker_that_is_killed_is_named(make: Any, moment: str) -> None:
    envs = make([Faulty] * 4, num_workers=2)
    envs.reset()
    process = envs.links[1].process
    if moment == "between steps":
        os.kill(process.pid, signal.SIGKILL)
    if moment == "stopped":
        os.kill(process.pid, signal.SIGSTOP)
        envs.step_async(np.zeros(4, np.int64))
        with pytest.raises(multiprocessing.TimeoutError):
            envs.step_wait(timeout=0.2)
        os.kill(process.pid, signal.SIGKILL)
    else:
        envs.step_async(np.array([0, 0, 0, Faulty.DIE]))
    text = f"process {process.pid}, which stepped environments 2 to 3, was killed by signal 9"
    with pytest.raises(RuntimeError, match=text):
        envs.step_wait()
    with pytest.raises(RuntimeError, match=text):
        envs.call("spec")


def test_an_environment_that_cannot_be_made_is_named_and_nothing_is_left() -> None:
    def fails() -> Any:
        raise OSError("no such game")

    def dies() -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match="no such game") as caught:
        RingVectorEnv([Faulty, Faulty, fails], num_workers=2, context="fork")
    assert "environment 2 failed" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="which stepped environments 1 to 2, was killed by signal 9"):
        RingVectorEnv([Faulty, Faulty, dies], num_workers=2, context="fork")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("spare", [spaces.Text(5), spaces.Sequence(spaces.Discrete(2))])
def test_observations_without_a_fixed_size_are_refused(spare: Any) -> None:
    class Strange(Faulty):
        observation_space = spaces.Dict({"fine": spaces.Discrete(2), "strange": spare})

    with pytest.raises(ValueError, match=r"no fixed size.*SyncVectorEnv"):
        RingVectorEnv([Strange])


def test_bad_arguments_are_named(make: Any) -> None:
    for count in (0, 3, -1):
        with pytest.raises(ValueError, match=f"num_workers={count} must be 1 to 2"):
            RingVectorEnv([Faulty] * 2, num_workers=count)
    with pytest.raises(ValueError, match="Nonsense"):
        RingVectorEnv([Faulty], autoreset_mode="Nonsense")
    envs = make([Faulty] * 2)
    for call, error, text in [
        (lambda: envs.reset(seed=[1]), ValueError, "1 seeds for 2 environments"),
        (lambda: envs.step(np.zeros(3, np.int64)), ValueError, "3 actions for 2 environments"),
        (lambda: envs.step([0]), ValueError, "1 actions for 2 environments"),
        (lambda: envs.set_attr("a", [1]), ValueError, "1 values for 2 environments"),
        (lambda: envs.reset(options={"reset_mask": [True, False]}), TypeError, "numpy array"),
        (lambda: envs.reset(options={"reset_mask": np.array([1, 0])}), TypeError, "dtype"),
        (lambda: envs.reset(options={"reset_mask": np.array([True])}), ValueError, "shape"),
        (lambda: envs.reset(options={"reset_mask": np.array([False, False])}), ValueError, "at least one True"),
    ]:
        with pytest.raises(error, match=text):
            call()
    envs.reset(seed=0)
    assert envs.step([0, 0])[1].tolist() == [0, 0]
