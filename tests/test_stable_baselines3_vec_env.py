"""Stable-Baselines3's own tests of vectorised environments pass on ringshm's, unchanged: see
stable_baselines3_vec_env.py.

No package brings them. This takes them from a checkout, of the version that is installed:

    git clone --depth 1 --branch v2.9.2 https://github.com/DLR-RM/stable-baselines3
    SB3_CHECKOUT=stable-baselines3 python -m pytest -m slow tests/test_stable_baselines3_vec_env.py
"""

from __future__ import annotations

import os

import pytest
from support.suites import check_own_tests_pass

pytest.importorskip("stable_baselines3")

CHECKOUT = os.environ.get("SB3_CHECKOUT", "")

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="SB3_CHECKOUT names no checkout of Stable-Baselines3")


@pytest.mark.slow(seconds=120)
def test_stable_baselines3s_own_tests_pass() -> None:
    check_own_tests_pass(CHECKOUT, "tests/test_vec_envs.py", "stable_baselines3_vec_env")
