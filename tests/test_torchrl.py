"""TorchRL's collectors get their weights by ringshm: whole, in versions, whoever comes late or dies."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
import warnings
from typing import Any

import pytest
from support.workers import Crew, exit_code, fork_off, may_fork

import ringshm
from ringshm import ChannelNotFound, EndOfChannel, SpecMismatch

torch: Any = pytest.importorskip("torch")
pytest.importorskip("torchrl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchRL's, of what it will drop
    from tensordict import TensorDict
    from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
    from torchrl.weight_update import WeightSyncScheme

    from perf.torn_weights import Still, next_version, policy_that_looks
    from ringshm.torchrl import LatestWeightSyncScheme

pytestmark = [may_fork, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

SIDE = 64


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # a forked child cannot use its parent's


def _policy(number: float = 0.0) -> Any:
    policy = policy_that_looks(SIDE)
    for weight in policy.parameters():
        weight.data.fill_(number)
    return policy


def _sender(policy: Any, **options: Any) -> Any:
    scheme = LatestWeightSyncScheme(**options)
    scheme.init_on_sender(model_id="policy", model=policy)
    scheme.connect()
    return scheme


def _receiver(scheme: Any, policy: Any) -> Any:
    scheme.init_on_receiver(model_id="policy", model=policy, worker_idx=0)
    scheme.connect(worker_idx=0)
    return scheme


def _seen(policy: Any) -> tuple[float, float]:
    least, greatest = policy(TensorDict({"observation": torch.zeros(1)}, []))["action"].tolist()
    return least, greatest


# --- in collectors


def test_each_batch_of_a_synchronous_collector_is_by_the_newest_weights() -> None:
    policy = _policy()
    scheme = WeightSyncScheme.from_backend("ringshm")
    assert type(scheme) is LatestWeightSyncScheme
    collector = MultiSyncCollector(
        [Still] * 2, policy, frames_per_batch=10, total_frames=-1, weight_sync_schemes={"policy": scheme}
    )
    try:
        for version, batch in enumerate(collector):
            assert batch["action"].unique().tolist() == [version]
            if version == 5:
                break
            next_version(policy)
            collector.update_policy_weights_()
            states = collector.state_dict()
            for weight in [*states["worker0"]["policy_state_dict"].values()]:
                assert weight.unique().tolist() == [version + 1]
    finally:
        collector.shutdown()
        scheme.shutdown()


def test_no_forward_of_an_asynchronous_collector_sees_two_versions() -> None:
    policy, scheme, last = policy_that_looks(256), LatestWeightSyncScheme(), 0.0
    collector = MultiAsyncCollector(
        [Still] * 2, policy, frames_per_batch=20, total_frames=-1, weight_sync_schemes={"policy": scheme}
    )
    try:
        for version, batch in enumerate(collector):
            least, greatest = batch["action"].unbind(-1)
            assert least.equal(greatest)
            assert least.equal(least.sort().values)  # never an older one again
            last = float(least[-1])
            assert last <= version
            if version == 60:
                break
            next_version(policy)
            collector.update_policy_weights_()
    finally:
        collector.shutdown()
        scheme.shutdown()
    assert last > 20  # they follow


def test_a_collector_of_ones_own_counts_the_versions_that_it_got() -> None:
    sent = _policy()
    scheme = _sender(sent)
    receiver = pickle.loads(pickle.dumps(scheme))
    collector = Collector(
        Still, _policy(7), frames_per_batch=5, total_frames=-1, weight_recv_schemes={"policy": receiver},
        track_policy_version=True,
    )  # fmt: skip
    try:
        for number, batch in enumerate(collector):
            assert batch["action"].unique().tolist() == [number]
            if number == 3:
                break
            next_version(sent)
            scheme.send(sent)
        assert collector.policy_version == 3
    finally:
        collector.shutdown()
        receiver.shutdown()
        scheme.shutdown()


# --- whoever comes and goes


def test_who_comes_late_gets_the_newest() -> None:
    sent = _policy(1)
    scheme = _sender(sent, name="late")
    for number in (2.0, 3.0):
        scheme.send(_policy(number))
    for newcomer in (pickle.loads(pickle.dumps(scheme)), LatestWeightSyncScheme(name="late")):
        policy = _policy()
        receiver = _receiver(newcomer, policy)
        assert [float(weight.detach().mean()) for weight in policy.parameters()] == [3.0] * 6
        assert receiver.receive(timeout=0) is None
        scheme.send(_policy(4))
        assert receiver.receive(timeout=0)["module", "layers", "0"].unique().tolist() == [4.0]
        scheme.send(_policy(3))
        assert _seen(policy) == (3.0, 3.0)
        receiver.shutdown()
    scheme.shutdown()
    with pytest.raises(ChannelNotFound, match="late"):
        LatestWeightSyncScheme(name="late").init_on_receiver(model_id="policy", model=_policy())


@pytest.mark.parametrize("moment", ["before the first weights", "later"])
def test_a_dead_publisher_is_told(moment: str) -> None:
    with ringshm.Channel(1, 100) as ready:

        def publish() -> None:
            scheme = LatestWeightSyncScheme(name="dies")
            scheme.init_on_sender(model_id="policy", model=_policy(1))
            if moment == "later":
                scheme.connect()
            ready.put(None)
            time.sleep(100)

        publisher = fork_off(publish)
        ready.get(timeout=50)
        policy, receiver = _policy(), LatestWeightSyncScheme(name="dies")
        receiver.init_on_receiver(model_id="policy", model=policy, worker_idx=0)
        if moment == "later":
            receiver.connect()
        os.kill(publisher, signal.SIGKILL)
        exit_code(publisher)
        if moment != "later":
            receiver.connect()  # the first ones were sent when it was initialised
        assert _seen(policy) == (1.0, 1.0)
        for timeout in (50, None):
            with pytest.raises(EndOfChannel, match="'dies' has no publisher any more"):
                receiver.receive(timeout=timeout)
        assert receiver.receive(timeout=0) is None
        receiver.shutdown()


def _follow(scheme: Any, side: int, until: float) -> int:
    policy = policy_that_looks(side)
    receiver, forwards, seen = _receiver(scheme, policy), 0, 0.0
    while seen < until:
        least, seen = _seen(policy)
        assert least == seen
        forwards += 1
    receiver.shutdown()
    return forwards


def test_a_reader_that_is_killed_amid_a_read_disturbs_nobody() -> None:
    policy = policy_that_looks(256)
    scheme = _sender(policy)
    with Crew("fork") as crew:
        steady = crew.start(_follow, scheme, 256, 200.0)
        victim = fork_off(lambda: _follow(scheme, 256, 1e9))
        for number in range(1, 201):
            next_version(policy)
            scheme.send(policy)
            if number % 20 == 0:
                time.sleep(0.02)  # it reads
                os.kill(victim, signal.SIGKILL)
                assert exit_code(victim) == -signal.SIGKILL
                victim = fork_off(lambda: _follow(scheme, 256, 1e9))
        os.kill(victim, signal.SIGKILL)
        exit_code(victim)
        assert steady.result() > 0
    scheme.shutdown()


# --- weights of any kind


class _Mixed(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.BatchNorm1d(8))
        self.last = torch.nn.Linear(8, 2).to(torch.bfloat16)

    def forward(self, x: Any) -> Any:
        return self.last(self.net(x).to(torch.bfloat16))


@pytest.mark.filterwarnings("ignore:state_dict strategy is experimental")
@pytest.mark.parametrize("strategy", ["tensordict", "state_dict"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_all_weights_and_buffers_arrive(strategy: str, device: str) -> None:
    sent, mine = _Mixed(1), _Mixed(2).to(device)
    scheme = _sender(sent, strategy=strategy)
    receiver = _receiver(pickle.loads(pickle.dumps(scheme)), mine)
    for version in range(3):
        assert mine.state_dict().keys() == sent.state_dict().keys()
        for name, value in mine.state_dict().items():
            assert value.equal(sent.state_dict()[name]), name
        assert all(weight.requires_grad for weight in mine.parameters())
        sent(torch.randn(5, 4)).sum().backward()
        torch.optim.SGD(sent.parameters(), 0.1).step()
        scheme.send((None, sent.state_dict(), TensorDict.from_module(sent))[version])
    receiver.shutdown()
    scheme.shutdown()


def test_copies_of_a_policy_are_left_alone() -> None:
    sent, mine = _policy(1), _policy()
    scheme = _sender(sent)
    receiver = _receiver(pickle.loads(pickle.dumps(scheme)), mine)
    copies = [copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))]
    scheme.send(_policy(2))
    assert [_seen(policy) for policy in (mine, *copies)] == [(2.0, 2.0), (1.0, 1.0), (1.0, 1.0)]
    receiver.model = copies[0]  # as TorchRL does, if it has copied the policy
    scheme.send(_policy(3))
    assert [_seen(policy) for policy in (mine, *copies)] == [(2.0, 2.0), (3.0, 3.0), (1.0, 1.0)]
    receiver.shutdown()
    scheme.send(_policy(4))
    assert _seen(copies[0]) == (3.0, 3.0)
    scheme.shutdown()


def test_what_cannot_be_sent_is_told_and_changes_nothing() -> None:
    sent, mine = _policy(1), _policy()
    scheme = _sender(sent)
    receiver = _receiver(pickle.loads(pickle.dumps(scheme)), mine)
    for weights, workers, error, text in (
        (policy_that_looks(SIDE + 1), None, SpecMismatch, r"'module\.layers\.0' holds a tensor of float32 \(64, 64\)"),
        (_Mixed(0), None, SpecMismatch, r"field 'module' is missing"),
        (3, None, TypeError, "weights are a int: give a module"),
        ({0: TensorDict({}, [])}, None, ValueError, "ringshm sends the same weights to all"),
        (_policy(2), [], ValueError, r"worker_ids=\[\] leaves workers out"),
    ):
        with pytest.raises(error, match=text):
            scheme.send(weights, worker_ids=workers)
        assert receiver.receive(timeout=0) is None
    assert _seen(mine) == (1.0, 1.0)
    receiver.shutdown()
    scheme.shutdown()
    for options, error, text in (
        ({"model": len}, TypeError, "sends the weights of a torch.nn.Module"),
        ({"model": torch.nn.ReLU()}, ValueError, "'policy' has no weights: a policy without weights needs no scheme"),
        ({"params_map": {0: TensorDict({"a": torch.ones(1)}), 1: TensorDict({"a": torch.ones(1)})}}, ValueError, "own"),
    ):
        with pytest.raises(error, match=text):
            LatestWeightSyncScheme().init_on_sender(model_id="policy", **options)
    with pytest.raises(RuntimeError, match="has no sender: init_on_sender comes first"):
        LatestWeightSyncScheme().init_on_receiver(model_id="policy", model=mine)
