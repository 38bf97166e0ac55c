"""Event loops that tests run coroutines in."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from typing import Any

import pytest

_NO_UVLOOP = pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed")
#: What a test's parameter `kind` may be.
LOOPS = ("asyncio", pytest.param("uvloop", marks=_NO_UVLOOP))


def run(main: Coroutine[Any, Any, Any], kind: str = "asyncio") -> Any:
    """As `asyncio.run`, in a loop of that kind."""
    if kind == "asyncio":
        return asyncio.run(main)
    import uvloop

    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()
