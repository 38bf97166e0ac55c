"""What refuses to import ringshm says what to do instead."""

from __future__ import annotations

import subprocess

import pytest
from support.workers import script


def test_the_import_on_another_system_than_linux_is_refused() -> None:
    process = script("import sys\nsys.platform = 'darwin'\nimport ringshm", stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "ImportError: ringshm runs on Linux only, not on darwin: run the program in a Linux container" in errors


def test_the_import_without_what_an_extra_brings_names_the_extra() -> None:
    pytest.importorskip("gymnasium")
    program = "import sys\nsys.modules['stable_baselines3'] = None\nimport ringshm.stable_baselines3"
    process = script(program, stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "ImportError: ringshm.stable_baselines3 needs Stable-Baselines3, which is in the extra [sb3]" in errors
