"""With `batch_size`, `recv` gives the environments that are ready first; each plays as it does in `SyncVectorEnv`."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import numpy as np
import pytest
from support.workers import may_fork

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")
pytestmark = may_fork

from gymnasium.error import (  # noqa: E402
    AlreadyPendingCallError,
    ClosedEnvironmentError,
    NoAsyncCallError,
    ResetNeeded,
)
from gymnasium.vector import SyncVectorEnv  # noqa: E402
from support.environments import MODES, Faulty, Loose, Nested, assert_same, cartpole  # noqa: E402


def gated(opens: Any) -> Any:
    """An environment whose steps wait until that event is set."""

    class Gated(Faulty):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            opens.wait()
            return super().step(action)

    return Gated


def rows(batch: Any, row: int) -> Any:
    """What a batch of observations has of one environment, as a batch of one."""
    if isinstance(batch, dict):
        return {key: rows(part, row) for key, part in batch.items()}
    if isinstance(batch, tuple) and not isinstance(batch[0], str):
        return tuple(rows(part, row) for part in batch)
    return batch[row : row + 1]


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode.name)
@pytest.mark.parametrize("maker", [cartpole, Nested])
def test_each_environment_plays_as_in_sync_vector_env(make: Any, maker: Any, mode: Any) -> None:
    count, size = 5, 2
    ours = make([maker] * count, batch_size=size, autoreset_mode=mode)
    theirs = [SyncVectorEnv([maker], autoreset_mode=mode) for _ in range(count)]
    for i, env in enumerate(theirs):
        env.action_space.seed(i)
    ours.async_reset(seed=7)
    expected: list[Any] = []
    for i, env in enumerate(theirs):
        observations, infos = env.reset(seed=7 + i)
        expected.append((observations, np.zeros(1), np.zeros(1, np.bool_), np.zeros(1, np.bool_), infos))
    for _ in range(300):
        *batch, infos = ours.recv()
        env_ids = infos.pop("env_id")
        assert len({*env_ids.tolist()}) == size
        actions = []
        for row, i in enumerate(env_ids):
            *parts, its_infos = expected[i]
            for our, their in zip(batch, parts, strict=True):
                assert_same(rows(our, row), their, f"environment {i}")
            for key in [key for key in its_infos if key.startswith("_")]:
                assert infos[key][row]
            action = theirs[i].action_space.sample()
            actions.append(action)
            expected[i] = theirs[i].step(action)
        together = (
            {key: np.concatenate([one[key] for one in actions]) for key in actions[0]}
            if isinstance(actions[0], dict)
            else np.concatenate(actions)
        )
        ours.send(together, env_ids)
    for env in theirs:
        env.close()


def test_nobody_waits_for_the_slowest(make: Any) -> None:
    opens = multiprocessing.Event()
    envs = make([gated(opens), Faulty, Faulty, Faulty], batch_size=3)
    envs.reset()
    envs.send(np.array([9, 10, 11, 12]) * 0, np.arange(4))
    assert sorted(envs.recv()[-1]["env_id"]) == [1, 2, 3]
    envs.send([0, 0], [3, 1])
    with pytest.raises(multiprocessing.TimeoutError):
        envs.recv(timeout=0.1)
    opens.set()
    assert sorted(envs.recv(timeout=60)[-1]["env_id"]) == [0, 1, 3]
    assert envs.step(np.zeros(4, np.int64))[1].tolist() == [0, 0, 0, 0]


def test_infos_and_loose_parts_are_those_of_the_environments_in_the_batch(make: Any) -> None:
    envs = make([Loose] * 3, batch_size=2)
    envs.async_reset(seed=1)
    *_, infos = envs.recv()
    envs.send(("ab", "c"), infos["env_id"])
    seen = {}
    for _ in range(2):
        observations, _, _, _, infos = envs.recv()
        assert len(observations["text"]) == len(observations["pair"][0]) == len(observations["fixed"]) == 2
        for row, i in enumerate(infos["env_id"].tolist()):
            seen[i] = infos["action"][row] if "action" in infos and infos["_action"][row] else None
        if len(seen) < 3:
            envs.send(("d",), infos["env_id"][:1])
    assert {"ab", "c"} & {*seen.values()}


def test_an_environment_that_fails_is_told_and_the_others_are_received(make: Any) -> None:
    envs = make([Faulty] * 3, batch_size=2)
    envs.reset()
    envs.send([Faulty.RAISE, 0, 0], [0, 1, 2])
    with pytest.raises(ZeroDivisionError) as caught:
        while True:
            envs.recv()
            envs.send([0, 0], [1, 2])
    assert "environment 0 failed" in str(caught.value.__cause__)
    envs.async_reset(options={"reset_mask": np.array([True, False, False])})
    seen = set()
    while seen != {0, 1, 2}:
        env_ids = envs.recv()[-1]["env_id"].tolist()
        seen.update(env_ids)
        envs.send([0] * len(env_ids), env_ids)


def test_a_worker_that_is_killed_is_told_and_the_others_are_received(make: Any) -> None:
    envs = make([Faulty] * 3, batch_size=2)
    pids = envs.get_attr("pid")
    envs.reset()
    os.kill(pids[1], signal.SIGKILL)
    envs.send([0, 0, 0], [0, 1, 2])
    with pytest.raises(RuntimeError, match=rf"process {pids[1]} \(environment 1\) was killed by signal 9"):
        while True:
            env_ids = envs.recv()[-1]["env_id"]
            envs.send([0] * len(env_ids), env_ids)
    for _ in range(3):
        assert sorted(envs.recv()[-1]["env_id"]) == [0, 2]
        envs.send([0, 0], [0, 2])
    with pytest.raises(NoAsyncCallError, match="for 2 environments while 1 are at work"):
        envs.recv(), envs.send([0], [0]), envs.recv()


def test_what_cannot_be_is_refused(make: Any) -> None:
    envs = make([Faulty] * 3, batch_size=2)
    with pytest.raises(NoAsyncCallError, match="for 2 environments while 0 are at work: call `async_reset`"):
        envs.recv()
    envs.async_reset()
    for call in (envs.async_reset, lambda: envs.send([0], [1]), lambda: envs.step([0, 0, 0])):
        with pytest.raises(AlreadyPendingCallError):
            call()
    for env_ids in ([3], [-1], [0, 0]):
        with pytest.raises(ValueError, match="must be different numbers from 0 to 2"):
            envs.send([0] * len(env_ids), env_ids)
    for env_ids in (0, [0.0], [True], ["0"], [[0]], None):
        with pytest.raises(TypeError, match=r"env_ids=.* must be a list or an array of ints"):
            envs.send([0], env_ids)
    for actions in (0, np.int64(0), np.array(0)):
        with pytest.raises(TypeError, match="Unable to iterate over"):
            envs.send(actions, [0])
    with pytest.raises(ValueError, match="1 actions for 2 environments"):
        envs.send([0], [0, 1])
    for timeout, error in (("1", TypeError), (-1, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match=r"timeout=.* must"):
            envs.recv(timeout=timeout)
    assert len(envs.recv()[-1]["env_id"]) == 2
    envs.close()
    for call in (envs.recv, envs.async_reset, lambda: envs.send(None, None), lambda: envs.step(None)):
        with pytest.raises(ClosedEnvironmentError):
            call()


def test_actions_of_a_dict_space_may_be_one_for_each_environment(make: Any) -> None:
    envs, theirs = make([Nested] * 3, batch_size=2), SyncVectorEnv([Nested] * 3)
    envs.action_space.seed(1)
    actions = envs.action_space.sample()
    of_each = [{key: part[i] for key, part in actions.items()} for i in range(3)]
    envs.reset(seed=1)
    theirs.reset(seed=1)
    expected = theirs.step(actions)
    assert_same(envs.step(of_each), expected)
    envs.reset(seed=1)
    envs.send(tuple(of_each[1:]), [1, 2])
    _, rewards, *_, infos = envs.recv()
    assert_same(rewards, expected[1][infos["env_id"]])


def test_reset_begins_anew_amid_partial_batches_and_after_a_failure(make: Any) -> None:
    envs = make([Faulty] * 4, batch_size=3)
    envs.async_reset()
    assert len(envs.recv()[-1]["env_id"]) == 3
    assert envs.reset()[0].shape == (4, 2)
    envs.step(np.zeros(4, np.int64))
    envs.send(np.array([Faulty.RAISE, 0, 0]), np.arange(3))
    with pytest.raises(ZeroDivisionError):
        envs.recv()
    assert envs.reset()[0].shape == (4, 2)
    envs.step(np.zeros(4, np.int64))


def test_a_call_that_is_refused_loses_nothing_of_partial_batches(make: Any) -> None:
    envs = make([Faulty] * 3, batch_size=2)
    envs.reset()
    envs.send([17, 18, 19], [0, 1, 2])
    for wrong in ({"seed": "none"}, {"seed": [1]}, {"options": {"reset_mask": np.array([False] * 3)}}):
        with pytest.raises((TypeError, ValueError)):
            envs.reset(**wrong)
    _, rewards, _, _, infos = envs.recv()
    one = infos["env_id"][:1]
    with pytest.raises(Exception, match=r"lambda|local object"):
        envs.send([lambda: None], one)
    envs.send([0], one)
    assert sorted([*rewards, *envs.recv()[1]]) == [0, 17, 18, 19]


def test_where_all_have_failed_nobody_is_waited_for(make: Any) -> None:
    envs = make([Faulty] * 2, batch_size=1)
    envs.reset()
    envs.send([Faulty.RAISE, Faulty.RAISE], [0, 1])
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            envs.recv()
    envs.send([], [])
    assert envs.step([0, 19])[1].tolist() == [0, 19]


def test_an_info_with_a_key_of_recvs_own_is_an_error(make: Any) -> None:
    class Named(Faulty):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return (*super().step(action)[:4], {"env_id": 7})

    envs = make([Faulty, Named], batch_size=1)
    envs.reset()
    envs.send([0], [1])
    with pytest.raises(RuntimeError, match=r"\(environment 1\) .*a key 'env_id', where recv gives the numbers"):
        envs.recv()
    envs.send([0], [0])
    assert envs.recv()[-1]["env_id"] == [0]


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("call", ["recv", "step_wait"])
def test_after_an_interrupt_a_call_that_waits_says_what_begins_anew(make: Any, call: str) -> None:
    opens = multiprocessing.get_context("fork").Event()

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    envs = make([gated(opens)] * 2, batch_size=2)
    envs.reset()
    begin = (lambda: envs.send([0, 0], [0, 1])) if call == "recv" else (lambda: envs.step_async([0, 0]))
    begin()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            getattr(envs, call)()
    finally:
        signal.signal(signal.SIGALRM, before)
    begins_anew = r"was interrupted, .* `reset` or `async_reset` begins anew"
    with pytest.raises(NoAsyncCallError, match=begins_anew):
        getattr(envs, call)()
    opens.set()
    for _ in range(2):  # what they have told was lost
        with pytest.raises(ResetNeeded, match=begins_anew):
            begin()
        envs.get_attr("pid")
    envs.async_reset()
    assert sorted(envs.recv()[-1]["env_id"]) == [0, 1]


def test_an_environment_whose_answer_no_recv_has_given_is_not_ready(make: Any) -> None:
    opens = multiprocessing.get_context("fork").Event()
    envs = make([gated(opens)] * 3, batch_size=2, context="fork")
    envs.async_reset()
    told = set(envs.recv()[-1]["env_id"])
    (last,) = {0, 1, 2} - told
    at_work = min(told)
    envs.send(np.zeros(1, np.int64), [at_work])
    with pytest.raises(multiprocessing.TimeoutError, match="call to `recv` has timed out"):
        envs.recv(timeout=0.5)
    with pytest.raises(AlreadyPendingCallError):
        envs.send(np.zeros(1, np.int64), [last])
    opens.set()
    assert sorted(envs.recv()[-1]["env_id"]) == sorted([at_work, last])
