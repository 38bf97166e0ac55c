"""TorchRL's collectors and losses, joined by ringshm: CartPole-v1 by PPO, while a collector is killed and replaced.

Each collector is a TorchRL `Collector` in a process of its own. It gets the policy's weights by the backend "ringshm",
whole and in versions: before each step the newest. Its rollouts, TensorDicts, go through one channel; the learner takes
several of them as one TensorDict, of batch size [rollouts, steps], as TorchRL's estimators of advantages want them.

    python examples/torchrl_ppo.py --collectors 2

After `--kill-after` updates the learner kills a collector with SIGKILL, and starts another: nothing but the rate
changes. It ends when the last 100 episodes returned 475 on average, or after so many `--updates`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import queue
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from children import end, replaced, start
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, RewardSum, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import ringshm
import ringshm.torch
from ringshm.torchrl import LatestWeightSyncScheme

SOLVED = 475.0  # mean return of the last 100 episodes: CartPole-v1's own threshold
STEPS = 128  # of a rollout
ROLLOUTS = 16  # of an update
EPOCHS, MINIBATCH = 10, 512
LEARNING_RATE, CLIP, GAMMA, LAMBDA = 1e-3, 0.2, 0.99, 0.95


def make_env(seed: int) -> Any:
    """CartPole, with each episode's return so far."""
    env = TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=True), RewardSum())
    env.set_seed(seed)
    return env


def network(outputs: int) -> Any:
    """A network for observations, with so many outputs."""
    return MLP(4, outputs, num_cells=[64, 64], activation_class=torch.nn.Tanh)


def make_policy() -> Any:
    """The policy: the logits of both actions, and an action drawn by them."""
    return ProbabilisticActor(
        TensorDictModule(network(2), in_keys=["observation"], out_keys=["logits"]), in_keys=["logits"],
        out_keys=["action"], distribution_class=torch.distributions.Categorical, return_log_prob=True,
    )  # fmt: skip


def keys_of(policy: Any) -> list[Any]:
    """What a collector sends of its rollouts."""
    below = ["observation", "reward", "done", "terminated", "episode_reward"]
    return ["observation", "action", policy.log_prob_keys[0], "done", "terminated", *[("next", name) for name in below]]


def collect(scheme: LatestWeightSyncScheme, rollouts: ringshm.Sender, seed: int) -> None:
    """A collector's process, which ends when the learner has gone."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    policy = make_policy()
    keys = keys_of(policy)
    ends = (ringshm.BrokenChannel, ringshm.ChannelClosed, ringshm.ChannelNotFound, ringshm.EndOfChannel)
    with contextlib.suppress(*ends), rollouts:
        collector = Collector(
            partial(make_env, seed), policy, frames_per_batch=STEPS, total_frames=-1,
            weight_recv_schemes={"policy": scheme}, auto_register_policy_transforms=False,
        )  # fmt: skip
        for rollout in collector:
            rollouts.put(rollout.select(*keys))


class Learner:
    """The policy, the losses, and the optimiser."""

    def __init__(self, policy: Any) -> None:
        value = ValueOperator(network(1), in_keys=["observation"])
        self.advantage = GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=value, average_gae=True)
        self.loss = ClipPPOLoss(policy, value, clip_epsilon=CLIP, entropy_coeff=0.01, normalize_advantage=False)
        self.loss.set_keys(sample_log_prob=policy.log_prob_keys[0])
        self.optimiser = torch.optim.Adam(self.loss.parameters(), LEARNING_RATE)

    def update(self, rollouts: Any) -> None:
        """Improve the policy by rollouts of batch size [n, steps]."""
        with torch.no_grad():
            self.advantage(rollouts)
        steps = rollouts.reshape(-1)
        for _ in range(EPOCHS):
            for part in steps[torch.randperm(len(steps))].split(MINIBATCH):
                losses = self.loss(part)
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                self.optimiser.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
                self.optimiser.step()


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="TorchRL's PPO with collectors that get their weights by ringshm.")
    parser.add_argument("--collectors", type=int, default=2, metavar="N")
    parser.add_argument("--updates", type=int, default=0, metavar="N", help="as many, solved or not; 0: until solved")
    parser.add_argument("--kill-after", type=int, default=10, metavar="N", help="updates; 0: none is killed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.collectors < 1 or args.updates < 0 or args.kill_after < 0:
        parser.error("--collectors must be at least 1, --updates and --kill-after not negative")
    try:
        return train(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def train(args: argparse.Namespace) -> int:
    """Collect and learn until it is solved; gives the exit status."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    policy = make_policy()
    learner = Learner(policy)
    env = make_env(args.seed)
    with torch.no_grad():
        example = env.rollout(STEPS, policy, break_when_any_done=False).select(*keys_of(policy))
    env.close()
    scheme = LatestWeightSyncScheme()
    scheme.init_on_sender(model_id="policy", model=policy)
    scheme.connect()  # the first weights
    seeds = itertools.count(args.seed * 1000 + 1)
    returns: collections.deque[float] = collections.deque(maxlen=100)
    restarts, updates, began = 0, 0, time.monotonic()
    with ringshm.Channel(2 * ROLLOUTS, spec=ringshm.torch.spec(example), keep_open=True) as channel:

        def another() -> Any:
            return start(collect, scheme, channel.sender(), next(seeds))

        collectors = [another() for _ in range(args.collectors)]
        try:
            while not (len(returns) == 100 and sum(returns) / 100 >= SOLVED) and updates != (args.updates or -1):
                try:
                    rollouts = channel.get_batch(ROLLOUTS, timeout=1)
                except queue.Empty:
                    rollouts = None
                for k, process in enumerate(collectors):
                    collectors[k] = replaced(process, another, f"collector {k}")
                    restarts += collectors[k] is not process
                if rollouts is None:
                    continue
                following = rollouts["next"]
                returns += following["episode_reward"][following["done"]].tolist()
                learner.update(rollouts)
                scheme.send(policy)
                updates += 1
                if updates % 10 == 0 and returns:
                    steps, mean = updates * ROLLOUTS * STEPS, sum(returns) / len(returns)
                    print(f"{updates} updates, {steps:,} steps, mean return {mean:.1f}", flush=True)
                if updates == args.kill_after:
                    collectors[0].kill()
                    collectors[0].join()
        finally:
            for process in collectors:
                process.kill()  # at any moment, also while it starts
            end(collectors)
            scheme.shutdown()
    solved = len(returns) == 100 and sum(returns) / 100 >= SOLVED
    print(
        f"{'solved' if solved else 'ended'}: mean return {sum(returns) / max(1, len(returns)):.1f} over the last "
        f"{len(returns)} episodes, {updates} updates, {updates * ROLLOUTS * STEPS:,} steps, restarts {restarts}, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
