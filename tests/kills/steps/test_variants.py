"""The trials find what is wrong with the compiled path, if anything is: see variants.py."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from kills.steps.stepper import why_not
from kills.steps.variants import VARIANTS, build, find

_REASON = why_not() or ("" if shutil.which("cc") else "There is no C compiler.")
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)


@pytest.mark.slow(seconds=120)
@pytest.mark.parametrize("what", VARIANTS)
def test_each_flaw_is_found(what: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--every-bytecode"):
        pytest.skip("with --every-bytecode")
    pytest.importorskip("Cython")
    build(VARIANTS[what], tmp_path)
    found = find(VARIANTS[what], tmp_path, dict(os.environ))
    print(found)
    assert re.search(r"kills in .*, [1-9]\d* failed", found)
