"""What tests of vectorised environments share."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes vectorised environments that are closed in the end; then no child is left."""
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **options: Any) -> Any:
            from ringshm.gymnasium import RingVectorEnv

            envs = RingVectorEnv(*args, **{"context": "fork", **options})
            stack.callback(envs.close)
            return envs

        yield make
    assert not multiprocessing.active_children()
