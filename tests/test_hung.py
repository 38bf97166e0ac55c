"""A test that hangs ends the run, whatever it has started; and what hangs says where: see support/hung.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.workers import TESTS

HANGS = """
import os, subprocess, sys, time

def test_hangs():
    os.fork()  # its child has the pipe, too, by which the worker speaks
    source = "import os, time\\nos.write(1, b'%d' % os.getpid())\\ntime.sleep(1e6)"
    with open("PIDFILE", "wb") as file:
        subprocess.run([sys.executable, "-c", source], stdout=file)

def test_goes_on():
    pass
"""


@pytest.mark.slow
def test_a_test_that_hangs_ends_and_its_processes_say_where_they_stand(tmp_path: Path) -> None:
    file, pids = tmp_path / "test_hangs.py", tmp_path / "pid"
    file.write_text(HANGS.replace("PIDFILE", str(pids)))
    options = ["-p", "conftest", "-n", "2", "--slower", "0.03", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST")}
    run = subprocess.run([sys.executable, "-m", "pytest", *options], env=environment, capture_output=True, text=True)
    assert "1 failed, 1 passed" in run.stdout, run.stdout
    pid = int(pids.read_text())
    assert f"process {pid}: {sys.executable} -c" in run.stdout
    assert 'File "<string>", line 3 in <module>' in run.stdout.partition(f"process {pid}")[2]
    assert not Path(f"/proc/{pid}").exists()
