"""TorchRL's own tests of how weights reach its collectors pass with ringshm's scheme: see torchrl_weights.py.

No package brings them. This takes them from a checkout, of the version that is installed or newer:

    git clone --depth 1 https://github.com/pytorch/rl
    TORCHRL_CHECKOUT=rl python -m pytest -m slow tests/test_torchrl_weights.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.suites import check_own_tests_pass

pytest.importorskip("torchrl")

CHECKOUT = os.environ.get("TORCHRL_CHECKOUT", "")

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="TORCHRL_CHECKOUT names no checkout of TorchRL")


@pytest.mark.slow(seconds=400)
def test_torchrls_own_tests_pass() -> None:
    check_own_tests_pass(str(Path(CHECKOUT, "test").resolve()), "test_collectors.py", "torchrl_weights")
