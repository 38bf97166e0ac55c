"""Sweeps and single trials without pytest, from the folder of the repository:

export PYTHONPATH=.:tests
python -m kills                                     everything, more than a million trials: many hours
python -m kills --share 0.1 --seed 7                a tenth of all bytecodes: some half an hour
python -m kills put "get many" --action kill        every bytecode of two operations
python -m kills put --action kill --at 17           one trial
"""

from __future__ import annotations

import argparse
import random
import sys

from kills.operations import OPERATIONS
from kills.sweep import PROCESSES, Task, perform_all, sweep, table
from kills.victim import ACTIONS


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kills", description="Kill or interrupt operations of ringshm at their bytecodes."
    )
    parser.add_argument("operation", nargs="*", help=f"of {', '.join(OPERATIONS)}; all if none is given")
    parser.add_argument("--action", action="append", choices=ACTIONS, help="all if none is given")
    parser.add_argument("--at", type=int, action="append", help="these bytecodes only; 0 disturbs nothing")
    parser.add_argument("--share", type=float, default=1.0, help="of the bytecodes, drawn by seed")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args()
    names = options.operation or list(OPERATIONS)
    if unknown := set(names) - set(OPERATIONS):
        parser.error(f"no such operation: {', '.join(sorted(unknown))}")
    if not 0 < options.share <= 1:
        parser.error("--share is above 0, and at most 1")
    actions = options.action or ACTIONS
    if options.at:
        ats = tuple(options.at)
        tasks = [Task(name, blocked, (*actions,), ats) for name in names for blocked in OPERATIONS[name].sweeps]
        trials = [trial for some in perform_all(tasks, options.processes) for trial in some]
        print(*trials, table(trials), sep="\n")
    else:
        trials = sweep(names, actions, options.share, options.seed, options.processes)
    sys.exit(any(trial.failure for trial in trials))


if __name__ == "__main__":
    main()
