"""The package is built with the compiled path where there is a C compiler, and without it where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ringshm

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "import ringshm; print(ringshm.accelerated); c = ringshm.Channel(2, 64); c.put(1); print(c.get())"


def _built(folder: Path, **environment: str) -> list[str]:
    """Make a wheel of the tree, by build isolation as a user's pip does, and unpack it; what PROGRAM prints with it."""
    source, wheels, package = folder / "source", folder / "wheels", folder / "package"
    source.mkdir()
    shutil.copytree(ROOT / "ringshm", source / "ringshm", ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(source)]
    made = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if "No matching distribution" in made.stderr or "No module named pip" in made.stderr:
        pytest.skip(f"pip finds no Cython: {made.stderr[-300:]}")
    assert made.returncode == 0, made.stderr
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(package)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(package), "RINGSHM_PURE": ""},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.slow(seconds=60)
@pytest.mark.skipif(bool(ringshm.accelerated) and "RINGSHM_PURE" not in ringshm.accelerated, reason=ringshm.accelerated)
def test_a_build_has_the_compiled_path(tmp_path: Path) -> None:
    assert _built(tmp_path) == ["", "1"]


@pytest.mark.slow(seconds=60)
def test_without_a_compiler_the_package_is_pure_and_says_so(tmp_path: Path) -> None:
    said, got = _built(tmp_path, CC="/bin/false")
    assert "was not built" in said
    assert got == "1"
