"""Actors and a learner, each in a process of its own, joined by ringshm: CartPole-v1 is solved in seconds.

Actors play episodes, which they write step by step straight into slots of a channel that they all share. The learner
takes them in batches, improves the policy by PPO (plain NumPy, gradients by hand), and publishes the new weights, of
which only the newest matter: actors read them where they lie.

    python examples/actor_learner.py --actors 2 --seed 0 --plot curve.png

It ends when the last 100 episodes returned 475 on average (exit 0), or after `--max-seconds` (exit 1). Meanwhile,
try Ctrl-C: everybody goes, nothing is left in /dev/shm (exit 130). Or `kill -9` an actor: the learner's process
starts another, and nothing but the rate changes.

As a user of ringshm, look at TRAJECTORY and WEIGHTS, what is sent; at `act` and `play`, the whole of an actor; at
`Actors`, where the channel is made, handed over and ended; and at `train`, the whole of the learner's loop. The rest
is reinforcement learning and its display.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import queue
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

# These matrices are tiny: BLAS threads would only take cores from the actors. NumPy reads this when imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import gymnasium
import numpy as np
from children import end, interrupts_held, start
from numpy.typing import NDArray
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import ringshm

SOLVED = 475.0  # mean return of the last 100 episodes: CartPole-v1's own threshold
CAPACITY = 8  # slots for trajectories: more would be learnt from when long out of date
BATCH_STEPS = 2048  # the learner updates the weights when it has so many new steps
EPOCHS, MINIBATCH = 4, 512
GAMMA, LAMBDA = 0.99, 0.95  # the discount, and how slowly advantages turn from rewards to values
CLIP = 0.2  # how far an update may move the probability of an action, relatively
HIDDEN = 64
LEARNING_RATE, ANNEAL_STEPS = 1e-2, 400_000  # it falls to a tenth over so many steps
SCALE = np.array([1 / 2.4, 1 / 2, 1 / 0.21, 1 / 2], np.float32)  # brings observations to about [-1, 1]

MAX_STEPS = 500  # of an episode: the environment's own limit

#: What an actor sends: one episode of T steps.
TRAJECTORY = {
    "version": np.int64,  # of the weights it was played with
    "observations": (np.float32, (ringshm.UpTo(MAX_STEPS + 1), 4)),  # T + 1: the last is what the last action led to
    "actions": (np.bool_, ringshm.UpTo(MAX_STEPS)),  # push to the right?
    "log_probs": (np.float32, ringshm.UpTo(MAX_STEPS)),  # of the actions, as the actor chose them
    "rewards": (np.float32, ringshm.UpTo(MAX_STEPS)),
    "terminated": np.bool_,  # the pole fell; False where the time limit cut the episode
}
#: What the learner publishes: the policy's weights.
WEIGHTS = {
    "to_hidden": (np.float32, (4, HIDDEN)),
    "hidden_bias": (np.float32, HIDDEN),
    "to_output": (np.float32, HIDDEN),
    "output_bias": (np.float32, 1),
}

Array = NDArray[Any]
Weights = list[Array]  # of a network, in the order of WEIGHTS


class Trajectory(NamedTuple):
    """One episode, as it lies in a batch: see TRAJECTORY."""

    version: int
    observations: Array
    actions: Array
    log_probs: Array
    rewards: Array
    terminated: bool


def unstack(batch: Any) -> list[Trajectory]:
    """The trajectories of a batch, whose rows are padded to MAX_STEPS: views of it, cut to what each one has."""

    def row(name: str, k: int) -> Any:
        return batch[name][k, : batch.lengths[name][k]] if name in batch.lengths else batch[name][k]

    return [Trajectory(*(row(name, k) for name in TRAJECTORY)) for k in range(len(batch["version"]))]


# --- The networks: one hidden layer of tanh units, one output ------------------------------------------------


def new_network(rng: np.random.Generator) -> Weights:
    """Random weights; those of the output are small, so that nothing is prejudged."""
    to_hidden = rng.standard_normal((4, HIDDEN)) / 2
    to_output = rng.standard_normal(HIDDEN) / 1000
    return [np.asarray(w, np.float32) for w in (to_hidden, np.zeros(HIDDEN), to_output, np.zeros(1))]


def forward(weights: Weights, observations: Array) -> tuple[Array, Array]:
    """The hidden layer (n, HIDDEN) and the output (n,) for observations (n, 4)."""
    to_hidden, hidden_bias, to_output, output_bias = weights
    hidden = np.tanh((observations * SCALE) @ to_hidden + hidden_bias)
    return hidden, hidden @ to_output + output_bias


def backward(weights: Weights, observations: Array, hidden: Array, gradient: Array) -> Weights:
    """The gradients of the weights, given that of the output (n,)."""
    hidden_gradient = np.outer(gradient, weights[2]) * (1 - hidden**2)
    return [
        (observations * SCALE).T @ hidden_gradient,
        hidden_gradient.sum(axis=0),
        hidden.T @ gradient,
        gradient.sum(keepdims=True),
    ]


class Adam:
    """The optimiser (Kingma and Ba, 2015); it changes `weights` in place."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.means = [np.zeros_like(w) for w in weights]
        self.squares = [np.zeros_like(w) for w in weights]
        self.count = 0

    def step(self, gradients: Weights, rate: float) -> None:
        """Go one step down the gradients."""
        self.count += 1
        rate *= math.sqrt(1 - 0.999**self.count) / (1 - 0.9**self.count)
        for w, g, mean, square in zip(self.weights, gradients, self.means, self.squares, strict=True):
            mean += 0.1 * (g - mean)
            square += 0.001 * (g**2 - square)
            w -= rate * mean / (np.sqrt(square) + 1e-7)


def right_probability(logits: Array) -> Array:
    """The policy: how probable the action "push to the right" is; never quite 0 or 1, it has a logarithm."""
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -10, 10))))


# --- The actors' processes -----------------------------------------------------------------------------------


def play(env: Any, rng: np.random.Generator, policy: Weights, slot: ringshm.Loan) -> None:
    """Play one episode, with actions drawn from the policy, and write it into the slot."""
    observations, actions, log_probs, rewards = (
        slot[name] for name in ("observations", "actions", "log_probs", "rewards")
    )
    observations[0], _ = env.reset()
    steps = 0
    terminated = truncated = False
    while not (terminated or truncated):
        right = float(right_probability(forward(policy, observations[steps])[1][0]))
        action = rng.random() < right
        actions[steps] = action
        log_probs[steps] = math.log(right if action else 1 - right)
        observations[steps + 1], rewards[steps], terminated, truncated, _ = env.step(int(action))
        steps += 1
    slot["terminated"] = terminated
    slot.set_length("observations", steps + 1)
    for name in ("actions", "log_probs", "rewards"):
        slot.set_length(name, steps)


def act(seed: np.random.SeedSequence, weights: ringshm.Latest, trajectories: ringshm.Sender) -> None:
    """An actor's process: play with the newest weights, send what was seen.

    It ends when the learner's process shuts the channel down, and also when that process just dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the learner's decides
    rng = np.random.default_rng(seed)
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=int(rng.integers(2**31)))
    ends = (ringshm.EndOfChannel, ringshm.ChannelClosed, ringshm.BrokenChannel, ringshm.ChannelNotFound)
    with contextlib.suppress(*ends), weights, trajectories:
        while True:
            # A free slot, and the newest weights: both are used where they lie, and nothing is copied.
            with trajectories.loan() as slot, weights.borrow() as newest:
                slot["version"] = newest.version
                play(env, rng, [newest[name] for name in WEIGHTS], slot)


class Actors:
    """The learner's side of the actors: their channel, their processes, and others for those that died."""

    def __init__(self, count: int, seed: int) -> None:
        # keep_open: the channel outlives the actors at its other end, for those that take their places.
        self.trajectories = ringshm.Channel(CAPACITY, spec=TRAJECTORY, keep_open=True)
        self.weights = ringshm.Latest(spec=WEIGHTS, borrows=count)  # each actor holds one version at a time
        self.processes: list[SpawnProcess | None] = [None] * count
        self.seeds = np.random.SeedSequence(seed)

    def __enter__(self) -> Actors:
        return self

    def keep_running(self) -> list[str]:
        """Start a process for each actor that has none or whose was killed; says who was killed."""
        killed = []
        for actor, process in enumerate(self.processes):
            if process is not None:
                if process.exitcode is None:
                    continue
                if process.exitcode >= 0:  # nobody killed it: it has printed why, and so would the next one
                    raise RuntimeError(f"actor {actor} ended by itself, with exit code {process.exitcode}")
                signal_number = -process.exitcode
                killed.append(f"actor {actor} (pid {process.pid}) died of signal {signal_number}: starting another")
            (seed,) = self.seeds.spawn(1)  # random numbers that no other actor ever had
            self.processes[actor] = start(act, seed, self.weights, self.trajectories.sender())
        return killed

    def __exit__(self, *exc_info: object) -> None:
        with interrupts_held(), contextlib.ExitStack() as stack:
            stack.enter_context(self.weights)
            stack.enter_context(self.trajectories)  # closed at the end, in whatever way that is reached
            self.trajectories.shutdown(immediate=True)  # whoever waits there, or comes later, is told at once
            end(process for process in self.processes if process is not None)


# --- The learner's process -----------------------------------------------------------------------------------


class Learner:
    """Proximal policy optimisation (Schulman et al., 2017)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.policy = new_network(self.rng)  # gives the logit of "push to the right"
        self.value = new_network(self.rng)  # in units of 1 / (1 - GAMMA)
        self.policy_optimiser, self.value_optimiser = Adam(self.policy), Adam(self.value)
        self.steps = 0

    def advantages(self, trajectory: Trajectory) -> tuple[Array, Array]:
        """How much better each action (T,) was than expected, and what to expect: targets for the values (T,).

        Source: generalised advantage estimation (Schulman et al., 2016).
        """
        values = forward(self.value, trajectory.observations)[1]
        if trajectory.terminated:
            values[-1] = 0  # nothing follows; an episode cut at the time limit would have gone on
        advantages = (1 - GAMMA) * trajectory.rewards + GAMMA * values[1:] - values[:-1]
        for t in reversed(range(len(advantages) - 1)):
            advantages[t] += GAMMA * LAMBDA * advantages[t + 1]
        return advantages, advantages + values[:-1]

    def update(self, batch: Sequence[Trajectory]) -> None:
        """Learn from a batch, `EPOCHS` times from each step."""
        columns = [(t.observations[:-1], t.actions, t.log_probs, *self.advantages(t)) for t in batch]
        data = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
        data[3] = (data[3] - data[3].mean()) / data[3].std()
        self.steps += len(data[0])
        rate = LEARNING_RATE * max(0.1, 1 - self.steps / ANNEAL_STEPS)
        for _ in range(EPOCHS):
            order = self.rng.permutation(len(data[0]))
            for first in range(0, len(order), MINIBATCH):
                self.learn([column[order[first : first + MINIBATCH]] for column in data], rate)

    def learn(self, minibatch: Sequence[Array], rate: float) -> None:
        """One step of both optimisers."""
        observations, actions, old_log_probs, advantages, targets = minibatch
        hidden, logits = forward(self.policy, observations)
        right = right_probability(logits)
        ratio = np.exp(np.log(np.where(actions, right, 1 - right)) - old_log_probs)
        # The objective is min(ratio * advantage, clipped ratio * advantage): flat where the latter is less.
        free = np.where(advantages > 0, ratio < 1 + CLIP, ratio > 1 - CLIP)
        gradient = -(free * ratio * advantages) * (actions - right) / len(actions)
        self.policy_optimiser.step(backward(self.policy, observations, hidden, gradient), rate)

        hidden, values = forward(self.value, observations)
        gradient = (values - targets) / len(targets)
        self.value_optimiser.step(backward(self.value, observations, hidden, gradient), rate)


class Moment(NamedTuple):
    """How things stood when a batch was taken."""

    seconds: float  # since the start
    steps: int  # taken in the environments, so far
    mean_return: float  # of the last 100 episodes
    fill: float  # of the ring of trajectories, 0 to 1: the most since the batch before
    staleness: float  # by how many updates the batch's weights were behind the learner's, on average


class Progress:
    """Keeps how the run goes, and shows it: live on a terminal, elsewhere as a line every second."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.history = [Moment(0, 0, 0, 0, 0)]
        self.returns: list[float] = []
        self.restarts = 0
        self.live = Live(auto_refresh=False) if sys.stdout.isatty() else None
        self.next_show = 0.0

    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def add(self, batch: Sequence[Trajectory], fill: float, version: int, score: float = SOLVED) -> bool:
        """Take note of a batch; says whether CartPole is solved with it, or that score reached."""
        self.returns += [float(t.rewards.sum()) for t in batch]
        steps = self.history[-1].steps + sum(len(t.actions) for t in batch)
        mean_return = float(np.mean(self.returns[-100:]))
        staleness = float(np.mean([version - t.version for t in batch]))
        self.history.append(Moment(self.seconds(), steps, mean_return, fill, staleness))
        return len(self.returns) >= 100 and mean_return >= score

    def show(self) -> None:
        """Bring the display up to date, when it is time."""
        if self.seconds() < self.next_show:
            return
        self.next_show = self.seconds() + (0.1 if self.live else 1.0)
        then, now = self.history[-20:][0], self.history[-1]
        if not now.steps:
            self._say_starting()
            return
        rate = (now.steps - then.steps) / max(now.seconds - then.seconds, 1e-9)
        facts: dict[str, tuple[str, float]] = {  # what to say, and how long a bar to draw beside it
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
        for name, (text, length) in facts.items():
            table.add_row(name, text, ProgressBar(1, min(length, 1), width=40) if length else "")
        self.live.update(table, refresh=True)

    def _say_starting(self) -> None:
        """Before there is a batch: actors take some seconds to start, and play their first episodes."""
        text = f"starting: actors start and play first episodes, {self.seconds():.1f} s"
        if self.live is None:
            print(text, flush=True)
        else:
            self.live.update(text, refresh=True)

    def plot(self, path: Path) -> None:
        """Draw the learning curve, the ring's fill and the age of the weights, over time."""
        from matplotlib.figure import Figure  # slow to import, and only needed here

        figure = Figure(figsize=(8, 8), layout="constrained")
        seconds, _, *curves = zip(*self.history, strict=True)
        names = ("mean return, last 100 episodes", "ring fill", "age of weights, in updates")
        for axes, curve, name in zip(figure.subplots(3, sharex=True), curves, names, strict=True):
            axes.plot(seconds, curve)
            axes.set(xlabel="seconds", ylabel=name, ylim=(0, None))
            axes.label_outer()
        figure.savefig(path)


def train(args: argparse.Namespace, progress: Progress) -> bool:
    """Learn until CartPole is solved (True) or the time is up (False)."""
    learner = Learner(args.seed)
    batch: list[Trajectory] = []
    fill = 0.0
    with Actors(args.actors, args.seed) as actors, progress.live or contextlib.nullcontext():
        version = actors.weights.publish(dict(zip(WEIGHTS, learner.policy, strict=True)))
        while progress.seconds() < args.max_seconds:
            progress.show()
            for event in actors.keep_running():
                progress.restarts += 1
                print(event, flush=True)
            fill = max(fill, actors.trajectories.qsize() / CAPACITY)
            with contextlib.suppress(queue.Empty):
                batch += unstack(actors.trajectories.get_batch(CAPACITY, min=1, timeout=0.1))
            if sum(len(t.actions) for t in batch) < BATCH_STEPS:
                continue
            if progress.add(batch, fill, version):
                return True
            learner.update(batch)
            version = actors.weights.publish(dict(zip(WEIGHTS, learner.policy, strict=True)))
            batch, fill = [], 0.0
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="Solve CartPole-v1 with actors and a learner over ringshm.")
    parser.add_argument("--actors", type=int, default=2, metavar="N", help="how many (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers (default: 0)")
    parser.add_argument("--max-seconds", type=float, default=180, metavar="T", help="give up then (default: 180)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw learning curve and ring fill")
    args = parser.parse_args(argv)
    if args.actors < 1:
        parser.error("--actors must be at least 1")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    if args.plot and not args.plot.parent.is_dir():
        parser.error(f"--plot {args.plot}: there is no folder {args.plot.parent}")
    progress = Progress()
    try:
        solved = train(args, progress)
        now = progress.history[-1]
        print(
            f"{'solved' if solved else 'not solved'}: mean return {now.mean_return:.1f} over the last 100 of "
            f"{len(progress.returns):,} episodes, {now.steps:,} steps, {progress.seconds():.1f} s "
            f"(actors {args.actors}, restarts {progress.restarts}, seed {args.seed})"
        )
        if args.plot:
            progress.plot(args.plot)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatient users press it twice
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0 if solved else 1


if __name__ == "__main__":
    raise SystemExit(main())
