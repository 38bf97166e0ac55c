"""Gymnasium's own tests of vectorised environments pass on ringshm's, unchanged: see gymnasium_vector.py.

No package brings them. This takes them from a checkout, of the version that is installed:

    git clone --depth 1 --branch v1.4.0 https://github.com/Farama-Foundation/Gymnasium
    GYMNASIUM_CHECKOUT=Gymnasium python -m pytest tests/test_gymnasium_vector.py
"""

from __future__ import annotations

import os

import pytest
from support.suites import check_own_tests_pass

pytest.importorskip("gymnasium", minversion="1.1")

CHECKOUT = os.environ.get("GYMNASIUM_CHECKOUT", "")
FILES = ["test_async_vector_env", "test_vector_env", "test_autoreset_mode", "test_observation_mode"]

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="GYMNASIUM_CHECKOUT names no checkout of Gymnasium")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_gymnasiums_own_tests_pass(file: str) -> None:
    check_own_tests_pass(CHECKOUT, f"tests/vector/{file}.py", "gymnasium_vector")
