"""Gymnasium's own tests of vectorised environments pass on ringshm's, unchanged: see gymnasium_vector.py.

No package brings them. This takes them from a checkout, of the version that is installed:

    git clone --depth 1 --branch v1.4.0 https://github.com/Farama-Foundation/Gymnasium
    GYMNASIUM_CHECKOUT=Gymnasium python -m pytest tests/test_gymnasium_vector.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.workers import TESTS

pytest.importorskip("gymnasium", minversion="1.1")

CHECKOUT = os.environ.get("GYMNASIUM_CHECKOUT", "")
FILES = ["test_async_vector_env", "test_vector_env", "test_autoreset_mode", "test_observation_mode"]

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="GYMNASIUM_CHECKOUT names no checkout of Gymnasium")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_gymnasiums_own_tests_pass(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rfEX", "-p", "no:cacheprovider", "-p", "gymnasium_vector"]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(Path(CHECKOUT).resolve())])
    done = subprocess.run(
        [*command, f"tests/vector/{file}.py"], cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
