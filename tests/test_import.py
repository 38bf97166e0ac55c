"""What refuses to import ringshm says what to do instead."""

from __future__ import annotations

import subprocess

from support.workers import script


def test_the_import_on_another_system_than_linux_is_refused() -> None:
    process = script("import sys\nsys.platform = 'darwin'\nimport ringshm", stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "ImportError: ringshm runs on Linux only, not on darwin: run the program in a Linux container" in errors
