"""Gymnasium's own tests of its vectorised environments, unchanged, on ringshm's: a plugin for pytest, which
test_gymnasium_vector.py loads where it runs them.

They import `AsyncVectorEnv` from `gymnasium.vector`, where `RingVectorEnv` stands here instead. Cases that cannot hold
are listed with the reason, and must fail.
"""

from __future__ import annotations

import re

import gymnasium.vector
import pytest

from ringshm.gymnasium import RingVectorEnv

#: What a case's name begins with, and why it cannot hold.
CANNOT_HOLD = {
    "test_custom_space_async_vector_env_shared_memory": "what has no fixed size is pickled, and no error",
    "test_async_vector_subenv_error": "counts the warnings that are logged: the traceback is the exception's cause",
    **dict.fromkeys(
        ("test_incompatible_custom_worker", "test_custom_worker_with_semaphore"), "`worker` is not offered"
    ),
}

gymnasium.vector.AsyncVectorEnv = RingVectorEnv


def why_not(name: str) -> str:
    """Why a case cannot hold; empty if it must."""
    return next((why for case, why in CANNOT_HOLD.items() if name.startswith(case)), "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them; and leave out those of `SyncVectorEnv`, which are Gymnasium's own affair."""
    items[:] = [item for item in items if not re.search(r"[\[-]Sync", item.name)]
    for item in items:
        if why := why_not(item.name):
            item.add_marker(pytest.mark.xfail(strict=True, reason=why))
