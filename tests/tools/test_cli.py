"""The command line: it tells what there is and why it stands still, and disturbs nobody by looking."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import workers

from ringshm import Channel, EndOfChannel, Latest
from ringshm.segment.files import PREFIX, Segment, path_of
from ringshm.tools import doctor
from ringshm.tools.cli import main

pytestmark = workers.may_fork

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its status, and what it printed, which is one line if it failed."""

    def run(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main(argv)
        out, errors = capsys.readouterr()
        assert len(errors.splitlines()) == (1 if status and not out else 0)
        return status, out + errors

    return run


def _ringshm(*argv: str) -> subprocess.Popen[str]:
    environment = dict(os.environ, PYTHONPATH=str(workers.TESTS.parent))
    command = [sys.executable, "-m", "ringshm", *argv]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _corpse(name: str) -> None:
    def child() -> None:
        channel = Channel(3, "10KiB", name=name)
        channel.put("left behind")
        os.kill(os.getpid(), signal.SIGKILL)

    assert workers.exit_code(workers.fork_off(child)) == -signal.SIGKILL


def _line(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if name in line]
    return line


# --- ls


def test_ls_shows_the_living_and_the_dead(name: str, run: Run) -> None:
    _corpse(f"{name}-dead")
    with Channel(4, "64KiB", name=f"{name}-live") as channel:
        for k in range(3):
            channel.put(k)
        channel.get()
        status, text = run("ls")
        assert status == 0
        live = _line(text, f"{name}-live").split()
        assert live[1:5] == ["live", "4", "x", "64"]
        assert live[8:13] == ["2", "50%", "1", "1", "3"]  # ready, fill, senders, receivers, sent
        dead = _line(text, f"{name}-dead").split()
        assert dead[1:5] == ["dead", "3", "x", "10"]
        assert "ringshm clean" in text
    run("clean")


def test_ls_json_says_what_stats_say(name: str, run: Run) -> None:
    with Channel(4, 64, name=name) as channel:
        channel.put("x")
        (found,) = [found for found in json.loads(run("ls", "--json")[1])["channels"] if found["name"] == name]
        assert (found["live"], found["capacity"], found["slot_size"]) == (True, 4, 64)
        assert found["size"] == os.stat(found["path"]).st_size
        assert found["stats"]["sent"] == 1
        assert [person["pid"] for person in found["stats"]["participants"]] == [os.getpid()]


def test_ls_shows_other_versions_and_what_is_no_channel(name: str, run: Run) -> None:
    Path(path_of(f"{name}-junk")).write_text("junk")
    try:
        with Channel(1, 64, name=name) as channel:
            segment = channel._attachment.segment  # type: ignore[union-attr]
            version, segment.words[1] = segment.words[1], 999
            status, text = run("ls")
            assert status == 0
            assert "live, layout version 999" in text
            assert re.search(rf"{name}-junk +no channel", text)
            assert f"{PREFIX}{name}-junk is no ringshm segment: it has 4 bytes. Remove it" in text
            status, text = run("stats", name)
            assert (status, "layout version 999" in text) == (1, True)
            segment.words[1] = version
    finally:
        Path(path_of(f"{name}-junk")).unlink()


def test_names_cannot_command_the_terminal(name: str, run: Run) -> None:
    strange = name + "\x1b[31m\n" + os.fsdecode(b"\xff") + "[red]"
    with Channel(1, 64, name=strange):
        for argv in (["ls"], ["stats", strange]):
            status, text = run(*argv)
            assert status == 0
            assert f"{name}\\x1b[31m\\n\\udcff[red]" in text
            assert "\x1b" not in text
        assert json.loads(run("stats", strange, "--json")[1])["name"] == strange


# --- stats


def test_stats_says_first_why_it_is_stuck(name: str, run: Run) -> None:
    with Channel(2, 64, name=name) as channel, workers.Crew("fork") as crew:
        channel.put("one")
        channel.put("two")
        child = crew.start(channel.put, "three")
        shown: list[tuple[int, str]] = []  # the child waits for nothing before it blocks, and between two slices
        workers.until(lambda: shown.append(run("stats", name)) or re.search(rf"\n *{child.pid} .* space", shown[-1][1]))
        status, text = shown[-1]
        lines = text.splitlines()
        assert (status, lines[0].startswith(f"{name}: live, 2 slots of 64 B")) == (0, True)
        assert "the ring is full: 2 of 2 slots" in lines[1]
        assert f"1 thread waits for space (pid {child.pid})" in lines[1]
        document = json.loads(run("stats", name, "--json")[1])
        assert document["findings"][0]["problem"]
        assert {person["pid"] for person in document["stats"]["participants"]} == {os.getpid(), child.pid}
        assert document["processes"][str(child.pid)]["state"] in "RSD"
        assert [channel.get() for _ in range(3)] == ["one", "two", "three"]


def test_a_latest_is_shown_as_what_it_is(name: str, run: Run) -> None:
    with Latest(1000, name=name, borrows=1) as latest:
        for k in range(3):
            latest.publish(k)
        assert re.search(rf"{name} +live +3 x 1000 B .* 1 +0 +3 ", run("ls")[1])
        latest.publish(np.zeros(10))
        with latest.borrow():
            status, text = run("stats", name)
            lines = text.splitlines()
            assert (status, lines[0].startswith(f"{name}: live, 3 slots of 1000 B")) == (0, True)
            assert f"readers ({os.getpid()}) hold 4, all the versions that borrows=1 allows" in lines[1]
            assert "the newest version is 4" in lines[2]
            document = json.loads(run("stats", name, "--json")[1])
            assert document["options"]["kind"] == "Latest"
            assert document["stats"]["version"] == 4
            assert document["stats"]["nbytes"] == 80
            assert document["stats"]["held"] == [{"version": 4, "pid": os.getpid(), "alive": True}]
        reader = workers.fork_off(lambda: latest.read(newer_than=4))
        workers.until(lambda: f"1 thread waits for a newer version than 4 (pid {reader})" in run("stats", name)[1])
        latest.publish("more")
        assert workers.exit_code(reader) == 0


def test_stats_of_a_channel_of_the_dead(name: str, run: Run) -> None:
    _corpse(name)
    status, text = run("stats", name)
    assert status == 0
    assert f"{name}: dead" in text
    assert "no process that uses this channel is alive; 1 message unread" in text
    run("clean")


@pytest.mark.parametrize(
    ("wrong", "says"), [("nobody-made-this", "there is no channel"), ("a/b", "no slash"), ("", "empty")]
)
def test_stats_of_no_channel_is_one_line_and_status_1(wrong: str, says: str, run: Run) -> None:
    status, text = run("stats", wrong)
    assert status == 1
    assert text.startswith("ringshm: ")
    assert says in text


def test_looking_changes_nothing_in_the_segment(name: str, run: Run) -> None:
    stay = "import sys, ringshm\nchannel = ringshm.Channel.attach(sys.argv[1])\nprint(flush=True)\nsys.stdin.read()"
    with Channel(4, 64, name=name) as channel:
        channel.put("x")
        other = workers.started(stay, name, stdin=subprocess.PIPE)
        segment = channel._attachment.segment  # type: ignore[union-attr]
        files = workers.ringshm_files()
        before = bytes(segment.memory)
        for argv in (["ls"], ["stats", name], ["stats", name, "--json"], ["doctor"], ["clean"]):
            run(*argv)
        assert bytes(segment.memory) == before
        assert workers.ringshm_files() == files
        workers.finish(other)


OBSERVE = """
import sys
from ringshm.ring.participants import Participants
from ringshm.segment.files import Segment
from ringshm.ring.stats import take_stats
segment = Segment.observe(sys.argv[1])
print(len(take_stats(segment, Participants(segment)).participants), flush=True)
sys.stdin.read()
print(take_stats(segment, Participants(segment)).sent)
"""


def test_who_looks_is_no_participant_and_keeps_nothing_alive(name: str) -> None:
    before = workers.ringshm_files()
    channel = Channel(4, 64, name=name)
    observer = workers.script(OBSERVE, name, stdin=subprocess.PIPE)
    assert workers.line_of(observer) == "1"
    assert len(channel.stats().participants) == 1
    assert workers.exit_code(workers.fork_off(lambda: channel.put("last"))) == 0
    assert channel.get() == "last"
    with pytest.raises(EndOfChannel):
        channel.get()
    channel.close()
    assert workers.ringshm_files() == before
    assert workers.finish(observer) == "1\n"


def test_who_looks_cannot_write(name: str) -> None:
    with Channel(1, 64, name=name):
        segment = Segment.observe(name)
        with pytest.raises(TypeError):
            segment.words[0] = 0


# --- doctor and clean


def test_doctor_says_what_to_do_and_fails_if_anything_is_wrong(name: str, run: Run) -> None:
    _corpse(name)
    status, text = run("doctor")
    assert status == 1
    assert re.search(r"warn +left by dead processes: \d+ segments? of .*\n +ringshm clean\n", text)
    checks = json.loads(run("doctor", "--json")[1])["checks"]
    assert [check["level"] for check in checks if "left by" in check["subject"]] == ["warn"]
    run("clean")


def test_doctors_status_is_0_where_all_is_well(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check(doctor.OK, "everything", "fine")])
    assert run("doctor") == (0, "ok    everything: fine\n")


def test_clean_says_what_it_removes_and_can_only_say_so(name: str, run: Run) -> None:
    before = workers.ringshm_files()
    _corpse(name)
    path = path_of(name)
    status, text = run("clean", "--dry-run")
    assert (status, f"would remove {path} and its semaphores" in text) == (0, True)
    assert os.path.exists(path)
    removed = json.loads(run("clean", "--json")[1])
    assert path in [segment["path"] for segment in removed["segments"]]
    assert workers.ringshm_files() <= before
    assert run("clean") == (0, "nothing to remove\n")


# --- as a program


def test_the_module_runs_as_a_program(name: str) -> None:
    with Channel(1, 64, name=name):
        process = _ringshm("ls")
        out, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        assert name in out
        assert "\x1b" not in out  # piped: plain text
    process = _ringshm("stats", name)
    said = f"ringshm: there is no channel {name!r}: `ringshm ls` lists the channels of this user\n"
    assert process.communicate() == ("", said)
    assert process.returncode == 1


@pytest.mark.parametrize("argv", [[], ["dance"], ["stats"], ["ls", "--yaml"]])
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: ringshm" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["ls"], ["stats"], ["top"], ["doctor"], ["clean"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) >= 10
    assert max(map(len, text.splitlines())) <= 120


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = dict(os.environ, PYTHONPATH=str(workers.TESTS.parent))
    done = subprocess.run(
        [sys.executable, "-m", "ringshm", "doctor", "--json"], env=environment, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("command", ["ls", "doctor --json", "top --seconds 0.1"])
def test_an_output_that_is_closed_is_no_traceback(command: str) -> None:
    environment = dict(os.environ, PYTHONPATH=str(workers.TESTS.parent))
    line = ["sh", "-c", f'exec "$0" -m ringshm {command} >&-', sys.executable]
    done = subprocess.run(line, env=environment, stderr=subprocess.PIPE)
    assert done.stderr == b""


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> list[doctor.Check]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert main(["doctor"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")


def _on_a_terminal(source: str, *argv: str, **environment: str) -> str:
    """What a script that runs the command line shows on a terminal."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", source, *argv]
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "PYTHONPATH")}
    environment = dict(base, PYTHONPATH=str(workers.TESTS.parent), TERM="xterm", COLUMNS="150", **environment)
    process = subprocess.Popen(command, env=environment, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(controller, 65536)
        except OSError:  # EIO: the other end is closed
            break
    os.close(controller)
    assert process.wait() == 0, shown
    return shown.decode()


MAIN = "import sys\nfrom ringshm.tools.cli import main\nsys.exit(main(sys.argv[1:]))"
WITHOUT_RICH = "import sys\nsys.modules['rich'] = sys.modules['rich.console'] = None\n" + MAIN


def test_on_a_terminal_there_are_tables_and_colours_unless_refused(name: str) -> None:
    pytest.importorskip("rich")
    with Channel(1, 64, name=name) as channel:
        channel.put("x")
        shown = _on_a_terminal(MAIN, "stats", name)
        assert "\x1b[1;31m" in shown  # full, and no receiver
        assert "│" in shown
        shown = _on_a_terminal(MAIN, "stats", name, NO_COLOR="1")
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)
        assert "│" in shown


def test_without_rich_a_terminal_gets_plain_text(name: str) -> None:
    with Channel(1, 64, name=name):
        shown = _on_a_terminal(WITHOUT_RICH, "ls")
        assert name in shown
        assert "\x1b" not in shown
