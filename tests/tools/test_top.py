"""`ringshm top`: what it says is what other processes count, and what it watches does not notice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import workers
from support.terminals import Terminal, four_participants

from ringshm import Channel, Latest
from ringshm.segment.files import path_of
from ringshm.tools.cli import main
from ringshm.tools.pages import Page
from ringshm.tools.sampler import Point, Sampler, Watched, rates_between
from ringshm.tools.text import in_short
from ringshm.tools.top import facts, show_overview, trend

pytestmark = workers.may_fork


def _top(*argv: str, **options: Any) -> subprocess.Popen[str]:
    environment = dict(os.environ, PYTHONPATH=str(workers.TESTS.parent))
    command = [sys.executable, "-m", "ringshm", "top", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def _watch(name: str, *, times: int = 2) -> Watched:
    sampler = Sampler([name])
    for _ in range(times):
        sampler.look()
    return sampler.channels[name]


# --- what it says


def test_rates_add_up_to_what_the_processes_have_counted(name: str) -> None:
    with Channel(4, 64, name=name) as channel, workers.Crew("fork") as crew:
        sampler, totals = Sampler([name]), [0.0, 0.0]
        sampler.look()
        watched = sampler.channels[name]
        members = crew.start(_send_for, channel, 0.3), crew.start(_receive, channel)
        running, count = True, 0
        while running:
            running, count = any(member.process.is_alive() for member in members), count + 1
            time.sleep(0.01)
            sampler.look()
            assert watched.rates is not None
            seconds = watched.points[-1].time - watched.points[-2].time
            totals[0] += watched.rates.sent * seconds
            totals[1] += watched.rates.received * seconds
        sent, received = (member.result() for member in members)
        last = watched.points[-1]
    assert 0 < sent == received == last.sent - 1 == last.received - 1
    assert last.sent_nbytes == last.received_nbytes == 8 * (sent + 1)  # of a bare array, its bytes
    # what is on its way at a look may be counted twice
    assert sent <= totals[0] * 1.000001 and received <= totals[1] * 1.000001
    assert totals[0] <= sent + count and totals[1] <= received + 4 * count


def _send_for(channel: Channel, seconds: float) -> int:
    message, count, end = np.zeros(8, np.uint8), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        channel.put(message)
        count += 1
    channel.put(message + 1)  # the end
    return count


def _receive(channel: Channel) -> int:
    count = 0
    while not channel.get().any():
        count += 1
    return count


def test_the_versions_of_a_latest_are_counted(name: str) -> None:
    with Latest(1000, name=name) as latest:
        latest.publish(np.zeros(100, np.uint8))
        sampler = Sampler([name])
        sampler.look()
        for _ in range(5):
            latest.publish(np.zeros(200, np.uint8))
        with latest.borrow():
            sampler.look()
        watched = sampler.channels[name]
        before, after = watched.points
        assert (after.sent - before.sent, after.sent_nbytes - before.sent_nbytes) == (5, 1000)
        assert (after.fill, after.received) == (0.25, 0)
        assert f"{os.getpid()} holds version 6" in facts(watched)


def test_another_channel_of_the_same_name_begins_anew(name: str) -> None:
    sampler = Sampler()
    with Channel(4, 64, name=name) as channel:
        for k in range(3):
            channel.put(k)
        sampler.look()
    with Channel(8, 64, name=name) as channel:
        channel.put("x")
        sampler.look()
        watched = sampler.channels[name]
        assert (watched.rates, [point.sent for point in watched.points]) == (None, [1])
        assert watched.layout is not None
        assert watched.layout.capacity == 8
        sampler.look()
        assert watched.rates is not None
        assert watched.rates.sent == 0


def test_rates_are_not_negative_and_are_per_second() -> None:
    earlier, later = Point(1.0, 10, 100, 10, 100, 0.0, 0, 0, 1), Point(3.0, 16, 90, 9, 140, 0.5, 0, 0, 1)
    rates = rates_between(earlier, later)
    assert (rates.sent, rates.sent_nbytes, rates.received, rates.received_nbytes) == (3, 0, 0, 20)


def test_channels_come_and_go_while_it_runs(name: str) -> None:
    assert _watch(name).gone is not None
    sampler = Sampler()
    sampler.look()
    assert name not in sampler.channels
    with Channel(1, 64, name=name):
        sampler.look()
        sampler.look()
        assert sampler.channels[name].live
    sampler.look()
    watched = sampler.channels[name]
    assert (watched.live, watched.gone is not None, watched.rates) == (False, True, None)
    assert re.search(rf"{name} .* gone", _overview([watched]))
    with Channel(1, 64, name=name):
        sampler.look()
        assert sampler.channels[name].gone is None


def _overview(channels: list[Watched], height: int | None = None) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        show_overview(Page(), channels, height)
    return shown.getvalue()


def test_who_waits_is_named(name: str) -> None:
    with Channel(1, 64, name=name) as channel, workers.Crew("fork") as crew:
        channel.put("one")
        waiter = crew.start(channel.put, "two")
        workers.until(lambda: f"waiting for space: {waiter.pid};" in facts(_watch(name)))
        (problem,) = [text for text in _watch(name).problems if "the ring is full" in text]
        assert str(waiter.pid) in problem
        assert [channel.get(), channel.get()] == ["one", "two"]


def test_who_holds_is_named_and_for_how_long(name: str) -> None:
    with Channel(4, 64, name=name) as channel:
        channel.put("one")
        with channel.loan() as first, channel.borrow(), channel.loan() as second:
            told = facts(_watch(name))
            assert re.search(rf"{os.getpid()} is writing slots \d, \d for \d+\.\d s", told)
            assert re.search(rf"{os.getpid()} is reading slot \d for \d+\.\d s", told)
            first.discard()
            second.discard()
        assert str(os.getpid()) not in facts(_watch(name))


def test_the_dead_are_shown_until_they_are_reaped(name: str) -> None:
    with Channel(2, 64, name=name) as channel:
        child = workers.fork_off(lambda: (channel.put("x"), workers.die()))
        assert workers.exit_code(child) == -signal.SIGKILL
        assert f"dead and not reaped: {child}" in facts(_watch(name))
        workers.until(lambda: channel.wait_for_peers(senders=9, timeout=0.01) or channel.stats().reaped)
        told = facts(_watch(name))
        assert "not reaped" not in told
        assert "reaped 1" in told


def test_the_stopped_are_shown(name: str) -> None:
    with Channel(2, 64, name=name) as channel, workers.Crew("fork") as crew:
        holder = crew.start(_stop_in_a_loan, channel)
        assert holder.wait_stopped()
        assert f"stopped: {holder.pid}" in facts(_watch(name))
        holder.send_signal(signal.SIGCONT)
        holder.result()
        assert "stopped" not in facts(_watch(name))


def _stop_in_a_loan(channel: Channel) -> None:
    with channel.loan() as loan:
        workers.stop()
        loan.discard()


def test_what_went_wrong_is_counted(name: str) -> None:
    with Channel(1, 64, name=name, when_full="drop_oldest") as channel:
        for k in range(3):
            channel.put(k)
        assert "dropped 2" in facts(_watch(name))


def test_the_unwell_come_first_then_the_busiest_and_the_dead_last(name: str) -> None:
    def corpse() -> None:
        channel = Channel(1, 64, name=f"{name}-0-dead")
        channel.put("x")
        workers.die()

    assert workers.exit_code(workers.fork_off(corpse)) == -signal.SIGKILL
    names = ["0-dead", "1-idle", "2-some", "3-more", "4-full"]
    with contextlib.ExitStack() as stack:
        channels = {short: stack.enter_context(Channel(9, 64, name=f"{name}-{short}")) for short in names[1:]}
        sampler = Sampler([f"{name}-{short}" for short in names])
        for _ in range(9):
            channels["4-full"].put("x")
        sampler.look()
        for short, count in (("2-some", 2), ("3-more", 5)):
            for _ in range(count):
                channels[short].put("x")
                channels[short].get()
        sampler.look()
        order = [watched.name.removeprefix(f"{name}-") for watched in sampler.in_order()]
        assert order == ["4-full", "3-more", "2-some", "1-idle", "0-dead"]
        # a header, the first with what is said of it, and how many are left off
        unwell = len(_overview(sampler.in_order()[:1]).splitlines()) - 1
        shown = _overview(sampler.in_order(), height=1 + unwell + 1)
        assert f"{name}-4-full" in shown
        assert f"{name}-3-more" not in shown
        assert "4 more: a taller terminal" in shown
        assert "more:" not in _overview(sampler.in_order(), height=100)
        for height in range(1 + 1 + 1, 1 + unwell + 1):  # the first is cut where the screen is lower than it
            lines = _overview(sampler.in_order(), height=height).splitlines()
            assert lines[1].startswith(f"{name}-4-full")
            assert "4 more: a taller terminal" in lines[-1]
            assert len(lines) == height
            assert height == 3 or "more lines: `ringshm stats NAME`" in lines[-2]
    assert main(["clean"]) == 0


def test_what_is_no_channel_or_of_another_version_is_said_to_be(name: str) -> None:
    junk = Path(path_of(f"{name}-junk"))
    junk.write_text("junk")
    junk.chmod(0o600)
    try:
        with Channel(1, 64, name=name) as channel:
            sampler = Sampler()
            sampler.look()
            segment = channel._attachment.segment  # type: ignore[union-attr]
            version, segment.words[1] = segment.words[1], 999
            sampler.look()
            shown = _overview(sampler.in_order())
            assert "is no ringshm segment: it has 4 bytes" in shown
            assert "layout version 999" in shown
            segment.words[1] = version
            sampler.look()
            assert not sampler.channels[name].wrong
    finally:
        junk.unlink()
    sampler.look()
    assert sampler.channels[f"{name}-junk"].gone is not None


def test_a_file_that_is_cut_while_it_is_watched_is_no_crash(name: str) -> None:
    with Channel(1, 64, name=f"{name}-sound"):
        with Channel(1, 64, name=name) as channel:
            whole = Path(path_of(name)).read_bytes()
            copy = Path(path_of(f"{name}-copy"))
            copy.write_bytes(whole)
            copy.chmod(0o600)
            assert channel.name == name
        sampler = Sampler()
        sampler.look()
        os.truncate(copy, 4096)
        sampler.look()
        assert "is a damaged ringshm segment" in sampler.channels[f"{name}-copy"].wrong
        assert sampler.channels[f"{name}-sound"].live
        copy.unlink()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.25, "0.25"), (999.4, "999"), (999.6, "1.00k"), (1234, "1.23k"), (99_999, "100k"), (1.2e6, "1.20M")],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert in_short(number) == text


def test_a_trend_shows_zero_lowest_and_the_most_highest() -> None:
    assert trend([0, 0.01, 0.5, 1], 1.0, "_.-#") == "_.-#"
    assert trend([0, 5, 10], None, "_.-#") == "_-#"
    assert trend([0, 0], None, "_#") == "__"
    assert trend([], None, "_#") == ""


# --- what it leaves alone


def test_watching_changes_nothing_and_takes_no_part(name: str) -> None:
    with Channel(4, 64, name=name) as channel, workers.Crew("fork") as crew:
        waiter = crew.start(channel.get)
        workers.until(lambda: any(person.waiting_for for person in channel.stats().participants))
        people = [person.pid for person in channel.stats().participants]
        segment, files = channel._attachment.segment, workers.ringshm_files()  # type: ignore[union-attr]
        waiter.send_signal(signal.SIGSTOP)  # between two slices of its wait it writes
        workers.until(lambda: _state(waiter.pid) == "T")
        before = bytes(segment.memory)
        watcher = _top("--json", "--interval", "0.05")
        for _ in range(5):
            assert name in workers.line_of(watcher)
        watcher.kill()
        watcher.communicate()
        assert bytes(segment.memory) == before
        assert workers.ringshm_files() == files
        waiter.send_signal(signal.SIGCONT)
        assert [person.pid for person in channel.stats().participants] == people
        channel.put("x")
        assert waiter.result() == "x"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


WATCHES = """
import os, sys
from ringshm.tools.sampler import Sampler
sampler = Sampler([sys.argv[1]])
sampler.look()
sampler.look()
print(len(sampler.channels[sys.argv[1]].points))
print(open("/proc/self/maps").read(), [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")])
"""


def test_nothing_of_a_channel_is_open_or_mapped_between_two_looks(name: str) -> None:
    with Channel(4, 64, name=name):
        shown = workers.finish(workers.script(WATCHES, name))
        assert shown.startswith("2\n")
        assert f" {os.stat(path_of(name)).st_ino} " not in shown
        assert f"ringshm.{name}" not in shown


# --- the command


def test_json_is_one_document_per_look(name: str) -> None:
    with Channel(4, 64, name=name) as channel:
        channel.put("x")
        out, errors = _top(name, "--json", "--interval", "0.05", "--seconds", "1").communicate()
        documents = [json.loads(line) for line in out.splitlines()]
        assert errors == ""
        assert len(documents) >= 2
        times = [document["time"] for document in documents]
        assert times == sorted(times)
        for document in documents:
            (found,) = document["channels"]
            assert (found["name"], found["live"], found["fill"]) == (name, True, 0.25)
            assert (found["stats"]["sent"], found["rates"]["sent"]) == (1, 0)
            assert [person["pid"] for person in found["stats"]["participants"]] == [os.getpid()]


def test_without_a_terminal_there_are_plain_lines_for_each_look(name: str) -> None:
    with Channel(4, 64, name=f"{name}-a") as channel, Channel(4, 64, name=f"{name}-b"):
        channel.put("x")
        out, errors = _top(f"{name}-a", f"{name}-a", "--interval", "0.05", "--seconds", "1").communicate()
        assert errors == ""
        assert "\x1b" not in out
        assert f"{name}-b" not in out
        assert len(re.findall(r"^\d\d:\d\d:\d\d$", out, re.MULTILINE)) >= 2
        assert len(re.findall(rf"^{name}-a +0 +0 B +0 +25%$", out, re.MULTILINE)) >= 2
        assert "ready 1" in out


def test_a_pipe_that_closes_ends_it_quietly(name: str) -> None:
    with Channel(4, 64, name=name):
        with _top("--interval", "0.05") as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 128 + signal.SIGPIPE


def test_no_such_channel_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "nobody-made-this"]) == 1
    assert capsys.readouterr().err.startswith("ringshm: there is no channel 'nobody-made-this': `ringshm ls`")
    assert main(["top", "a/b"]) == 1
    assert "no slash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--interval", "0"], "argument --interval: '0' is no time: give seconds, from 0.05"),
        (["--interval", "nan"], "argument --interval: 'nan'"),
        (["--seconds", "soon"], "argument --seconds: 'soon'"),
        (["--plot", "x.png"], "give one NAME, not 0"),
        (["a", "b", "--plot", "x.png"], "give one NAME, not 2"),
    ],
)
def test_wrong_usage_says_what_to_do(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["top", *argv])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


# --- on a terminal


def _terminal(*argv: str, **options: Any) -> Terminal:
    return Terminal("top", *argv, "--interval", "0.05", **options)


def test_on_a_terminal_it_is_a_screen_that_ctrl_c_puts_away(name: str) -> None:
    with Channel(4, 64, name=f"{name}-a") as channel, Channel(4, 64, name=f"{name}-b"):
        channel.put("x")
        terminal = _terminal()
        shown = terminal.read_until(lambda shown: shown.count(f"{name}-a") >= 3)
        assert shown.index("\x1b[?1049h") < shown.index(name)  # the other screen
        assert "\x1b[?25l" in shown  # no cursor
        assert "▃" in shown  # a quarter full
        assert terminal.end("\x03") == 128 + signal.SIGINT
        _was_put_away(terminal)
        assert "Traceback" not in terminal.shown


def _was_put_away(terminal: Terminal) -> None:
    assert terminal.shown.rstrip().endswith("\x1b[?25h\x1b[?1049l")


def test_q_ends_it_and_a_question_mark_explains_the_columns(name: str) -> None:
    with Channel(4, 64, name=name), Channel(4, 64, name=f"{name}-b"):
        terminal = _terminal()
        assert "q ends, ? explains" in terminal.screen(lambda lines: f"{name}-b" in "".join(lines))[0]
        terminal.press("?")
        lines = terminal.screen(lambda lines: "any other key goes back" in lines[0])
        assert len(lines) <= 24 and max(map(len, lines)) <= 80
        for column in ("sent/s", "bytes/s", "received/s", "fill", "over time"):
            assert re.search(rf"^  (.*, )?{column}[,:]", "\n".join(lines), re.MULTILINE)
        terminal.press("x")
        terminal.screen(lambda lines: f"{name}-b" in "".join(lines))
        assert terminal.end("q") == 0
        _was_put_away(terminal)


def test_the_terminal_reads_lines_again_when_it_has_ended(name: str) -> None:
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    with Channel(4, 64, name=name):
        command = [sys.executable, "-c", OWN_TERMINAL, name]
        environment = dict(os.environ, PYTHONPATH=str(workers.TESTS.parent), TERM="xterm")
        with subprocess.Popen(
            command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
        ) as process:
            shown = b""
            while name.encode() not in shown:
                shown += os.read(controller, 65536)
            assert not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ECHO)
            process.terminate()
            process.wait()
    assert termios.tcgetattr(terminal) == before
    os.close(terminal)
    os.close(controller)


OWN_TERMINAL = """
import fcntl, sys, termios
from ringshm.tools.cli import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
main(["top", sys.argv[1]])
"""

UNDER_A_SHELL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
child = os.fork()
if not child:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-m", "ringshm", "top", "--interval", "0.05", sys.argv[1]])
while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
    os.tcsetpgrp(0, os.getpid())
    modes = termios.tcgetattr(0)[3]
    print("stopped", bool(modes & termios.ICANON and modes & termios.ECHO), flush=True)
    os.read(0, 10)
    os.tcsetpgrp(0, child)
    os.kill(child, signal.SIGCONT)
print("ended", os.waitstatus_to_exitcode(status))
"""


def test_ctrl_z_gives_the_terminal_to_the_shell_until_it_goes_on(name: str) -> None:
    with Channel(4, 64, name=name):
        terminal = Terminal(name, main=UNDER_A_SHELL)
        terminal.screen(lambda lines: name in "".join(lines))
        terminal.press("\x1a")
        terminal.read_until(lambda shown: "\x1b[?25h\x1b[?1049lstopped True\r\n" in shown)
        terminal.press("\n")
        terminal.screen(lambda lines: name in "".join(lines))
        assert terminal.end("q") == 0
        assert terminal.shown.endswith("\x1b[?25h\x1b[?1049lended 0\r\n")


TWICE = """
import os, signal, sys, termios
from ringshm.tools.cli import main
set_modes = termios.tcsetattr
def interrupted(*args):
    if sys.exc_info()[0] is KeyboardInterrupt:  # it is being put away
        os.kill(os.getpid(), signal.SIGINT)
    set_modes(*args)
termios.tcsetattr = interrupted
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_ctrl_c_while_the_screen_is_put_away_does_not_keep_it(name: str) -> None:
    with Channel(4, 64, name=name):
        terminal = _terminal(main=TWICE)
        terminal.read_until(lambda shown: name in shown)
        assert terminal.end("\x03") == 128 + signal.SIGINT
        _was_put_away(terminal)


def test_sigterm_puts_the_screen_away_too(name: str) -> None:
    with Channel(4, 64, name=name):
        terminal = _terminal()
        terminal.read_until(lambda shown: name in shown)
        terminal.process.terminate()
        assert terminal.end() == 128 + signal.SIGINT
        _was_put_away(terminal)


def test_one_channel_alone_is_shown_in_detail_and_as_gone_when_it_has(name: str) -> None:
    with Channel(4, 64, name=name) as channel:
        channel.put("x")
        terminal = _terminal(name)
        lines = terminal.screen(lambda lines: re.search(r"fill +25% +25% +25%", "\n".join(lines)))
        assert lines[1].startswith(f"{name}: live, 4 slots of 64 B")
        assert any(re.match(rf" *{os.getpid()}  python", line) for line in lines)
    terminal.screen(lambda lines: f"{name}: gone" in lines[1])
    assert terminal.end("\x03") == 128 + signal.SIGINT


def test_a_channel_with_four_participants_fits_24_lines_of_80_columns(name: str) -> None:
    with four_participants(name) as pids:
        terminal = _terminal(name)
        lines = terminal.screen(lambda lines: any(line.startswith("waiting receivers") for line in lines))
        assert len(lines) <= 24 and max(map(len, lines)) <= 80
        assert "more lines" not in lines[-1]
        assert all(any(line.split()[:1] == [str(pid)] for line in lines) for pid in pids)
        assert terminal.end("q") == 0


def test_a_long_name_has_a_line_of_its_own_and_pushes_no_column_off(name: str) -> None:
    long = f"{name}-{'rollouts-' * 10}end"
    with Channel(4, 64, name=long) as channel, Channel(4, 64, name=f"{name}-b"):
        channel.put("x")
        terminal = _terminal(long, f"{name}-b")
        lines = terminal.screen(lambda lines: "sent/s" in lines[1] and any("25%" in line for line in lines))
        assert terminal.end("q") == 0
    (short,) = [line for line in lines if line.startswith(f"{name}-b")]
    assert lines[1].split() == ["channel", "sent/s", "bytes/s", "received/s", "fill", "over", "time"]
    assert lines[1].index("fill") + 4 == short.index("0%") + 2
    at = lines.index(long[:80])
    assert lines[at + 1] == long[80:]
    assert lines[at + 2].split()[:5] == ["0", "0", "B", "0", "25%"]
    assert lines[at + 2].index("25%") + 3 == short.index("0%") + 2


def test_a_latest_shows_versions_and_readers_and_no_fill(name: str) -> None:
    with Latest(1000, name=name, borrows=2) as latest:
        latest.publish("x")
        with latest.borrow():
            terminal = _terminal(name)
            shown = "\n".join(terminal.screen(lambda lines: "held, of 2" in "".join(lines)))
            assert terminal.end("q") == 0
    for title in ("published/s", "bytes/s", "held, of 2 +1 ", "readers +1 ", "waiting readers +0 "):
        assert re.search(rf"^{title}", shown, re.MULTILINE)
    assert f"{os.getpid()} holds version 1" in shown
    assert not re.search("fill|slots|received|sender", shown)


def test_a_screen_that_is_too_small_says_what_is_left_off(name: str) -> None:
    with contextlib.ExitStack() as stack:
        names = [f"{name}-{k}" for k in range(6)]
        for each in names:
            stack.enter_context(Channel(1, 64, name=each))
        terminal = _terminal(*names, rows=5)
        shown = "\n".join(terminal.screen(lambda lines: "4 more: a taller terminal" in lines[-1]))
        assert terminal.end("q") == 0
        assert f"{name}-1" in shown
        assert f"{name}-2" not in shown
        terminal = _terminal(f"{name}-0", rows=5)
        terminal.screen(lambda lines: re.fullmatch(r"\d+ more lines: a taller terminal", lines[-1]))
        assert terminal.end("q") == 0


def test_a_narrow_terminal_gets_all_columns_in_more_lines(name: str) -> None:
    with Channel(4, 64, name=f"{name}-a") as channel, Channel(4, 64, name=f"{name}-b"):
        channel.put("x")
        terminal = _terminal(columns=40)
        lines = terminal.screen(lambda lines: any("25%" in line for line in lines))
        assert terminal.end("q") == 0
    assert max(map(len, lines)) <= 40
    assert {"channel", "sent/s", "bytes/s", "received/s", "fill"} <= set(" ".join(lines).split())
    at = lines.index(f"{name}-a")
    assert lines[at + 1].split() == ["0", "0", "B", "0", "25%"]


def test_names_cannot_command_the_terminal(name: str) -> None:
    strange = name + "\x1b[31m\n[b]$x$:x:"
    with Channel(1, 64, name=strange):
        for argv in ([], [strange]):
            terminal = _terminal(*argv)
            terminal.read_until(lambda shown: f"{name}\\x1b[31m\\n[b]$x$:x:" in shown)
            assert terminal.end("q") == 0
            assert "\x1b[31m" not in terminal.shown


def test_a_terminal_that_cannot_show_blocks_gets_ascii(name: str) -> None:
    with Channel(4, 64, name=name) as channel:
        channel.put("x")
        terminal = _terminal(name, PYTHONIOENCODING="ascii")
        terminal.read_until(lambda shown: re.search(r"fill .* \.+", shown) or re.search(r"fill .*-", shown))
        assert terminal.end("q") == 0
        assert terminal.shown.isascii()


def test_on_a_dumb_terminal_there_are_plain_lines(name: str) -> None:
    with Channel(4, 64, name=name):
        terminal = _terminal(TERM="dumb")
        terminal.read_until(lambda shown: shown.count(name) >= 2)
        assert terminal.end("\x03") == 128 + signal.SIGINT
        assert "\x1b" not in terminal.shown


def test_colours_are_off_where_they_are_not_wanted(name: str) -> None:
    with Channel(1, 64, name=name) as channel:
        channel.put("x")
        for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
            terminal = _terminal(name, **environment)
            terminal.read_until(lambda shown: "the ring is full" in shown)
            assert terminal.end("q") == 0
            assert bool(re.search(r"\x1b\[[0-9;]+m", terminal.shown)) == coloured


# --- plots


@pytest.fixture
def plot(tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib")
    return tmp_path / "plot.png"


def _is_png(path: Path) -> bool:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width >= 800 and height >= 800 and data.endswith(b"IEND\xaeB`\x82") and len(data) > 20_000


@pytest.mark.parametrize("end", ["seconds", "Ctrl-C", "SIGTERM", "gone"])
def test_a_plot_is_written_at_the_end(name: str, end: str, plot: Path) -> None:
    channel = Channel(4, 64, name=name)
    argv = [name, "--plot", str(plot), "--interval", "0.05", "--json"]
    process = _top(*argv, *(["--seconds", "0.2"] if end == "seconds" else []))
    workers.line_of(process)
    channel.put("x")
    workers.line_of(process)
    if end == "gone":
        channel.close()
    elif end != "seconds":
        process.send_signal(signal.SIGINT if end == "Ctrl-C" else signal.SIGTERM)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert _is_png(plot)
    channel.close()


def test_a_latest_is_plotted_and_it_says_what_was_written(name: str, plot: Path) -> None:
    with Latest(1000, name=name) as latest:
        latest.publish("x")
        out, errors = _top(name, "--plot", str(plot), "--interval", "0.05", "--seconds", "0.2").communicate()
        assert errors == ""
        assert re.fullmatch(rf"wrote {plot}: 0\.\d s of {name}\n", out)
    assert _is_png(plot)


@pytest.mark.parametrize("latest", [False, True])
def test_a_plot_shows_what_a_channel_has_or_what_a_latest_has(name: str, latest: bool, plot: Path) -> None:
    drawn = plot.with_suffix(".svg")  # matplotlib tells the texts beside the paths of their letters
    with Latest(1000, name=name, borrows=3) if latest else Channel(4, 1000, name=name):
        assert main(["top", name, "--plot", str(drawn), "--interval", "0.05", "--seconds", "0.2", "--json"]) == 0
    words = set(re.findall("<!-- (.*?) -->", drawn.read_text()))
    of_latest = {"versions/s", "versions held", "borrows=3", "readers", "wait for a version"}
    of_channel = {"messages/s", "sent", "received", "slots not free", "for space", "for a message"}
    assert (of_latest if latest else of_channel) <= words
    assert not (of_channel if latest else of_latest) & words


def test_a_plot_is_recorded_on_a_screen(name: str, plot: Path) -> None:
    with Channel(4, 64, name=name):
        terminal = _terminal(name, "--plot", str(plot))
        terminal.read_until(lambda shown: shown.count(f"{name}: live") >= 2)
        assert terminal.end("q") == 0
        after = terminal.shown[terminal.shown.rindex("\x1b[?1049l") :]
        assert f"wrote {plot}: 0." in after.replace("\r\n", " ")
    assert _is_png(plot)


def test_a_plot_that_cannot_be_is_refused_before_it_is_recorded(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    with Channel(1, 64, name=name):
        (tmp_path / "file").touch()
        (tmp_path / "folder.png").mkdir()
        monkeypatch.setenv("PATH", "")  # .pgf needs TeX, which says so only when it draws a text
        for file, says in (
            ("x.nothing", "supported formats"), ("x", "supported formats"), ("x.pgf", "not found"),
            ("no/x.png", "folder"), ("file/x.png", "folder"), ("folder.png", "folder"),
        ):  # fmt: skip
            assert main(["top", name, "--plot", str(tmp_path / file)]) == 1
            assert says in capsys.readouterr().err
        assert main(["top", name, "--plot", "", "--seconds", "0.1"]) == 1
        assert "--plot ''" in capsys.readouterr().err
        (tmp_path / "file").unlink()
        (tmp_path / "folder.png").rmdir()
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.delitem(sys.modules, "ringshm.tools.plot")
        assert main(["top", name, "--plot", str(tmp_path / "x.png")]) == 1
        assert "pip install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plot_that_finds_no_space_says_which_and_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, link = tmp_path / "plot.png", tmp_path / "link.png"
    path.write_text("precious")
    link.symlink_to(path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    with Channel(4, 64, name=name):
        argv = [name, "--plot", str(link), "--interval", "0.05", "--seconds", "0.2"]
        process = _top(*argv, preexec_fn=limit)
        _, errors = process.communicate()
        says = f"ringshm: --plot {str(link)!r} could not be written: File too large\n"
        assert (process.returncode, errors) == (1, says)
        assert path.read_text() == "precious"
        assert sorted(tmp_path.iterdir()) == [link, path]
        _top(*argv).communicate()
    assert link.is_symlink()
    assert _is_png(path)


def test_a_long_recording_is_thinned_and_its_rates_stay_exact(name: str, tmp_path: Path) -> None:
    plot = pytest.importorskip("ringshm.tools.plot")
    recording = plot.Recording(name, str(tmp_path / "x.png"), most=8)
    with Channel(4, 64, name=name) as channel:
        sampler = Sampler([name])
        for _ in range(100):
            channel.put("x")
            channel.get()
            sampler.look()
            assert recording.add(sampler.channels[name])
    points = recording.points
    assert 4 <= len(points) <= 8
    assert points[0].sent == 1
    assert points[-1].sent > 80
    gaps = {later.sent - earlier.sent for earlier, later in pairwise(points)}
    assert len(gaps) == 1  # as far apart as each other: thinned evenly
    recording.draw()
    assert _is_png(tmp_path / "x.png")
    sampler.look()
    assert not recording.add(sampler.channels[name])
