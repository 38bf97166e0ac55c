"""What a vectorised environment must offer to be measured, the games it steps, and the list of all of them.

An adapter makes one library's environments step through the library's own calls, by the same actions. Nothing of this
folder imports ringshm, but its own adapter: PufferLib 3 needs a NumPy and a Gymnasium that ringshm does not work with,
so its adapter runs in an interpreter of its own (`elsewhere`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..contenders import Entrant

CARTPOLE, PONG, SLOW_RESETS = "CartPole", "Pong", "slow resets"
_IDS = {CARTPOLE: "CartPole-v1", PONG: "ALE/Pong-v5"}


@dataclass(frozen=True)
class Stepper:
    """Vectorised environments: `reset` takes a seed and gives the observations, stacked.

    `step` takes actions (n,), and gives what the library gives, as arrays, the observations first.
    """

    reset: Callable[[int], Any]
    step: Callable[[Any], list[Any]]
    close: Callable[[], object]


@dataclass(frozen=True)
class Pace:
    """How a contender goes on without a step of all: `turn` makes the steps that are ready, and says how many."""

    begin: Callable[[], object]
    turn: Callable[[], int]
    close: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Vectorised(Entrant):
    """A contender: how it makes `count` environments of a game.

    `pace` makes them for a run in which nobody waits for the slowest, where it has that.
    """

    make: Callable[[str, int], Stepper]
    reference: str = ""  # Whose trajectories it must have; "": nobody's, its games are its own.
    processes: bool = True  # Whether workers are processes, of which one can be killed.
    games: Sequence[str] = (CARTPOLE, PONG)
    pace: Callable[[str, int], Pace] | None = None
    python: str = ""  # The variable of the environment that names its own interpreter.

    def version(self) -> str:
        """As an Entrant's; of one with an interpreter of its own which that is."""
        if not self.python:
            return super().version()
        if self.python not in os.environ:
            raise ImportError(f"{self.python} names no interpreter that has it")
        return f"as {os.environ[self.python]} has it"


def game(name: str) -> Any:
    """Make one environment of that game, as Gymnasium has them."""
    import gymnasium

    if name == PONG:
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        if hasattr(gymnasium, "register_envs"):  # Before Gymnasium 1.0 ale-py registers itself.
            gymnasium.register_envs(ale_py)
    if name == SLOW_RESETS:
        from .delayed import Delayed

        return Delayed(gymnasium.make(_IDS[CARTPOLE]))
    return gymnasium.make(_IDS[name])


def makers(name: str, count: int) -> list[Callable[[], Any]]:
    """One function for each environment."""
    return [partial(game, name)] * count


def actions_of(name: str, count: int, steps: int) -> list[Any]:
    """So many steps' actions for `count` environments, the same for everyone."""
    choices = 6 if name == PONG else 2
    return list(np.random.default_rng(0).integers(choices, size=(steps, count)))


def descendants(pid: int | None = None) -> list[int]:
    """The processes that a process has started, and theirs; without the helpers of multiprocessing itself."""
    found: list[int] = []
    for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return [pid for pid in found if not _is_helper(pid)]


def _is_helper(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    return b"resource_tracker" in command or b"forkserver" in command


def processor_seconds() -> float:
    """What this process and those that it has started have had of the processor."""
    tick = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for pid in [os.getpid(), *descendants()]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def everyone() -> list[Vectorised]:
    """All contenders, ringshm first."""
    from . import envpool_envs, gymnasium_envs, pufferlib_envs, ringshm_envs, sb3_envs, torchrl_envs

    return [
        *ringshm_envs.CONTENDERS,
        *gymnasium_envs.CONTENDERS,
        *sb3_envs.CONTENDERS,
        *torchrl_envs.CONTENDERS,
        *pufferlib_envs.CONTENDERS,
        *envpool_envs.CONTENDERS,
    ]
