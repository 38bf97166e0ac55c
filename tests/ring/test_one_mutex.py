"""The scheme of processors that need not keep stores in order: both ends of a channel share one mutex. Whatever is
tested elsewhere holds with it, too; here a few of those tests run with it, on a processor that does keep the order.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ANOTHER = str(TESTS / "support" / "aarch64")

#: What the mutexes have to do with: their holder dies, or a process that has a message; who holds them is told; values
#: are read while others are published.
HERE = [
    "tests/process/test_death.py::test_calls_that_do_not_wait_recover_a_dead_holders_mutex",
    "tests/process/test_death.py::test_a_message_whose_receiver_died_comes_again_in_its_old_place",
    "tests/channel/test_conformance.py::test_each_message_goes_to_one_receiver_in_order_of_its_sender",
    "tests/channel/test_latest.py::test_readers_in_other_processes_see_versions_whole_and_in_order",
    "tests/ring/test_stats.py::test_who_holds_a_mutex_is_named_and_since_when",
    "tests/ring/test_diagnosis.py::test_who_holds_a_mutex_and_is_stopped_is_told",
]

SCHEME = """
import ringshm
from ringshm.tools.doctor import examine
with ringshm.Channel(2, 64) as channel:
    ring = channel._attachment.ring
    print(ring.senders is ring.receivers, ring.compiled is None)
print(*[check.found for check in examine() if check.subject == "processor"])
"""


def run(pure: bool, *command: str, machine: str = ANOTHER) -> str:
    """What Python printed, with the scheme of that processor; with the compiled path, where it is there, or not."""
    path = os.pathsep.join(filter(None, [machine, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "RINGSHM_PURE": str(int(pure))}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, *command], cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("pure", [False, True], ids=["compiled", "pure"])
def test_messages_values_and_deaths_are_as_with_two(pure: bool) -> None:
    passed = re.search(r"(\d+) passed", run(pure, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *HERE))
    assert passed is not None
    assert int(passed[1]) > len(HERE)


@pytest.mark.parametrize("pure", [False, True], ids=["compiled", "pure"])
def test_doctor_says_which_scheme_a_channel_uses(pure: bool) -> None:
    for machine, one, says in (ANOTHER, True, "share one mutex"), ("", False, "one mutex, its receivers another"):
        if not machine and os.uname().machine != "x86_64":
            continue
        scheme, found = run(pure, "-c", SCHEME, machine=machine).splitlines()
        assert scheme.startswith(str(one))
        assert says in found
