"""The start of a child that is given a handle: killed at any bytecode, on either side, it ends no stream early.

    the child is killed    at a bytecode of unpickling the handle, attaching, its first call or its exit
    the maker is killed    at a bytecode of ringshm's while it starts the child (pickling, the hooks of a fork), or at
                           any time of the start

Each time another child is still to come, which has not unpickled its handle yet. While it is away the stream must not
end; once it has come, and gone, the stream must end, and nobody waits for ever. The receiver gets what each child has
sent whose `put` has returned. support/starts.py has the trials.
"""

from __future__ import annotations

import random

import pytest
from support import workers

#: Trials in the default run, and in the slow one, by who is killed.
TRIALS = {"child": (12, 40), "maker": (12, 40)}
CASES = [
    ("child", "fork"),
    ("child", "forkserver"),
    pytest.param("child", "spawn", marks=pytest.mark.slow),
    ("maker", "fork"),
    pytest.param("maker", "spawn", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("what", "method"), CASES)
def test_nobody_is_missed_or_waited_for_if_a_start_is_cut_short(
    what: str, method: str, pytestconfig: pytest.Config
) -> None:
    option = pytestconfig.option
    seed = random.randrange(1 << 32) if option.seed is None else option.seed
    trials = 0 if option.every_bytecode else TRIALS[what][bool(option.markexpr)]
    source = "import sys\nfrom support.starts import main\nmain(*sys.argv[1:3], *map(int, sys.argv[3:]))"
    print(f"seed {seed}")
    count, made = map(int, workers.finish(workers.script(source, what, method, str(trials), str(seed))).split())
    assert count > (1000 if what == "child" else 100), "hardly anything was traced"
    assert made >= (trials or count)
