"""A failure is told by the call that it belongs to, with its traceback; the environments go on."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import random
import re
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from support.tracer import Tracer
from support.workers import Interrupt, each_step, may_fork

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")
pytestmark = may_fork

from gymnasium.error import NoAsyncCallError  # noqa: E402
from gymnasium.vector import SyncVectorEnv  # noqa: E402
from support.environments import Faulty, Keyword, Nested, assert_same  # noqa: E402

from ringshm import Channel, ChannelClosed, EndOfChannel  # noqa: E402
from ringshm.environments import crew  # noqa: E402
from ringshm.gymnasium import RingVectorEnv  # noqa: E402


def test_infos_may_be_larger_than_a_slot(make: Any) -> None:
    envs = make([Faulty] * 3, num_workers=1)
    envs.reset()
    for _ in range(3):
        *_, infos = envs.step(np.array([Faulty.LARGE, Faulty.FINE, Faulty.LARGE]))
        assert infos["_large"].tolist() == [True, False, True]
        np.testing.assert_array_equal(infos["large"][2], np.arange(100_000))
        assert envs.step(np.zeros(3, np.int64))[-1] == {}


#: What an environment does wrong, and what is raised: with the environment's number and traceback, or the worker's pid.
FAULTS = [
    (Faulty.RAISE, ZeroDivisionError, "one over nought", True),
    (Faulty.STRANGE, RuntimeError, "Unpicklable: strange", True),
    (Faulty.END, EndOfChannel, "of a channel of its own", True),
    (Faulty.SECRET, Exception, "lambda|local object", False),
    (
        Faulty.KEYWORD,
        RuntimeError,
        r"environments 2 to 3\) answered cannot be unpickled here: TypeError.*Keyword",
        False,
    ),
    (Faulty.LIST, TypeError, "its info is a list, no dict", True),
    (Faulty.ITSELF, RuntimeError, r"environments 2 to 3\) cannot be put together: RecursionError", False),
    (Faulty.SCALAR, ValueError, r"observation has shape \(\), its space has \(2,\)", True),
    (Faulty.LONG, ValueError, r"observation has shape \(3,\), its space has \(2,\)", True),
    (Faulty.TEXT, TypeError, "same_kind", True),
    (Faulty.NOTHING, ValueError, "observation has shape", True),
]


@pytest.mark.parametrize(("action", "kind", "text", "placed"), FAULTS)
def test_a_failure_is_told_and_the_environments_go_on(
    make: Any, action: int, kind: Any, text: str, placed: bool
) -> None:
    envs = make([Faulty] * 4, num_workers=2)
    envs.reset()
    with pytest.raises(kind, match=text) as caught:
        envs.step(np.array([0, 0, 0, action]))
    assert not placed or re.search(
        r"environment 3 failed in process \d+:\nTraceback(?s:.*)", str(caught.value.__cause__)
    )
    theirs = SyncVectorEnv([Faulty] * 4)
    assert_same(envs.reset(seed=1), theirs.reset(seed=1))
    assert_same(envs.step(np.zeros(4, np.int64)), theirs.step(np.zeros(4, np.int64)))


@pytest.mark.parametrize("action", [Faulty.SCALAR, Faulty.LONG, Faulty.TEXT, Faulty.NOTHING])
def test_an_observation_that_sync_vector_env_refuses_is_refused(make: Any, action: int) -> None:
    for envs in (make([Faulty] * 2), SyncVectorEnv([Faulty] * 2)):
        envs.reset()
        with pytest.raises((TypeError, ValueError)):
            envs.step(np.array([action, action]))


def test_what_a_handler_raises_while_infos_are_put_together_is_no_fault_of_theirs(make: Any) -> None:
    raised = TimeoutError("of an alarm")

    def handle() -> None:
        raise raised

    envs = make([Faulty] * 2, num_workers=1)
    for step in each_step(200):
        envs.reset()
        caught = None
        with Tracer(
            handle, step, folders=("gymnasium",), functions=("_hear_step", "note", "_add"), lines=True
        ) as steps:
            try:
                envs.step(np.array([Faulty.LARGE, Faulty.FINE]))
            except Exception as error:
                caught = error
        assert caught is (raised if steps.count >= step else None), f"step {step}: {caught!r}"
        if steps.count < step:
            break
    assert step > 5


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


def test_an_action_that_a_worker_cannot_unpickle_fails_the_step(make: Any) -> None:
    envs = make([Faulty] * 2, context="fork")
    envs.reset()
    with pytest.raises(Exception, match=r"cannot be unpickled|code"):
        envs.set_attr("value", Keyword(code=1))
    assert envs.step(np.zeros(2, np.int64))[1].tolist() == [0, 0]


@pytest.mark.parametrize("where", [0, 3])
def test_an_action_that_cannot_be_pickled_is_told_and_the_environments_go_on(make: Any, where: int) -> None:
    envs = make([Faulty] * 4, num_workers=4)
    envs.reset()
    actions: list[Any] = [0] * 4
    actions[where] = lambda: None
    with pytest.raises(Exception, match=r"lambda|local object"):
        envs.step(actions)
    with pytest.raises(Exception, match=r"lambda|local object"):
        envs.call("has_wrapper_attr", lambda: None)
    assert envs.reset(seed=1)[0].shape == (4, 2)
    assert envs.step([Faulty.FINE] * 4)[1].tolist() == [0] * 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finaliser, from which none leads
def test_a_handler_may_raise_anywhere_and_the_environments_go_on(make: Any) -> None:
    """What a call was told that was interrupted, no later call is told."""
    envs, theirs = make([Nested] * 4, num_workers=2), SyncVectorEnv([Nested] * 4)
    envs.action_space.seed(0)
    actions = envs.action_space.sample()
    hits, rng = 0, random.Random(0)
    old = signal.signal(signal.SIGALRM, hit)
    try:
        for _ in range(200):
            hits += interrupted(rng.uniform(1e-5, 2e-3), lambda: (envs.reset(seed=2), envs.step(actions)))
            for end in (envs.reset_wait, envs.step_wait):
                with contextlib.suppress(NoAsyncCallError):
                    end()
            assert_same(envs.reset(seed=1), theirs.reset(seed=1))
            assert_same(envs.step(actions), theirs.step(actions))
    finally:
        signal.signal(signal.SIGALRM, old)
    assert hits > 10


class Hit(BaseException):
    """What the signal handler raises."""


def hit(*_: object) -> None:
    raise Hit


def interrupted(seconds: float, call: Any) -> bool:
    """Whether a call was interrupted, after so many seconds."""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Hit:
        return True
    return False


class Parent(Faulty):
    """Starts a process by multiprocessing."""

    def __init__(self) -> None:
        super().__init__()
        process = multiprocessing.Process(target=print)
        process.start()
        process.join()


def test_only_workers_that_are_no_daemons_may_start_processes(make: Any) -> None:
    assert make([Parent], daemon=False).reset()[0].shape == (1, 2)
    with pytest.raises(AssertionError, match="daemonic processes"):
        make([Parent])


def test_bad_arguments_are_named(make: Any) -> None:
    for argument in ("num_workers", "batch_size"):
        for value, error, text in [
            (0, ValueError, "=0 must be at least 1"),
            (-1, ValueError, "=-1 must be at least 1"),
            (3, ValueError, "=3 must be at most 2, the number of env_fns"),
            (1.0, TypeError, "=1.0 must be an int, not float"),
            ("2", TypeError, "='2' must be an int, not str"),
            (True, TypeError, "=True must be an int, not a bool"),
        ]:
            with pytest.raises(error, match=argument + text):
                RingVectorEnv([Faulty] * 2, **{argument: value})
    for options, text in [
        ({"worker": print}, "`worker` is not offered"),
        ({"max_concurrency": 0}, "`max_concurrency` must be a positive integer or None, got 0"),
        ({"max_concurrency": 1.5}, "`max_concurrency` must be a positive integer or None, got 1.5"),
        ({"batch_size": 1, "num_workers": 1}, "batch_size=1 takes a worker for each of the 2 environments"),
        ({"batch_size": 1, "max_concurrency": 1}, "batch_size=1 takes a worker for each of the 2 environments"),
        ({"observation_mode": "other"}, "Invalid `observation_mode`"),
    ]:
        with pytest.raises(ValueError, match=text):
            RingVectorEnv([Faulty] * 2, **options)
    with pytest.raises(ValueError, match="env_fns is empty"):
        RingVectorEnv([])
    for env_fns in (Faulty, [Faulty, Faulty()], (Faulty for _ in range(2)), None):
        with pytest.raises(TypeError, match=r"env_fns.* must be a list of functions that make environments"):
            RingVectorEnv(env_fns)
    with pytest.raises(ValueError, match="Nonsense"):
        RingVectorEnv([Faulty], autoreset_mode="Nonsense")
    envs = make([Faulty] * 2)
    for call, error, text in [
        (lambda: envs.reset(seed=[1]), ValueError, "1 seeds for 2 environments"),
        (lambda: envs.step(np.zeros(3, np.int64)), ValueError, "3 actions for 2 environments"),
        (lambda: envs.step([0]), ValueError, "1 actions for 2 environments"),
        (lambda: envs.call("reset"), ValueError, "use `reset` directly instead"),
        (lambda: envs.recv(), ValueError, "need `batch_size`"),
        (lambda: envs.async_reset(), ValueError, "need `batch_size`"),
        (lambda: envs.send([0], [0]), ValueError, "need `batch_size`"),
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


class Holder(Faulty):
    """Tells of a channel of its own, which it has closed."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        *told, info = super().step(Faulty.FINE)
        with Channel(2, 64) as info["channel"]:
            pass
        return (*told, info)  # type: ignore[return-value]


def test_an_info_that_holds_a_closed_channel_fails_its_step_and_no_more(make: Any) -> None:
    envs = make([Holder] * 2, num_workers=1)
    envs.reset()
    with pytest.raises(ChannelClosed) as raised:
        envs.step(np.zeros(2, np.int64))
    assert "an answer of the environments from 0 on failed" in str(raised.value.__cause__)
    assert envs.reset()[0].shape == (2, 2)


def test_a_command_that_takes_long_to_send_is_sent(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_SLICE_SECONDS", 0.0005)
    envs = make([Faulty] * 2, num_workers=1)
    weights = np.arange(1_000_000)
    envs.set_attr("weights", weights)
    assert all(np.array_equal(given, weights) for given in envs.get_attr("weights"))


@pytest.mark.filterwarnings("ignore:.*Calling `close` while waiting")
def test_a_close_that_was_interrupted_can_be_made_again(make: Any) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupt

    begun = multiprocessing.get_context("fork").Event()

    class Slow(Faulty):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            begun.set()
            time.sleep(1)
            return super().step(action)

    envs = make([Slow], context="fork")
    envs.reset()
    envs.step_async(np.zeros(1, np.int64))
    assert begun.wait(60)
    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(Interrupt):
            envs.close()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    envs.close()
    assert envs.closed
    assert not multiprocessing.active_children()
