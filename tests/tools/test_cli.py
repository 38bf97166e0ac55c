"""The command line: it tells what there is and why it stands still, and disturbs nobody by looking."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import workers
from support.terminals import Terminal, four_participants, seen

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
        assert live[8:11] == ["2", "50%", "3"]  # ready, fill, sent
        assert f"\n  senders: {os.getpid()}; receivers: {os.getpid()}\n" in text
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
            assert re.search(rf"{name} +live .*\n  layout version 999", text)
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
        latest_row = rf"{name} +live +3 x 1000 B .* 3  .*\n  Latest; publishers: {os.getpid()}\n"
        assert re.search(latest_row, run("ls")[1])
        latest.publish(np.zeros(10))
        with latest.borrow():
            status, text = run("stats", name)
            lines = text.splitlines()
            assert (status, lines[0].startswith(f"{name}: live, a Latest of 1000 B, borrows=1,")) == (0, True)
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
    assert max(map(len, text.splitlines())) <= 80


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


# --- on a terminal


def _on_a_terminal(*argv: str, columns: int = 80) -> list[str]:
    """The lines that a command shows on a terminal."""
    terminal = Terminal(*argv, columns=columns)
    assert terminal.end() == 0
    return seen(terminal.shown)


def test_a_channel_with_four_participants_fits_24_lines_of_80_columns(name: str) -> None:
    with four_participants(name) as pids:
        creator, first, second, receiver = pids
        lines: list[str] = []
        while sum("space" in line.split() for line in lines) < 2:  # a sender that looks round just now is not waiting
            lines = _on_a_terminal("stats", name)
        text = "\n".join(lines)
        assert len(lines) <= 24 and max(map(len, lines)) <= 80
        assert lines[0] == f"{name}: live, 8 slots of 64 KiB, 616 KiB of shared memory"
        assert lines[1].startswith("  ! the ring is full: 8 of 8 slots hold messages that wait; 2 threads wait for")
        at = next(at for at, line in enumerate(lines) if line.split()[:1] == ["pid"])
        assert lines[at].split() == ["pid", "process", "state", "handles", "waits", "for", "last", "call", "attached"]
        people = {int(line.split()[0]): line.split()[2:5] for line in lines[at + 1 : at + 5]}
        assert people[creator][:2] == ["alive", "sender"]
        assert people[first] == people[second] == ["alive", "sender", "space"]
        assert people[receiver][:2] == ["alive", "receiver"]
        assert "waiting   2 senders, 0 receivers" in text
        shown = _on_a_terminal("ls")
        row = shown.index(next(line for line in shown if line.startswith(name)))
        assert shown[row].split()[1:10] == ["live", "8", "x", "64", "KiB", "616", "KiB", "8", "100%"]
        assert shown[row + 1] == f"  senders: {creator}, {first}, {second}; receivers: {receiver}"
        assert max(map(len, shown)) <= 80


def test_a_long_name_is_shown_whole(name: str) -> None:
    long = f"{name}-{'of-many-rollouts-' * 6}end"
    with Channel(1, 64, name=long), Channel(1, 64, name=f"{name}-short"):
        for columns in (80, 40):
            for argv in (["ls"], ["stats", long]):
                lines = _on_a_terminal(*argv, columns=columns)
                assert all(len(line) <= columns or line.startswith(long) for line in lines)
                assert long in "\n".join(lines)
        (short,) = [line for line in _on_a_terminal("ls") if line.startswith(f"{name}-short")]
        assert short.split()[1:5] == ["live", "1", "x", "64"]


def test_what_sixty_participants_do_leaves_the_diagnosis_on_the_screen(name: str) -> None:
    with Channel(4, 64, name=name, max_participants=80) as channel, workers.Crew("fork") as crew:
        channel.put("x")
        for _ in range(60):
            crew.start(workers.get_all, channel.receiver())
        channel.sender()
        workers.until(lambda: len(channel.stats().participants) == 61 and channel.stats().waiting_receivers == 60)
        lines = _on_a_terminal("stats", name)
        assert lines[0].startswith(f"{name}: live")
        assert len(lines) <= 24
        assert "    53 more: `ringshm stats NAME | less`" in lines
        terminal = _ringshm("stats", name)
        assert terminal.communicate()[0].count("receiver  ") >= 60  # elsewhere all are shown


def test_colours_are_shown_on_a_terminal_unless_refused(name: str) -> None:
    with Channel(1, 64, name=name) as channel:
        channel.put("x")
        for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
            terminal = Terminal("stats", name, **environment)
            assert terminal.end() == 0
            assert ("\x1b[1;31m  ! " in terminal.shown) == coloured  # full, and no receiver
            assert ("\x1b" in terminal.shown) == coloured
