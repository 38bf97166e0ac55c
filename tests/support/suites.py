"""Another library's own tests, from a checkout of it, on what ringshm puts in the place of a part of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from .workers import TESTS


def check_own_tests_pass(checkout: str, file: str, plugin: str) -> None:
    """Run a file of the checkout, or cases of it, unchanged: some run, and what the plugin says cannot hold fails.

    Args:
        checkout: its folder.
        file: in it, and which cases after "::".
        plugin: for pytest, which puts ringshm's in the place of theirs.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfEX", "-p", "no:cacheprovider", "-p", plugin]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(Path(checkout).resolve())])
    done = subprocess.run(
        [*command, file], cwd=checkout, env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* (passed|xfailed)", done.stdout), done.stdout
