"""Flaws to put into the compiled path, to see that the trials find them: VARIANTS, by what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
_SOURCE = "ringshm/ring/compiled.pyx"


@dataclass(frozen=True)
class Variant:
    """A flaw.

    Attributes:
        patches: texts of the source, and what stands in their place.
        arguments: of `python -m kills.steps`, by which the flaw is found.
    """

    patches: Sequence[tuple[str, str]]
    arguments: Sequence[str]


_WRITE = "        self.write(slot, record, message)\n"
_APPEND = "        self.append(slot, record, tail, message.meta >> 16)\n"
_LEAVE_SENDERS = "        self.leave(self.senders, hold, gen)\n"
_FORGET = "        STORE(&words[record + R_META], 0)\n"
_DESCRIBE = "        self.describe(record, message)\n"
_LOOK_AGAIN = """        FENCE()  # SYNC POINT a
        if LOAD(&self.words[GEN]) != gen:
            STORE(&self.words[hold], 0)
            return 0
"""
_TAKE = "            STORE(&words[record], taken.own)\n"
_ALL_TAKEN = "        self.head_seen = head\n"
_LEAVE_RECEIVERS = "        self.leave(self.receivers, hold, gen)\n"
_LEAVE_AT_FIRST = "            if count == 0:\n                self.leave(self.receivers, hold, gen)\n"
_LEAVE_IF_NONE = "        if count == 0:\n            self.leave(self.receivers, hold, gen)\n"
_DECODE = "        try:\n            value = self.decode(ring, &taken)\n"
_RELEASE = "        self.release(ring, &taken, reference)\n"
_RECEIVED = "        received.append(value)\n"

VARIANTS: dict[str, Variant] = {
    "a message is sent before it is copied": Variant([(_WRITE + _APPEND, _APPEND + _WRITE)], ["put"]),
    "a message is sent before it is described": Variant(
        [(_WRITE + _APPEND, _WRITE + _FORGET + _APPEND + _DESCRIBE)], ["put"]
    ),
    "a message has no sequence": Variant([("        STORE(&words[record + R_SEQUENCE], tail)\n", "")], ["put"]),
    "the ring's entry is not stored": Variant(
        [("        STORE(&words[self.ring + (tail & self.mask)], slot)\n", "")], ["put"]
    ),
    "the hold word is never set": Variant([("        STORE(&self.words[hold], gen)\n", "")], ["put", "--stops", "40"]),
    "GEN is not read again": Variant([(_LOOK_AGAIN, "")], ["put", "--stops", "40"]),
    "the senders' mutex is left before a message is sent": Variant(
        [(_WRITE + _APPEND + _LEAVE_SENDERS, _WRITE + _LEAVE_SENDERS + _APPEND)], ["put", "--stops", "40"]
    ),
    "the receivers' mutex is left before a message is taken": Variant(
        [(_TAKE, _LEAVE_AT_FIRST + _TAKE), (_ALL_TAKEN + _LEAVE_RECEIVERS, _ALL_TAKEN + _LEAVE_IF_NONE)],
        ["get", "--stops", "40"],
    ),
    "who takes a message does not say so": Variant([("state + TAKE + self.owner", "state + TAKE")], ["get"]),
    "a slot is free before it is decoded": Variant(
        [(_DECODE, _RELEASE + _DECODE), (_RELEASE + _RECEIVED, _RECEIVED)], ["get"]
    ),
}


def build(variant: Variant, folder: Path) -> None:
    """Make the package with that flaw in a folder."""
    package = folder / "ringshm"
    left_out = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
    shutil.copytree(_ROOT / "ringshm", package, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, folder)
    source = (folder / _SOURCE).read_text()
    for old, new in variant.patches:
        assert source.count(old) == 1, f"the flaw no longer fits: {source.count(old)} times in {_SOURCE}:\n{old}"
        source = source.replace(old, new)
    (folder / _SOURCE).write_text(source)
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace("-O2", "-O0"))  # which is made sooner
    program = "import sys; sys.argv = ['setup', '-q', 'build_ext', '--inplace']; import setuptools; setuptools.setup()"
    built = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert list((package / "ring").glob("compiled.*.so")), built.stdout + built.stderr


def find(variant: Variant, folder: Path, environment: dict[str, str]) -> str:
    """What the trials say of the package in the folder."""
    environment = {**environment, "PYTHONPATH": f"{folder}:{_ROOT / 'tests'}"}
    command = [sys.executable, "-m", "kills.steps", *variant.arguments, "--seed", "1", "--first-failure"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return ran.stdout + ran.stderr
