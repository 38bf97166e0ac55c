"""Gymnasium's own tests of its vectorised environments, unchanged, on ringshm's: a plugin for pytest, which
test_gymnasium_vector.py loads where it runs them.

They import `AsyncVectorEnv` from `gymnasium.vector`, where `RingVectorEnv` stands here instead. Cases that cannot hold
are listed with the reason, and must fail.
"""

from __future__ import annotations

import re
from typing import Any

import gymnasium.vector
import pytest

from ringshm.gymnasium import RingVectorEnv

#: What a case's name begins with, and, if not empty, what else is in it: why it cannot hold.
CANNOT_HOLD = {
    ("test_custom_space_async_vector_env", ""): "observations that are text: no slot can be made for them",
    (
        "test_async_vector_subenv_error",
        "",
    ): "counts the warnings that are logged: the traceback is the exception's cause",
    **{
        ("test_vector_obs_action_spaces", f"[{kind}"): "observations without a fixed size: no slot can be made for them"
        for kind in ("Text(", "Graph(", "Sequence(", "OneOf(", "Tuple(Graph(", "Dict('a': Dict('a': Graph(")
    },
    **{
        (case, ""): "`worker` and `max_concurrency` are not offered: `num_workers` says how many run at once"
        for case in (
            "test_max_concurrency", "test_non_integer_max_concurrency", "test_invalid_max_concurrency",
            "test_incompatible_custom_worker", "test_custom_worker_with_semaphore",
        )
    },
}  # fmt: skip
#: Begins as one that cannot hold, and does.
HOLDS = ("test_custom_space_async_vector_env_shared_memory",)


class AsyncVectorEnv(RingVectorEnv):
    """Takes `shared_memory`, which says where Gymnasium's passes observations on."""

    def __init__(self, env_fns: Any, shared_memory: bool = True, **options: Any) -> None:
        super().__init__(env_fns, **options)


gymnasium.vector.AsyncVectorEnv = AsyncVectorEnv


def why_not(name: str) -> str:
    """Why a case cannot hold; empty if it must."""
    reasons = (why for (case, part), why in CANNOT_HOLD.items() if name.startswith(case) and part in name)
    return "" if name.startswith(HOLDS) else next(reasons, "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them; and leave out those of `SyncVectorEnv`, which are Gymnasium's own affair."""
    items[:] = [item for item in items if not re.search("[[-]Sync", item.name)]
    for item in items:
        if why := why_not(item.name):
            item.add_marker(pytest.mark.xfail(strict=True, reason=why))
