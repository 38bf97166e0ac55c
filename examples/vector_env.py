"""Steps of a vectorised Gymnasium environment per second, with actions at random.

    python examples/vector_env.py --env CartPole-v1 --num-envs 8 --workers 1 --steps 5000

`RingVectorEnv` has its workers' processes write observations into loaned slots of shared memory. `python -m perf
vector_env` compares it with Gymnasium's own ones.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import gymnasium

from ringshm.gymnasium import RingVectorEnv


def make(env_id: str) -> Any:
    """An environment of that name; in each process where one is made, its package must be known."""
    if env_id.startswith("ALE/"):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each process
        gymnasium.register_envs(ale_py)
    return gymnasium.make(env_id)


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="Steps of environments, at random, in processes of their own.")
    parser.add_argument("--env", default="CartPole-v1", metavar="ID", help="default: CartPole-v1")
    parser.add_argument("--num-envs", type=int, default=8, metavar="N")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that step them (default: one for each core)"
    )
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of each environment (default: 2000)")
    args = parser.parse_args(argv)
    if args.num_envs < 1 or args.steps < 1:
        parser.error("--num-envs and --steps must be at least 1")
    if args.workers is not None and not 1 <= args.workers <= args.num_envs:
        parser.error("--workers must be at least 1, and at most --num-envs")
    try:
        make(args.env).close()
    except (gymnasium.error.Error, ImportError) as error:
        parser.error(f"--env {args.env}: {error}")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # Ctrl-C amid a step is nothing to warn of
    try:
        envs = RingVectorEnv(
            [functools.partial(make, args.env)] * args.num_envs, num_workers=args.workers, context="spawn"
        )
        with contextlib.closing(envs):
            envs.reset(seed=0)
            envs.action_space.seed(0)
            episodes, began = 0, time.monotonic()
            for _ in range(args.steps):
                _, _, terminated, truncated, _ = envs.step(envs.action_space.sample())
                episodes += int((terminated | truncated).sum())
            seconds = time.monotonic() - began
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    count = args.steps * args.num_envs
    print(f"{count:,} steps of {args.num_envs} {args.env}, {episodes:,} episodes: {count / seconds:,.0f} steps/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
