"""Processes of two layout versions: each is told at once, in words that name both, and both go on among their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ringshm.segment.layout import LAYOUT_VERSION

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = "ringshm/segment/layout.py"
#: Makes a channel of that name, says so, and at each line that it is given passes a message through it.
SERVES = """
import sys, ringshm
channel = ringshm.Channel(2, 64, name=sys.argv[1])
print("made", flush=True)
for line in sys.stdin:
    channel.put(line.strip())
    print(channel.get(), flush=True)
"""
ATTACHES = """
import sys, ringshm
try:
    ringshm.Channel.attach(sys.argv[1])
except ringshm.RingshmError as error:
    print(type(error).__name__, error)
"""


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    if done.returncode:
        pytest.skip(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def _version_of(commit: str) -> int:
    (line,) = [line for line in _git("show", f"{commit}:{LAYOUT}").decode().splitlines() if line.startswith("LAYOUT_V")]
    return int(line.rpartition("=")[2])


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A wheel of the last commit whose layout differed, unpacked, and its layout version."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    changed = _git("log", "--format=%H", "-G^LAYOUT_VERSION", "--", LAYOUT).decode().split()
    if not changed:
        pytest.skip("this checkout has no history")
    folder = tmp_path_factory.mktemp("older")
    commit = f"{changed[0]}^"
    (folder / "source.tar").write_bytes(_git("archive", commit))
    shutil.unpack_archive(folder / "source.tar", folder / "source", filter="data")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(folder / "source"),
    ]
    made = subprocess.run(command, env={**os.environ, "CC": "/bin/false"}, capture_output=True, text=True)
    if "No matching distribution" in made.stderr or "No module named pip" in made.stderr:
        pytest.skip(f"pip finds no Cython: {made.stderr[-300:]}")
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "package")
    version = _version_of(commit)
    assert version != LAYOUT_VERSION
    return folder / "package", version


def _python(package: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}


def _passes(server: subprocess.Popen[str], message: str) -> bool:
    assert server.stdin and server.stdout
    server.stdin.write(f"{message}\n")
    server.stdin.flush()
    return server.stdout.readline() == f"{message}\n"


@pytest.mark.slow(seconds=120)
@pytest.mark.parametrize("made_by", ["older", "newer"])
def test_each_is_told_which_versions_there_are_and_both_go_on(made_by: str, older: tuple[Path, int]) -> None:
    package, version = older
    theirs, mine = (package, ROOT) if made_by == "older" else (ROOT, package)
    made, reads = (version, LAYOUT_VERSION) if made_by == "older" else (LAYOUT_VERSION, version)
    name = f"versions-{os.getpid()}-{made_by}"
    with subprocess.Popen(
        [sys.executable, "-c", SERVES, name],
        env=_python(theirs),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout and server.stdout.readline() == "made\n"
        assert _passes(server, "before")
        told = subprocess.run(
            [sys.executable, "-c", ATTACHES, name], env=_python(mine), capture_output=True, text=True, timeout=60
        )
        assert told.stdout.startswith("IncompatibleChannel "), told
        assert name in told.stdout
        assert f" {made}" in told.stdout
        assert f"{reads}: use the same version of ringshm in all processes" in told.stdout
        assert _passes(server, "after")
        command = [sys.executable, "-c", SERVES, f"{name}-own"]
        own = subprocess.run(command, env=_python(mine), input="mine\n", capture_output=True, text=True, timeout=60)
        assert own.stdout.splitlines() == ["made", "mine"], own
        assert server.stdin
        server.stdin.close()
    assert server.returncode == 0
