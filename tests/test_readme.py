"""The READMEs' programs run as they stand, and what they name exists: errors, methods, tests, files, code, headings."""

from __future__ import annotations

import ast
import contextlib
import inspect
import multiprocessing.spawn
import os
import queue
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringshm
from ringshm.process import attachment
from ringshm.ring import diagnosis

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ringshm"
#: Where the READMEs are. Paths in their text start from the repository, or from the README's own folder.
FOLDERS = [ROOT, PACKAGE, ROOT / "examples", ROOT / "perf", ROOT / "tests"]
TEXTS = {folder: (folder / "README.md").read_text() for folder in FOLDERS}
MOST_WORDS = 2500

each_readme = pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])


def programs(folder: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", TEXTS[folder], re.MULTILINE | re.DOTALL)


PROGRAMS = [
    pytest.param(program, id=f"{folder.name}-{number}")
    for folder in FOLDERS
    for number, program in enumerate(programs(folder))
]


def prose(folder: Path) -> str:
    """What stands outside of programs and consoles."""
    return re.sub(r"^```.*?^```$", "", TEXTS[folder], flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    return re.findall("`([^`]+)`", text)


def section(folder: Path, heading: str) -> str:
    (text,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", prose(folder), re.MULTILINE | re.DOTALL)
    return str(text)


def rows(folder: Path, heading: str) -> list[list[str]]:
    """The cells of the tables in a section, without heads and rules."""
    lines = [line for line in section(folder, heading).splitlines() if line.startswith("|")]
    rules = [number for number, line in enumerate(lines) if not line.strip("|-: ")]
    heads = {number - 1 for number in rules} | set(rules)
    return [line[1:-1].split("|") for number, line in enumerate(lines) if number not in heads]


def run(program: str, directory: Path) -> str:
    """Run a program as a user would; what it printed. One that hangs, or fails, leaves no actors behind."""
    script = directory / "program.py"
    script.write_text(program)
    command, pipe = [sys.executable, str(script)], subprocess.PIPE
    # PyTorch's threads spin while they wait for one another: beside other tests that took ten times as long
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True) as process:
        try:
            printed, errors = process.communicate(timeout=150)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, errors) == (0, "")
    return printed


# --- programs


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_of_a_readme_runs(program: str, tmp_path: Path) -> None:
    for module in ("gymnasium", "msgspec", "ray", "stable_baselines3", "tensordict", "torch"):
        if re.search(rf"import {module}\n|from {module} import|ringshm\.{module}", program):
            pytest.importorskip(module)
    run(program, tmp_path)


@pytest.mark.parametrize(
    ("folder", "printed"),
    [
        (ROOT, "300 observations, mean 0.50\n"),
        (ROOT / "examples", r"learnt from 120 episodes, \d+ versions of the weights\n"),
    ],
    ids=["messages", "actors and a learner"],
)
def test_first_programs_receive_every_message(folder: Path, printed: str, tmp_path: Path) -> None:
    assert re.fullmatch(printed, run(programs(folder)[0], tmp_path))


# --- the top README


def test_the_top_readme_is_short() -> None:
    assert len(TEXTS[ROOT].split()) <= MOST_WORDS


def test_the_top_readme_has_one_command_for_the_tests() -> None:
    """`.ci/run` takes it from there."""
    assert len(re.findall(r"^\$ (.*-m pytest)$", TEXTS[ROOT], re.MULTILINE)) == 1


def test_each_error_is_in_the_table_with_what_it_derives_from() -> None:
    public = [getattr(ringshm, name) for name in ringshm.__all__]
    errors = [cls for cls in public if isinstance(cls, type) and issubclass(cls, BaseException)]
    expected = {cls.__name__: {base.__name__ for base in cls.__bases__} - {"RingshmError"} for cls in errors}
    expected |= {f"queue.{cls.__name__}": {"Exception"} for cls in (queue.Full, queue.Empty)}
    told = {code(name)[0]: set(code(bases)) for name, bases, _, _ in rows(ROOT, "Errors")}
    assert told == expected


def _methods(cls: type) -> set[str]:
    """Names of a class's public methods and properties."""
    members = {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}
    kinds = (property, classmethod, staticmethod)
    return {name for name, member in members.items() if inspect.isroutine(member) or isinstance(member, kinds)}


def test_the_table_of_methods_names_each_and_no_other() -> None:
    """Where a method stands with its parameters, they are those that it has, with their defaults."""
    told: dict[str, set[str]] = {"Channel": set(), "Latest": set()}
    for text in [token for first, *rest in rows(ROOT, "Use") for token in code(first)]:
        if text.isidentifier() and text in told:
            continue
        call = ast.parse(text, mode="eval").body
        path = ast.unparse(call.func if isinstance(call, ast.Call) else call)
        kind, _, name = path.rpartition(".")
        told[kind or "Channel"].add(name)
        method = getattr(getattr(ringshm, kind or "Channel"), name)
        if not isinstance(call, ast.Call):
            continue
        parameters = {
            parameter.name: None if parameter.default is parameter.empty else repr(parameter.default)
            for parameter in inspect.signature(method).parameters.values()
            if parameter.name != "self"
        }
        given: dict[str, str | None] = {ast.unparse(argument): None for argument in call.args}
        given |= {str(keyword.arg): ast.unparse(keyword.value) for keyword in call.keywords}
        assert given == parameters, text
    handles = [ringshm.Channel, ringshm.Sender, ringshm.Receiver]
    assert told["Channel"] == set().union(*map(_methods, handles))
    assert told["Latest"] <= _methods(ringshm.Latest)
    assert _methods(ringshm.Latest) <= told["Latest"] | told["Channel"]


def test_what_one_sees_when_it_seems_stuck_is_what_is_said_then() -> None:
    said = "".join(map(inspect.getsource, (diagnosis, attachment, multiprocessing.spawn)))
    seen = [text for see, _, _ in rows(ROOT, "When it seems stuck") for text in code(see) if len(text.split()) > 2]
    assert len(seen) > 4
    assert [text for text in seen if text not in said] == []


# --- what they name


@each_readme
def test_each_test_that_is_named_exists(folder: Path) -> None:
    """Names of tests follow that of their file."""
    source = ""
    for name in code(prose(folder)):
        if re.fullmatch(r"tests/[\w/]+\.py", name):
            source = (ROOT / name).read_text()
        elif re.fullmatch(r"test_\w+", name):
            assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), name


def test_each_guarantee_names_a_test() -> None:
    table = rows(ROOT / "tests", "The guarantees")
    assert len(table) > 20
    for guarantee, tests in table:
        assert any(name.startswith("test_") for name in code(tests)), guarantee


def anchors(folder: Path) -> set[str]:
    """What a link may lead to within a README, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(folder), re.MULTILINE)
    made = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(made)) == len(made)
    return set(made)


@each_readme
def test_each_link_leads_somewhere(folder: Path) -> None:
    """Links, and pictures; also one within a link's text."""
    found = re.findall(r"\]\((?!https:)(.*?)\)", re.sub(r"`[^`]*`", "", prose(folder)))
    assert found
    for link in found:
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else folder / "README.md"
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.parent), link


@each_readme
def test_each_path_that_is_named_exists(folder: Path) -> None:
    """Anywhere, those below the repository's folders; in code, also files without a folder, and folders."""
    for path in re.findall(r"\b(?:examples|perf|ringshm|tests)/[\w/]+\.\w+", TEXTS[folder]):
        assert (ROOT / path).is_file(), path
    for text in code(prose(folder)):
        path, _, _ = text.partition(": ")
        if re.fullmatch(r"[\w./]+(\.(py|md|svg|toml)|/)", path) and "/dev/" not in path:
            there = any((start / path).exists() for start in (ROOT, folder, PACKAGE))
            assert there or ("/" not in path and any(folder.rglob(path))), path


def defined(module: Path) -> Iterator[str]:
    """What a module defines: functions, classes, their methods, constants."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{inner.name}"
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from map(ast.unparse, target.elts if isinstance(target, ast.Tuple) else [target])


@each_readme
def test_code_that_is_named_exists(folder: Path) -> None:
    """`ring/slots.py: Ring.send` in a README says where that is in the package."""
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", prose(folder))
    assert named or folder != PACKAGE
    files = {path: PACKAGE / path for path, _ in named}
    names = {path: set(defined(file)) if file.is_file() else set() for path, file in files.items()}
    assert [f"{path}: {name}" for path, name in named if name not in names[path]] == []


def test_the_house_has_each_file_in_its_folder() -> None:
    told = {file for files, _ in rows(PACKAGE, "The house") for file in code(files) if file.endswith(".py")}
    files = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")}
    assert told == {file for file in files if "/__init__" not in file}
