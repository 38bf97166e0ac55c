"""Actors and a learner in processes of their own, joined by ringshm: CartPole-v1 is solved in seconds.

Each actor plays a few environments at once and sends what it saw, trajectory by trajectory, over one channel that
all actors share. The learner takes them in batches, improves the policy by PPO (plain NumPy, gradients by hand) and
sends the new weights back, to each actor over a small channel of its own in which only the newest matter.

    python examples/actor_learner.py --actors 2 --seed 0 --plot curve.png

It ends when the last 100 episodes returned 475 on average (exit 0), or after `--max-seconds` (exit 1). Two things
to try meanwhile: Ctrl-C (everybody goes, nothing is left in /dev/shm), and `kill -9` on an actor (the learner's
process starts another, and nothing but the rate suffers).

What to look for as a user of ringshm: `Actors` (how the channels are made, handed over and ended), `act` (the whole
of an actor) and `train` (the whole of the learner's loop). What lies between is reinforcement learning.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import os
import queue
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

# These matrices are tiny: BLAS threads would only take the cores from the actors. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import gymnasium
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import ringshm

SOLVED = 475.0  # mean return over the last 100 episodes, CartPole-v1's own threshold
ENVS = 8  # environments that an actor plays side by side
STEPS = 32  # steps in each of them that make one trajectory
BATCH = 8  # trajectories that the learner takes for one update
CAPACITY = 8  # slots: one batch waits at most, so that nobody learns from what is long out of date
SLOT_SIZE = "16KiB"  # a trajectory needs about 8 KiB
WEIGHTS_CAPACITY = 2  # only the newest weights matter; one slot may just be being read
WEIGHTS_SLOT_SIZE = "32KiB"  # a policy needs about 18 KiB

GAMMA, LAMBDA = 0.99, 0.95  # discount, and how far advantages look ahead (GAE)
CLIP = 0.2  # how far one update may move the probability of an action
EPOCHS, MINIBATCH = 4, 512
LEARNING_RATE, ANNEAL_STEPS = 3e-3, 400_000  # falls to a tenth over so many environment steps
SCALE = np.array([1 / 2.4, 1 / 2, 1 / 0.21, 1 / 2], np.float32)  # brings observations to about [-1, 1]

Array = NDArray[Any]
Weights = list[Array]  # weight, bias, weight, bias, ... of a network's layers


class Trajectory(NamedTuple):
    """What an actor sends: `STEPS` steps (T) of `ENVS` environments (N)."""

    actor: int
    version: int  # of the weights it was played with
    observations: Array  # (T + 1, N, 4) float32: also what followed the last step
    actions: Array  # (T, N) bool
    log_probs: Array  # (T, N) float32, of the actions, when they were chosen
    rewards: Array  # (T, N) float32
    terminated: Array  # (T, N) bool: the pole fell, there is no future
    done: Array  # (T, N) bool: terminated, or cut at the time limit
    played: Array  # (T, N) bool: False where the environment only reset itself
    returns: list[float]  # of the episodes that ended


# The networks: small tanh MLPs.


def init_network(rng: np.random.Generator, sizes: Sequence[int], last_gain: float) -> Weights:
    """Random weights for layers of `sizes`; `last_gain` scales the last layer."""
    weights: Weights = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        gain = last_gain if len(weights) == 2 * (len(sizes) - 2) else 1.0
        weights.append((rng.standard_normal((fan_in, fan_out)) * gain / math.sqrt(fan_in)).astype(np.float32))
        weights.append(np.zeros(fan_out, np.float32))
    return weights


def forward(weights: Weights, observations: Array) -> list[Array]:
    """What each layer gives for `observations` (n, 4), the scaled input first, the output (n, 1) last."""
    layers: list[Array] = [observations * SCALE]
    for i in range(0, len(weights), 2):
        output = layers[-1] @ weights[i] + weights[i + 1]
        layers.append(np.tanh(output) if i + 2 < len(weights) else output)
    return layers


def backward(weights: Weights, layers: list[Array], gradient: Array) -> Weights:
    """The gradients of `weights`, from that of the output (n, 1) and what `forward` gave."""
    gradients: Weights = []
    for i in reversed(range(0, len(weights), 2)):
        layer = layers[i // 2]
        gradients[:0] = [layer.T @ gradient, gradient.sum(axis=0)]
        gradient = (gradient @ weights[i].T) * (1 - layer**2)
    return gradients


class Adam:
    """The optimiser of Kingma and Ba (2015); changes `weights` in place."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.means = [np.zeros_like(w) for w in weights]
        self.squares = [np.zeros_like(w) for w in weights]
        self.count = 0

    def step(self, gradients: Weights, rate: float) -> None:
        self.count += 1
        rate *= math.sqrt(1 - 0.999**self.count) / (1 - 0.9**self.count)
        for weight, gradient, mean, square in zip(
            self.weights, gradients, self.means, self.squares, strict=True
        ):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            weight -= rate * mean / (np.sqrt(square) + 1e-7)


def push_right(logits: Array) -> Array:
    """The policy: the probability of action 1, push to the right."""
    return np.asarray(1 / (1 + np.exp(-logits)))


# The actors' processes.


class Player:
    """`ENVS` environments, played on and on, a trajectory at a time."""

    def __init__(self, actor: int, seed: np.random.SeedSequence) -> None:
        self.actor = actor
        self.rng = np.random.default_rng(seed)
        self.env = gymnasium.make_vec("CartPole-v1", num_envs=ENVS, vectorization_mode="vector_entry_point")
        self.observation, _ = self.env.reset(seed=int(self.rng.integers(2**31)))
        self.done = np.zeros(ENVS, bool)
        self.returns = np.zeros(ENVS)

    def play(self, version: int, policy: Weights) -> Trajectory:
        """The next `STEPS` steps, with this policy."""
        shape = (STEPS, ENVS)
        observations = np.empty((STEPS + 1, ENVS, 4), np.float32)
        log_probs, rewards = np.empty(shape, np.float32), np.empty(shape, np.float32)
        actions, terminated, done, played = (np.empty(shape, bool) for _ in range(4))
        returns: list[float] = []
        for t in range(STEPS):
            observations[t] = self.observation
            played[t] = ~self.done  # an environment that was done takes this step to reset itself
            right = push_right(forward(policy, self.observation)[-1][:, 0])
            actions[t] = self.rng.random(ENVS) < right
            log_probs[t] = np.log(np.where(actions[t], right, 1 - right))
            self.observation, rewards[t], terminated[t], truncated, _ = self.env.step(actions[t].astype(int))
            done[t] = self.done = terminated[t] | truncated
            self.returns += rewards[t]
            returns += self.returns[self.done].tolist()
            self.returns[self.done] = 0
        observations[STEPS] = self.observation
        return Trajectory(
            self.actor, version, observations, actions, log_probs, rewards, terminated, done, played, returns
        )


def act(actor: int, seed: np.random.SeedSequence, weights: Any, trajectories: Any) -> None:
    """An actor's process: play with the newest weights, send what was seen.

    It ends when the learner's process shuts the channels down, and also when that process just dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the learner's decides
    ends = (ringshm.EndOfChannel, ringshm.ChannelClosed, ringshm.BrokenChannel)
    with weights, trajectories, contextlib.suppress(*ends):
        player = Player(actor, seed)
        version, policy = weights.get()
        while True:
            trajectories.put(player.play(version, policy))  # waits while the ring is full
            with contextlib.suppress(queue.Empty):
                version, policy = weights.get_many(WEIGHTS_CAPACITY, timeout=0)[-1]


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block has ended; processes started in the block never hear it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class Actors:
    """The learner's side of the actors: their channels, their processes, and others for those that died."""

    def __init__(self, count: int, seed: int) -> None:
        # keep_open: a channel outlives the actor at its other end, for the one that takes its place.
        self.trajectories = ringshm.Channel(CAPACITY, SLOT_SIZE, keep_open=True)
        self.weights = [
            ringshm.Channel(WEIGHTS_CAPACITY, WEIGHTS_SLOT_SIZE, when_full="drop_oldest", keep_open=True)
            for _ in range(count)
        ]
        self.seed = seed
        self.newest: tuple[int, Weights] = (0, [])
        self.processes: dict[int, SpawnProcess] = {}
        self.restarts = 0
        resource_tracker.ensure_running()  # the first start would do so, and end interrupts_held early

    def __enter__(self) -> Actors:
        return self

    def send_weights(self, version: int, policy: Weights) -> None:
        """Give every actor new weights; older ones that it has not taken are dropped."""
        self.newest = (version, policy)
        for channel in self.weights:
            channel.put(self.newest)

    def start(self, actor: int) -> None:
        """Start a process for this actor, with random numbers that no other ever had."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(actor, self.restarts))
        ends = (self.weights[actor].receiver(), self.trajectories.sender())
        with interrupts_held():
            self.processes[actor] = SpawnProcess(target=act, args=(actor, seed, *ends))
            self.processes[actor].start()
        self.weights[actor].put(self.newest)

    def replace_dead(self) -> list[str]:
        """Start another process for each actor that was killed; says what happened."""
        events = []
        for actor, process in self.processes.items():
            if process.exitcode is None:
                continue
            if process.exitcode >= 0:  # nobody killed it: it has printed why, and so would the next one
                raise RuntimeError(f"actor {actor} ended by itself, with exit code {process.exitcode}")
            self.restarts += 1
            self.start(actor)
            cause = signal.Signals(-process.exitcode).name
            events.append(f"actor {actor} (pid {process.pid}) was killed by {cause}: restarted")
        return events

    def __exit__(self, *exc_info: object) -> None:
        with interrupts_held(), contextlib.ExitStack() as stack:
            for channel in (self.trajectories, *self.weights):
                stack.callback(channel.close)
                channel.shutdown(immediate=True)  # actors that wait there, or come later, are told at once
            for process in self.processes.values():
                process.join(timeout=5)
                process.kill()  # none is left by now, unless it hangs
                process.join()


# The learner's process.


class Learner:
    """Proximal policy optimisation (Schulman et al., 2017) with generalised advantage estimation."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.policy = init_network(self.rng, (4, 64, 64, 1), last_gain=0.01)  # logit of "push right"
        self.value = init_network(self.rng, (4, 64, 64, 1), last_gain=1.0)  # in units of 1 / (1 - GAMMA)
        self.policy_optimiser, self.value_optimiser = Adam(self.policy), Adam(self.value)
        self.version = 0
        self.steps = 0  # taken in the environments

    def update(self, batch: Sequence[Trajectory]) -> None:
        """Learn from a batch, each step of it `EPOCHS` times."""
        observations = np.concatenate([t.observations for t in batch], axis=1)
        actions, old_log_probs, rewards, terminated, done, played = (
            np.concatenate([getattr(t, name) for t in batch], axis=1)
            for name in ("actions", "log_probs", "rewards", "terminated", "done", "played")
        )
        values = forward(self.value, observations.reshape(-1, 4))[-1].reshape(observations.shape[:2])
        # An episode cut at the time limit would have gone on: its last value counts, unlike after a fall.
        deltas = (1 - GAMMA) * rewards + GAMMA * values[1:] * ~terminated - values[:-1]
        advantages = np.zeros_like(deltas)
        following = np.zeros_like(deltas[0])
        for t in reversed(range(STEPS)):
            following = advantages[t] = deltas[t] + GAMMA * LAMBDA * following * ~done[t]
        targets = advantages + values[:-1]
        advantages = (advantages - advantages[played].mean()) / (advantages[played].std() + 1e-8)

        data = [x[played] for x in (observations[:-1], actions, old_log_probs, advantages, targets)]
        count = int(played.sum())
        self.steps += count
        self.version += 1
        rate = LEARNING_RATE * max(0.1, 1 - self.steps / ANNEAL_STEPS)
        for _ in range(EPOCHS):
            order = self.rng.permutation(count)
            for start in range(0, count, MINIBATCH):
                self.learn([x[order[start : start + MINIBATCH]] for x in data], rate)

    def learn(self, minibatch: Sequence[Array], rate: float) -> None:
        """One step of both optimisers."""
        observations, actions, old_log_probs, advantages, targets = minibatch
        layers = forward(self.policy, observations)
        right = push_right(layers[-1][:, 0])
        ratio = np.exp(np.log(np.where(actions, right, 1 - right)) - old_log_probs)
        # The gradient of -min(ratio * advantage, clip(ratio) * advantage): zero where the clipped side is less.
        free = np.where(advantages > 0, ratio < 1 + CLIP, ratio > 1 - CLIP)
        gradient = -(free * ratio * advantages) * (actions - right) / len(actions)
        self.policy_optimiser.step(backward(self.policy, layers, gradient[:, None]), rate)

        layers = forward(self.value, observations)
        gradient = (layers[-1][:, 0] - targets) / len(targets)
        self.value_optimiser.step(backward(self.value, layers, gradient[:, None]), rate)


class Moment(NamedTuple):
    """How things stood when a batch was taken."""

    seconds: float  # since the start
    steps: int  # taken in the environments, so far
    mean_return: float  # of the last 100 episodes
    fill: float  # of the ring of trajectories, 0 to 1
    staleness: float  # by how many updates the batch's weights were behind the learner's


class Progress:
    """Keeps how the run goes, and shows it: live on a terminal, elsewhere as a line every second."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.history = [Moment(0, 0, 0, 0, 0)]
        self.returns: list[float] = []
        self.restarts = 0
        console = Console()
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.next_show = 0.0

    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def add(self, batch: Sequence[Trajectory], fill: float, version: int) -> bool:
        """Take note of a batch; says whether CartPole is solved with it."""
        self.returns += [value for t in batch for value in t.returns]
        steps = self.history[-1].steps + sum(int(t.played.sum()) for t in batch)
        mean_return = float(np.mean(self.returns[-100:] or 0))
        staleness = float(np.mean([version - t.version for t in batch]))
        self.history.append(Moment(self.seconds(), steps, mean_return, fill, staleness))
        return len(self.returns) >= 100 and mean_return >= SOLVED

    def show(self) -> None:
        """Bring the display up to date, when it is time."""
        if self.seconds() < self.next_show:
            return
        self.next_show = self.seconds() + (0.1 if self.live else 1.0)
        then, now = self.history[-20:][0], self.history[-1]
        rate = (now.steps - then.steps) / max(now.seconds - then.seconds, 1e-9)
        facts: dict[str, tuple[str, float]] = {  # what to say, and how full a bar to draw beside it
            "seconds": (f"{self.seconds():.1f}", 0),
            "episodes": (f"{len(self.returns):,}", 0),
            "mean return": (f"{now.mean_return:.1f}", now.mean_return / SOLVED),
            "steps/s": (f"{rate:,.0f}", 0),
            "ring fill": (f"{now.fill:.0%}", now.fill),
            "weights' age": (f"{now.staleness:.1f} updates", 0),
            "restarts": (f"{self.restarts}", 0),
        }
        if self.live is None:
            print(", ".join(f"{name} {text}" for name, (text, _) in facts.items()), flush=True)
            return
        table = Table.grid(padding=(0, 2))
        for name, (text, full) in facts.items():
            table.add_row(name, text, ProgressBar(1, min(full, 1), width=40) if full else "")
        self.live.update(table, refresh=True)

    def plot(self, path: Path) -> None:
        """Draw the learning curve, and below it the ring's fill and the age of the weights."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        seconds, _, mean_returns, fills, stalenesses = zip(*self.history, strict=True)
        above.plot(seconds, mean_returns)
        above.axhline(SOLVED, color="grey", linestyle=":")
        above.set(ylabel="mean return, last 100 episodes", title="CartPole-v1")
        below.plot(seconds, fills, label="ring fill when a batch was taken")
        below.plot(seconds, stalenesses, label="age of the batch's weights (updates)")
        below.set(xlabel="seconds", ylim=(0, None))
        below.legend()
        figure.savefig(path)


def train(args: argparse.Namespace, progress: Progress) -> bool:
    """Learn until CartPole is solved (True) or the time is up (False)."""
    learner = Learner(args.seed)
    batch: list[Trajectory] = []
    with Actors(args.actors, args.seed) as actors, progress.live or contextlib.nullcontext():
        actors.send_weights(learner.version, learner.policy)
        for actor in range(args.actors):
            actors.start(actor)
        while progress.seconds() < args.max_seconds:
            for event in actors.replace_dead():
                progress.restarts += 1
                print(event, flush=True)
            fill = actors.trajectories.qsize() / CAPACITY
            with contextlib.suppress(queue.Empty):
                batch += actors.trajectories.get_many(BATCH - len(batch), timeout=0.1)
            if len(batch) == BATCH:
                if progress.add(batch, fill, learner.version):
                    return True
                learner.update(batch)
                actors.send_weights(learner.version, learner.policy)
                batch = []
            progress.show()
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; gives the exit status."""
    parser = argparse.ArgumentParser(description="Solve CartPole-v1 with actors and a learner over ringshm.")
    parser.add_argument("--actors", type=int, default=2, metavar="N", help="actors' processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="for all random numbers (%(default)s)")
    parser.add_argument("--max-seconds", type=float, default=180, metavar="T", help="give up then (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw learning curve and ring fill")
    args = parser.parse_args(argv)
    if args.actors < 1:
        parser.error("--actors: at least 1 is needed")
    progress = Progress()
    try:
        solved = train(args, progress)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    now = progress.history[-1]
    print(
        f"{'solved' if solved else 'not solved'}: mean return {now.mean_return:.1f} over the last 100 of "
        f"{len(progress.returns):,} episodes, {now.steps:,} steps, {progress.seconds():.1f} s "
        f"({args.actors} actors, {progress.restarts} restarts, seed {args.seed})"
    )
    if args.plot:
        progress.plot(args.plot)
    return 0 if solved else 1


if __name__ == "__main__":
    raise SystemExit(main())
