"""Flaws to put into the compiled path, to see that the trials find them: VARIANTS, by what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Variant:
    """A flaw.

    Attributes:
        patches: texts of the sources, and what stands in their place.
        arguments: of `python -m kills.steps`, by which the flaw is found.
    """

    patches: Sequence[tuple[str, str]]
    arguments: Sequence[str]


_WRITE = "            self.write(slot, message)\n"
_APPEND = "            self.append(slot, message.meta >> 16)\n"
_LEAVE_SENDERS = "            self.leave(&self.senders)\n"
_SENT = "        self.leave(&self.senders)\n        return slot != self.capacity\n"
_FORGET = "            STORE(&self.words[self.record_of(slot) + R_META], 0)\n"
_DESCRIBE = "            self.describe(slot, message)\n"
_LOOK_AGAIN = """        FENCE()  # SYNC POINT a
        if LOAD(&self.words[GEN]) != gen:
            STORE(&self.words[mutex.hold], 0)
            return False
"""
_TAKE = "            STORE(&words[record], taken.own)\n"
_ALL_TAKEN = "        self.head_seen = head\n"
_LEAVE_RECEIVERS = "        self.leave(&self.receivers)\n"
_LEAVE_AT_FIRST = "            if count == 0:\n                self.leave(&self.receivers)\n"
_LEAVE_IF_NONE = "        if count == 0:\n            self.leave(&self.receivers)\n"
_DECODE = """        try:
            for at in range(count):
                received.append("""
_RELEASE = "        self.release(ring, reference, received, taken, count)\n"
_RETURN = "        return 0\n\n    @cython.final\n    cdef int fail("

VARIANTS: dict[str, Variant] = {
    "a message is sent before it is copied": Variant([(_WRITE + _APPEND, _APPEND + _WRITE)], ["put"]),
    "a message is sent before it is described": Variant(
        [(_WRITE + _APPEND, _WRITE + _FORGET + _APPEND + _DESCRIBE)], ["put"]
    ),
    "a message has no sequence": Variant([("        STORE(&words[record + R_SEQUENCE], tail)\n", "")], ["put"]),
    "the ring's entry is not stored": Variant(
        [("        STORE(&words[self.ring + (tail & self.mask)], slot)\n", "")], ["put"]
    ),
    "the hold word is never set": Variant(
        [("        STORE(&self.words[mutex.hold], gen)\n", "")], ["put", "--stops", "40"]
    ),
    "GEN is not read again": Variant([(_LOOK_AGAIN, "")], ["put", "--stops", "40"]),
    "the senders' mutex is left before a message is sent": Variant(
        [
            (_WRITE + _APPEND, _WRITE + _LEAVE_SENDERS + _APPEND),
            (_SENT, "        if slot == self.capacity:\n" + _LEAVE_SENDERS + "        return slot != self.capacity\n"),
        ],
        ["put", "--stops", "40"],
    ),
    "the receivers' mutex is left before a message is taken": Variant(
        [(_TAKE, _LEAVE_AT_FIRST + _TAKE), (_ALL_TAKEN + _LEAVE_RECEIVERS, _ALL_TAKEN + _LEAVE_IF_NONE)],
        ["get", "--stops", "40"],
    ),
    "who takes a message does not say so": Variant(
        [("state + TAKE + self.owner", "state + TAKE"), ("word & OWNER_MASK != ring.owner or ", "")], ["get"]
    ),
    "a slot is free before it is decoded": Variant(
        [(_RELEASE + _RETURN, _RETURN), (_DECODE, _RELEASE + _DECODE)], ["get"]
    ),
}


def build(variant: Variant, folder: Path) -> None:
    """Make the package with that flaw in a folder."""
    package = folder / "ringshm"
    left_out = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
    shutil.copytree(_ROOT / "ringshm", package, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, folder)
    for old, new in variant.patches:
        (source,) = [part for part in package.glob("ring/compiled_*.pxi") if old in part.read_text()]
        text = source.read_text()
        assert text.count(old) == 1, f"the flaw no longer fits: {text.count(old)} times in {source.name}:\n{old}"
        source.write_text(text.replace(old, new))
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace("-O3", "-O0"))  # which is made sooner
    program = "import sys; sys.argv = ['setup', '-q', 'build_ext', '--inplace']; import setuptools; setuptools.setup()"
    built = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert list((package / "ring").glob("compiled.*.so")), built.stdout + built.stderr


def find(variant: Variant, folder: Path, environment: dict[str, str]) -> str:
    """What the trials say of the package in the folder."""
    environment = {**environment, "PYTHONPATH": f"{folder}:{_ROOT / 'tests'}"}
    command = [sys.executable, "-m", "kills.steps", *variant.arguments, "--seed", "1", "--first-failure"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return ran.stdout + ran.stderr
