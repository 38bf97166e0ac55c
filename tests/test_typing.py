"""A consumer's programs under `mypy --strict` and pyright's strict mode, with ringshm as an installed package.

Those in `consumers/` say with `assert_type` what is known of each value, and run. `wrong.py` marks each line that a
checker must not let pass with `# error:`; on no other line, and in no other program, may one be reported.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import ringshm
from ringshm import Channel, JoinableQueue, Latest, Queue, SimpleQueue, Spec

CONSUMERS = Path(__file__).parent / "consumers"
RIGHT = ["channels.py", "codecs.py", "tasks.py"]
Errors = dict[tuple[str, int], str]


@pytest.fixture(scope="module")
def consumer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs, and an environment in which ringshm is installed beside what it needs."""
    folder = tmp_path_factory.mktemp("consumer")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
    (site,) = (folder / ".venv").glob("lib/python*/site-packages")
    package = Path(ringshm.__file__).parent
    shutil.copytree(package, site / "ringshm", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copytree(CONSUMERS, folder / "programs", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _mypy(folder: Path, python: Path) -> Errors:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    command += ["--python-executable", str(python), "--cache-dir", str(folder / "cache"), "--config-file", ""]
    done = subprocess.run([*command, "programs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    found = re.findall(r"^programs/(\w+\.py):(\d+): error: (.*)", done.stdout, re.MULTILINE)
    assert len(found) == done.stdout.count(": error: "), done.stdout
    return {(name, int(line)): text for name, line, text in found}


def _pyright(folder: Path, python: Path) -> Errors:
    (folder / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "include": ["programs"], "reportUnusedExpression": False})
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(python)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] == len([*CONSUMERS.glob("*.py")])
    return {(Path(d["file"]).name, d["range"]["start"]["line"] + 1): d["message"] for d in told["generalDiagnostics"]}


@pytest.mark.slow(seconds=300)
@pytest.mark.parametrize("check", [_mypy, _pyright])
def test_checker_finds_the_mistakes_and_nothing_else(check: Callable[[Path, Path], Errors], consumer: Path) -> None:
    checker = check.__name__.removeprefix("_")
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed: pip install 'ringshm[test]' brings it")
    marked = {
        (program.name, number)
        for program in CONSUMERS.glob("*.py")
        for number, line in enumerate(program.read_text().splitlines(), 1)
        if "# error: " in line
    }
    assert marked and {name for name, _ in marked} == {"wrong.py"}
    found = check(consumer, consumer / ".venv" / "bin" / "python")
    assert {where: text for where, text in found.items() if where not in marked} == {}
    assert marked - found.keys() == set()


@pytest.mark.parametrize("program", RIGHT)
def test_program_runs(program: str) -> None:
    command = [sys.executable, "-W", "error", str(CONSUMERS / program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", [Channel, Latest, Queue, JoinableQueue, SimpleQueue])
def test_handle_made_with_its_type_pickles(kind: Any) -> None:
    class Message:
        """Of a function: it cannot be pickled, so the note that `kind[Message](…)` leaves cannot be either."""

    handle = kind[Message](slot_size=64) if kind is not Channel else Channel[Message](4, 64)
    with closing(handle), closing(pickle.loads(pickle.dumps(handle))) as other:
        assert type(other) is kind
        assert other.name == handle.name
        if kind is Latest:
            handle.publish("here")
            assert other.read() == (1, "here")
        else:
            handle.put("here")
            assert other.get() == "here"


def test_spec_told_its_type_is_the_same_spec() -> None:
    told = Spec[dict[str, float]]({"x": float})
    assert (type(told), told, pickle.loads(pickle.dumps(told))) == (Spec, Spec({"x": float}), told)
