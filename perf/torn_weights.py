"""Do TorchRL's workers see weights whole: `python -m perf.torn_weights`, where TorchRL is installed.

The learner adds 1 to all weights of a policy, and sends them, again and again, while a worker of a MultiAsyncCollector
plays. So all weights of a version are the same number, and a forward of the policy, which looks at one layer after the
other, gives as its action the least and the greatest that it has seen. Where they differ, it has seen two versions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import MultiAsyncCollector
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.weight_update import WeightSyncScheme

import ringshm.torchrl  # noqa: F401  (registers its backend)

SIDE, LAYERS, FRAMES = 512, 6, 50


class Still(EnvBase):  # type: ignore[misc, unused-ignore]
    """An environment in which nothing happens."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded((1,)))
        self.action_spec, self.reward_spec = Unbounded((2,)), Unbounded((1,))

    def _reset(self, tensordict: Any = None) -> Any:
        return TensorDict({"observation": torch.zeros(1)}, [])

    def _step(self, tensordict: Any) -> Any:
        nothing = {"reward": torch.zeros(1), "done": torch.zeros(1, dtype=torch.bool)}
        return TensorDict({"observation": torch.zeros(1), **nothing}, [])

    def _set_seed(self, seed: int | None) -> None:
        pass


class Looks(torch.nn.Module):
    """A policy whose action is the least and the greatest of its weights, layer by layer."""

    def __init__(self, side: int = SIDE) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList([torch.zeros(side, side) for _ in range(LAYERS)])

    def forward(self, observation: Any) -> Any:
        """The action, of shape (2,)."""
        seen = [torch.stack(torch.aminmax(layer.detach())) for layer in self.layers]
        both = torch.stack(seen)
        return torch.stack([both[:, 0].min(), both[:, 1].max()])


def policy_that_looks(side: int = SIDE) -> Any:
    """The policy, as collectors take it."""
    return TensorDictModule(Looks(side), in_keys=["observation"], out_keys=["action"])


def next_version(policy: Any) -> None:
    """Add 1 to all weights, one after the other, as an optimiser does."""
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 1


def torn(backend: str, versions: int) -> tuple[int, int]:
    """How many forwards there were, and how many of them saw two versions."""
    policy = policy_that_looks()
    scheme = WeightSyncScheme.from_backend(backend)
    collector = MultiAsyncCollector(
        [Still], policy, frames_per_batch=FRAMES, total_frames=-1, weight_sync_schemes={"policy": scheme}
    )
    forwards = seen_two = 0
    try:
        for version, rollout in enumerate(collector):
            least, greatest = rollout["action"].unbind(-1)
            forwards += len(least)
            seen_two += int((least != greatest).sum())
            if version == versions:
                break
            next_version(policy)
            collector.update_policy_weights_()
    finally:
        collector.shutdown()
    return forwards, seen_two


def main(argv: Sequence[str] | None = None) -> int:
    """Count them for each backend."""
    parser = argparse.ArgumentParser(description="Do TorchRL's workers see weights whole?")
    parser.add_argument("--versions", type=int, default=200, metavar="N")
    parser.add_argument("backends", nargs="*", default=["shared", "process", "ringshm"], metavar="BACKEND")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for backend in args.backends:
        forwards, seen_two = torn(backend, args.versions)
        print(f"{backend:8} {args.versions} versions, {forwards:,} forwards, {seen_two:,} saw two versions", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
