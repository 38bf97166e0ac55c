"""Stable-Baselines3's own tests of its vectorised environments, unchanged, on ringshm's: a plugin for pytest, which
test_stable_baselines3_vec_env.py loads where it runs them.

They import `SubprocVecEnv` from `stable_baselines3.common.vec_env`, where `RingVecEnv` stands here instead.
"""

from __future__ import annotations

import pytest
import stable_baselines3.common.vec_env

from ringshm.stable_baselines3 import RingVecEnv

stable_baselines3.common.vec_env.SubprocVecEnv = RingVecEnv


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out those of `DummyVecEnv`, which are Stable-Baselines3's own affair."""
    items[:] = [item for item in items if "DummyVecEnv" not in item.name]
