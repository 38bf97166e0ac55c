"""The README's programs run as they stand, and the errors, tests, files and headings that it names exist."""

from __future__ import annotations

import queue
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ringshm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(heading: str) -> str:
    (text,) = re.findall(rf"^## {heading}\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    return str(text)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table in a section, without its head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [line[1:-1].split("|") for line in lines[2:]]


def code(text: str) -> list[str]:
    return re.findall("`(.*?)`", text)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program_of_the_readme_runs(program: str, tmp_path: Path) -> None:
    for module in ("msgspec", "torch"):
        if f"import {module}\n" in program:
            pytest.importorskip(module)
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("number", "printed"),
    [(0, "300 observations, mean 0.50\n"), (1, r"learnt from 120 episodes, \d+ versions of the weights\n")],
)
def test_first_programs_receive_every_message(number: int, printed: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAMS[number])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=True)
    assert re.fullmatch(printed, done.stdout)


def test_each_error_is_in_the_table_with_what_it_derives_from() -> None:
    public = [getattr(ringshm, name) for name in ringshm.__all__]
    errors = [cls for cls in public if isinstance(cls, type) and issubclass(cls, BaseException)]
    expected = {cls.__name__: {base.__name__ for base in cls.__bases__} - {"RingshmError"} for cls in errors}
    expected |= {f"queue.{cls.__name__}": {"Exception"} for cls in (queue.Full, queue.Empty)}
    told = {code(name)[0]: set(code(bases)) for name, bases, _, _ in rows("Errors")}
    assert told == expected


def test_each_test_that_is_named_exists() -> None:
    """In the table, names of tests follow that of their file."""
    named = [code(tests) for _, tests in rows("Guarantees, and how each is tested")]
    for names in named:
        assert len(names) > 1 and names[0].startswith("tests/")
        source = ""
        for name in names:
            if name.startswith("tests/"):
                source = (ROOT / name).read_text()
            else:
                assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), name


def test_each_link_leads_somewhere() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\((?!https:)(.*?)\)", re.sub(r"`[^`]*`", "", prose))
    assert len(links) > 20
    for link in links:
        assert link in anchors if link.startswith("#") else (ROOT / link).is_file(), link
    for path in re.findall(r"\b(?:examples|perf|ringshm|tests)/[\w/]+\.\w+", README):
        assert (ROOT / path).is_file(), path
