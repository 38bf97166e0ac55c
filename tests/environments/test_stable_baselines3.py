"""The vectorised environment for Stable-Baselines3 does what that library's own ones do, and its algorithms learn with
it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.workers import finish, may_fork, script

pytest.importorskip("stable_baselines3")

import gymnasium
import torch
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from support.environments import Drawn, Faulty, assert_same, cartpole, pong
from support.tracer import Tracer

from ringshm.stable_baselines3 import RingVecEnv

pytestmark = may_fork

BOX, DISCRETE = spaces.Box(-1, 1, (3, 2), np.float32), spaces.Discrete(7, start=-2)
IMAGE, BITS = spaces.Box(0, 255, (5, 4, 1), np.uint8), spaces.MultiBinary(4)
MAKERS = {
    "Box": functools.partial(Drawn, BOX),
    "Discrete": functools.partial(Drawn, DISCRETE),
    "Dict": functools.partial(Drawn, spaces.Dict({"image": IMAGE, "box": BOX, "discrete": DISCRETE, "bits": BITS})),
    "Tuple": functools.partial(Drawn, spaces.Tuple((BOX, spaces.MultiDiscrete([3, 5])))),
    "CartPole": cartpole, "Pong": pong,
}  # fmt: skip


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes vectorised environments that are closed in the end; then no child is left."""
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **options: Any) -> Any:
            envs = RingVecEnv(*args, **{"start_method": "fork", **options})
            stack.callback(envs.close)
            return envs

        yield make
    assert not multiprocessing.active_children()


# --- the same as DummyVecEnv


def _same_step(ours: Any, theirs: Any, actions: Any, where: str) -> np.ndarray[Any, Any]:
    """Which episodes are over; the observations of a Dict are an OrderedDict there."""
    given, expected = [*ours.step(actions)], [*theirs.step(actions)]
    if isinstance(expected[0], dict):
        expected[0] = dict(expected[0])
    assert_same(given, expected, where)
    assert_same(ours.reset_infos, theirs.reset_infos, where)
    return given[2]  # type: ignore[no-any-return]


def _same_reset(ours: Any, theirs: Any) -> None:
    given, expected = ours.reset(), theirs.reset()
    assert_same(given, dict(expected) if isinstance(expected, dict) else expected)
    assert_same(ours.reset_infos, theirs.reset_infos)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_steps_and_resets_are_those_of_dummy_vec_env(make: Any, kind: str, workers: int) -> None:
    makers = [MAKERS[kind]] * 3
    ours, theirs = make(makers, num_workers=workers), DummyVecEnv(makers)
    for name in ("num_envs", "observation_space", "action_space", "render_mode"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.seed(5) == theirs.seed(5)
    for envs in (ours, theirs):
        envs.set_options([{"a": 1}, {}, {"b": 2}])
    _same_reset(ours, theirs)
    rng, ended = np.random.default_rng(5), 0
    for step in range(150 if kind != "Pong" else 25):
        actions = rng.integers(0, 2, 3)
        ended += int(_same_step(ours, theirs, actions, f"step {step}").sum())
    assert ended >= 3
    ours.seed(np.int64(6))
    theirs.seed(6)
    _same_reset(ours, theirs)
    theirs.close()


def test_each_part_of_a_step_is_its_callers_own(make: Any) -> None:
    envs = make([cartpole] * 2)
    envs.seed(0)
    first = envs.reset()
    kept = first.copy()
    _, rewards, dones, infos = envs.step(np.array([0, 1]))
    envs.step(np.array([1, 1]))
    np.testing.assert_array_equal(first, kept)
    assert (rewards.tolist(), dones.tolist()) == ([1, 1], [False, False])
    assert infos == [{"TimeLimit.truncated": False}] * 2


# --- methods and attributes


def test_only_those_are_asked_whose_indices_are_given(make: Any) -> None:
    makers = [MAKERS["Box"]] * 5
    for envs in (make(makers, num_workers=2), DummyVecEnv(makers)):
        assert envs.env_method("count", indices=[3, 1, 3]) == [1, 1, 2]
        assert envs.env_method("count", 2, indices=-1) == [2]
        assert envs.env_method("count", by=10, indices=range(2)) == [10, 11]
        assert envs.get_attr("counted") == [10, 11, 0, 2, 2]
        envs.set_attr("counted", 7, indices=[4, 0])
        assert envs.get_attr("counted", indices=(0, 1, 4)) == [7, 11, 7]
        assert envs.get_attr("counted", indices=[]) == []
        with pytest.raises(IndexError):
            envs.get_attr("counted", indices=5)


def test_attributes_are_looked_for_in_wrappers_and_set_on_the_outermost(make: Any) -> None:
    makers = [lambda: Monitor(Drawn(BOX)), lambda: Drawn(BOX)]
    for envs in (make(makers, num_workers=1), DummyVecEnv(makers)):
        assert envs.env_is_wrapped(Monitor) == [True, False]
        assert envs.env_is_wrapped(Monitor, indices=1) == [False]
        assert envs.env_is_wrapped(gymnasium.Wrapper, indices=[0]) == [True]
        assert (envs.has_attr("counted"), envs.has_attr("no_such")) == (True, False)
        with pytest.raises(AttributeError):
            envs.get_attr("no_such")
        envs.set_attr("counted", 3)
        assert [env.counted for env in envs.get_attr("unwrapped")] == [0, 3]


def test_an_attribute_that_cannot_be_sent_is_there_all_the_same(make: Any) -> None:
    envs = make([cartpole] * 2)
    envs.env_method("set_wrapper_attr", "counted", 1)
    assert envs.has_attr("step") and envs.has_attr("np_random")
    assert callable(envs.get_attr("step")[0])  # not called


def test_images_are_those_that_each_environment_renders(make: Any) -> None:
    makers = [functools.partial(Drawn, BOX, "rgb_array")] * 3
    ours, theirs = make(makers, num_workers=2), DummyVecEnv(makers)
    for envs in (ours, theirs):
        envs.env_method("count", indices=1)
    assert_same(ours.get_images(), theirs.get_images())
    assert_same(ours.render(), theirs.render())
    plain = make([MAKERS["Box"]] * 2)
    with pytest.warns(UserWarning, match="render_mode=None"):
        assert plain.get_images() == [None, None]


# --- what goes wrong


def test_a_failure_is_told_and_the_environments_go_on(make: Any) -> None:
    envs = make([Faulty] * 4, num_workers=2)
    for action, kind, text in (
        (Faulty.RAISE, ZeroDivisionError, "one over nought"),
        (Faulty.SCALAR, ValueError, r"observation has shape \(\), its space has \(2,\)"),
        (Faulty.LIST, TypeError, "its info is a list, no dict"),
        (Faulty.KEYWORD, RuntimeError, r"environments 2 to 3\) answered cannot be unpickled here"),
    ):
        envs.reset()
        with pytest.raises(kind, match=text):
            envs.step([0, 0, 0, action])
        envs.reset()
        assert envs.step(np.arange(4) * 0 + Faulty.FINE)[1].tolist() == [0] * 4
    envs.set_options({"fail": True})
    with pytest.raises(KeyError, match="lost"):
        envs.reset()
    envs.set_options()
    assert envs.reset().tolist() == [[0, 0]] * 4


def test_what_cannot_be_sent_to_environments_leaves_them_as_they_were(make: Any) -> None:
    envs = make([Faulty] * 2)
    envs.reset()
    with pytest.raises(Exception, match="cannot be pickled"):
        envs.set_attr("pid", lambda: None)
    with pytest.raises(ValueError, match="3 actions for 2 environments"):
        envs.step(np.zeros(3))
    assert envs.step([0, 0])[0].tolist() == [[1, 1]] * 2
    envs.set_options([{}])
    with pytest.raises(ValueError, match="set_options was given 1 options for 2 environments"):
        envs.reset()
    assert envs.step([0, 0])[0].tolist() == [[1, 1]] * 2


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_is_named(make: Any, method: str) -> None:
    envs = make([Faulty] * 4, start_method=method, num_workers=2)
    envs.reset()
    pid = envs.get_attr("pid", indices=2)[0]
    os.kill(pid, signal.SIGKILL)
    text = rf"process {pid} \(environments 2 to 3\) was killed by signal 9"
    for call in (functools.partial(envs.step, [0] * 4), envs.reset, functools.partial(envs.get_attr, "pid", 3)):
        with pytest.raises(RuntimeError, match=text):
            call()
    assert envs.get_attr("pid", indices=[1])


def test_an_environment_that_cannot_be_made_is_named_and_nothing_is_left() -> None:
    calls: list[int] = []

    def fails() -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("no such game")
        return Faulty()

    with pytest.raises(OSError, match="no such game") as caught:
        RingVecEnv([fails] * 3, "fork", num_workers=1)
    assert "environment 0 failed" in str(caught.value.__cause__)
    env = Faulty()
    with pytest.raises(ValueError, match="the same environment"):
        RingVecEnv([lambda: env] * 2, "fork", num_workers=1)
    with pytest.raises(ValueError, match="num_workers=3 must be at most 2"):
        RingVecEnv([Faulty] * 2, num_workers=3)
    with pytest.raises(ValueError, match="illegal"):
        RingVecEnv([Faulty] * 2, "illegal")
    assert not multiprocessing.active_children()


# --- calls amid others


def test_a_step_that_is_pending_is_kept_by_questions_and_dropped_by_a_reset(make: Any) -> None:
    envs = make([Faulty] * 3, num_workers=2)
    envs.reset()
    with pytest.raises(RuntimeError, match="call step_async before"):
        envs.step_wait()
    envs.step_async([0, Faulty.LARGE, Faulty.SLEEP])
    with pytest.raises(RuntimeError, match="a step is pending"):
        envs.step_async([0, 0, 0])
    assert len(envs.get_attr("pid")) == 3
    observations, rewards, _, infos = envs.step_wait()
    assert (observations.tolist(), rewards.tolist()) == ([[1, 1]] * 3, [0, Faulty.LARGE, Faulty.SLEEP])
    assert len(infos[1]["large"]) == 100_000
    for action in (Faulty.SLEEP, Faulty.RAISE):
        envs.step_async([0, 0, action])
        assert envs.reset().tolist() == [[0, 0]] * 3
        assert envs.step([0, 0, 0])[0].tolist() == [[1, 1]] * 3


def test_after_an_interrupt_amid_a_step_a_reset_begins_anew(make: Any) -> None:
    envs = make([Faulty] * 3, num_workers=3)
    envs.reset()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        envs.step([0, Faulty.SLEEP, 0])
    timer.join()
    with pytest.raises(RuntimeError, match="was interrupted: call step_wait, or reset"):
        envs.step([0, 0, 0])
    with pytest.raises(RuntimeError, match="was interrupted: reset begins anew"):
        envs.step_wait()
    assert len(envs.get_attr("pid")) == 3
    assert envs.reset().tolist() == [[0, 0]] * 3
    assert envs.step([0, 0, 19])[1].tolist() == [0, 0, 19]


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["step", "reset", "get_attr"])
def test_after_an_interrupt_anywhere_no_call_gets_what_was_told_to_another(make: Any, call: str) -> None:
    envs = make([Faulty] * 2, num_workers=2)
    envs.reset()
    pids, arguments = envs.get_attr("pid"), {"step": [[0, 19]], "reset": [], "get_attr": ["observation_space"]}[call]
    for at in range(1, 5000, 13):
        tracer = Tracer(_interrupt, at, folders=("", "environments"), may_miss=True)
        with contextlib.suppress(KeyboardInterrupt), tracer:
            getattr(envs, call)(*arguments)
        if tracer.count < at:
            break
        if envs.waiting and at % 3:
            with contextlib.suppress(RuntimeError):  # the step was interrupted
                assert envs.step_wait()[1].tolist() == [0, 19]
        assert envs.get_attr("pid") == pids
        assert envs.reset().tolist() == [[0, 0]] * 2
        assert envs.step([18, at % 2 * 19])[1].tolist() == [18, at % 2 * 19]
    assert 500 < at < 4000


def test_it_may_be_closed_twice_and_amid_a_step(make: Any) -> None:
    envs = make([Faulty] * 2)
    envs.reset()
    envs.step_async([Faulty.SLEEP, 0])
    envs.close()
    envs.close()
    assert not multiprocessing.active_children()
    for call in (envs.reset, envs.step_wait, functools.partial(envs.get_attr, "pid")):
        with pytest.raises(ClosedEnvironmentError):
            call()


# --- what is imported, and where


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_do_not_import_torch(method: str) -> None:
    program = """
import sys
from support.environments import cartpole

def make():
    env = cartpole()
    env.unwrapped.loaded = "torch" in sys.modules
    return env

from ringshm.stable_baselines3 import RingVecEnv
envs = RingVecEnv([make] * 2, sys.argv[1])
envs.reset()
print(envs.get_attr("loaded"), envs.env_is_wrapped(RingVecEnv.__mro__[-1]), "torch" in sys.modules)
envs.close()
"""
    assert finish(script(program, method)) == "[False, False] [True, True] True\n"


# --- algorithms

SETTINGS: dict[Any, dict[str, Any]] = {
    PPO: {"n_steps": 32, "batch_size": 64, "n_epochs": 4},
    DQN: {"learning_starts": 50, "train_freq": 4, "gradient_steps": 4, "buffer_size": 1000},
}
#: With which CartPole is learnt, and in how many steps.
TUNED: dict[Any, tuple[dict[str, Any], int]] = {
    PPO: ({"n_steps": 32, "batch_size": 128, "gae_lambda": 0.8, "gamma": 0.98, "learning_rate": 1e-3}, 10_000),
    DQN: (
        {
            "learning_rate": 2.3e-3, "batch_size": 64, "learning_starts": 1000, "target_update_interval": 10,
            "train_freq": 32, "gradient_steps": 64, "exploration_fraction": 0.16, "exploration_final_eps": 0.04,
        },
        12_000,
    ),
}  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_what_is_learnt_is_what_is_learnt_with_dummy_vec_env(make: Any, one_thread: None, algorithm: Any) -> None:
    makers = [lambda: Monitor(cartpole())] * 4

    def learnt(envs: Any) -> tuple[Any, dict[str, Any]]:
        model = algorithm("MlpPolicy", envs, seed=1, device="cpu", **SETTINGS[algorithm]).learn(400)
        episodes = [(episode["r"], episode["l"]) for episode in model.ep_info_buffer]
        return episodes, {name: weight.numpy() for name, weight in model.policy.state_dict().items()}

    ours, theirs = learnt(make(makers, num_workers=2)), learnt(DummyVecEnv(makers))
    assert ours[0]
    assert_same(ours, theirs)


def test_learning_goes_on_in_new_environments_when_a_worker_was_killed(make: Any, one_thread: None) -> None:
    makers = [cartpole] * 4

    def kill(here: dict[str, Any], _: Any) -> bool:
        if here["self"].num_timesteps == 200:
            multiprocessing.active_children()[0].kill()
        return True

    model = PPO("MlpPolicy", make(makers, num_workers=2), seed=1, device="cpu", **SETTINGS[PPO])
    with pytest.raises(RuntimeError, match=r"\(environments . to .\) was killed by signal 9"):
        model.learn(2000, callback=kill)
    model.env.close()
    model.set_env(make(makers, num_workers=2))
    model.learn(300, reset_num_timesteps=False)
    assert model.num_timesteps >= 500


@pytest.mark.slow(seconds=120)
@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_cartpole_is_learnt(one_thread: None, algorithm: Any) -> None:
    settings, steps = TUNED[algorithm]
    with contextlib.closing(make_vec_env("CartPole-v1", 4, seed=0, vec_env_cls=RingVecEnv)) as envs:
        model = algorithm("MlpPolicy", envs, seed=0, device="cpu", **settings).learn(steps)
        mean, _ = evaluate_policy(model, envs, 20)
    assert mean > 100  # of actions at random it is some 22


@pytest.mark.parametrize("wrapper", [VecNormalize, functools.partial(VecFrameStack, n_stack=2)])
def test_wrappers_go_around_it(make: Any, wrapper: Callable[[Any], Any]) -> None:
    makers = [cartpole] * 2
    ours, theirs = wrapper(make(makers)), wrapper(DummyVecEnv(makers))
    for envs in (ours, theirs):
        envs.seed(3)
    assert_same(ours.reset(), theirs.reset())
    for step in range(60):
        actions = np.array([step % 2, 1])
        assert_same([*ours.step(actions)], [*theirs.step(actions)], f"step {step}")
