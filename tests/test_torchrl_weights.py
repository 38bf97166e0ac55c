"""TorchRL's own tests of how weights reach its collectors pass with ringshm's scheme: see torchrl_weights.py.

No package brings them. This takes them from a checkout, of the version that is installed or newer:

    git clone --depth 1 https://github.com/pytorch/rl
    TORCHRL_CHECKOUT=rl python -m pytest -m slow tests/test_torchrl_weights.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.suites import check_own_tests_pass

torch: Any = pytest.importorskip("torch")
pytest.importorskip("torchrl")

CHECKOUT = os.environ.get("TORCHRL_CHECKOUT", "")

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="TORCHRL_CHECKOUT names no checkout of TorchRL")


@pytest.mark.slow(seconds=200)
@pytest.mark.parametrize(
    "cases",
    [
        "TestAsyncCollection::test_start_update_policy",
        "TestCollectorGeneric::test_update_weights",
        "TestCollectorGeneric::test_update_weights_shared_mem",
        "TestMakePolicyFactory",
        "TestPolicyFactory",
        pytest.param("TestUpdateParams", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
    ],
)
def test_torchrls_own_tests_pass(cases: str) -> None:
    check_own_tests_pass(str(Path(CHECKOUT, "test").resolve()), f"test_collectors.py::{cases}", "torchrl_weights")
