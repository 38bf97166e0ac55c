"""The README's programs run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program_of_the_readme_runs(program: str, tmp_path: Path) -> None:
    for module in ("msgspec", "torch"):
        if f"import {module}\n" in program:
            pytest.importorskip(module)
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_first_program_receives_every_message(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAMS[0])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "300 observations, mean 0.50\n"
