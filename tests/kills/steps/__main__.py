"""Sweeps and single trials without pytest, from the folder of the repository:

export PYTHONPATH=.:tests
python -m kills.steps                             after each store of every operation: some minutes
python -m kills.steps put get --instructions 500  after so many instructions of two operations, drawn by --seed
python -m kills.steps --recoverers 200            the next process is killed, too, while it recovers
python -m kills.steps --stops 200                 the victim is stopped, and goes on
python -m kills.steps --trial TEXT                one trial, as a failure shows it
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from kills.steps.operations import OPERATIONS
from kills.steps.stepper import why_not
from kills.steps.sweep import PROCESSES, count, killed_recoverers, kills, perform, prepare, stops, table
from kills.steps.trial import Outcome, Trial, run


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kills.steps", description="Kill operations of ringshm at their machine instructions."
    )
    parser.add_argument("operation", nargs="*", help=f"of {', '.join(OPERATIONS)}; all if none is given")
    parser.add_argument("--instructions", type=int, metavar="N", help="kill after N instructions, drawn by --seed")
    parser.add_argument("--recoverers", type=int, metavar="N", help="make N trials in which a second process is killed")
    parser.add_argument(
        "--stops", type=int, metavar="N", help="make N trials in which the victim is stopped, and lives"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--first-failure", action="store_true", help="end with it")
    parser.add_argument("--trial", help="make this one")
    options = parser.parse_args()
    if unknown := set(options.operation) - set(OPERATIONS):
        parser.error(f"no such operation: {', '.join(sorted(unknown))}")
    if reason := why_not():
        print(f"nothing can be stepped: {reason}")
        return 2
    if options.trial:
        prepare()
        outcome = run(Trial.parse(options.trial))
        print(outcome, outcome.steps)
        return bool(outcome.failure)
    pick = random.Random(options.seed)
    counted = count(options.operation or OPERATIONS, options.processes)
    print(f"seed {options.seed}", table(counted), sep="\n", flush=True)
    if options.recoverers:
        trials = killed_recoverers(counted, pick)[: options.recoverers]
    elif options.stops:
        trials = stops(counted, pick)[: options.stops]
    elif options.instructions:
        trials = kills(counted, "instruction", pick)[: options.instructions]
    else:
        trials = kills(counted, "store", pick)
    begin, outcomes = time.monotonic(), list[Outcome](counted)
    for outcome in perform(trials, options.processes):
        outcomes.append(outcome)
        if outcome.failure:
            print(outcome, flush=True)
            if options.first_failure:
                break
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    lost = sum(outcome.lost for outcome in outcomes)
    print(f"{len(trials)} kills in {time.monotonic() - begin:.0f} s, {failed} failed, {lost} messages taken along")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
