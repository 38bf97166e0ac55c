"""Each check of `ringshm doctor`, on made-up places and on this host."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.workers import ringshm_files

from ringshm.tools import doctor
from ringshm.tools.doctor import FAIL, OK, WARN
from ringshm.tools.leftovers import Leftovers, SegmentFile

MIB, GIB = 1 << 20, 1 << 30


def test_every_check_answers_on_this_host_and_leaves_nothing() -> None:
    before = ringshm_files()
    checks = {check.subject: check for check in doctor.examine()}
    assert len(checks) == 18
    assert {check.level for check in checks.values()} <= {OK, WARN, FAIL}
    assert checks["a segment's file"].level == OK  # or no test could have made a channel
    assert all(check.remedy for check in checks.values() if check.level == FAIL)
    assert ringshm_files() == before


# --- the file system

LINE = "25 24 0:23 / {place} {options} - {kind} {kind} rw,size=24683656k\n"
MOUNTS = [
    ([("DIR", "rw,nosuid", "tmpfs")], OK, "tmpfs"),
    ([("DIR", "ro,nosuid", "tmpfs")], FAIL, "read-only"),
    ([("DIR", "rw", "ext4")], WARN, "not tmpfs"),
    ([("DIR", "ro", "tmpfs"), ("DIR", "rw", "tmpfs")], OK, "tmpfs"),  # the last one lies on top
    ([("/", "rw", "ext4"), ("DIR/below", "rw", "tmpfs")], WARN, "no mount of its own"),
]


@pytest.mark.parametrize(("mounts", "level", "found"), MOUNTS)
def test_shared_memory_is_a_mounted_tmpfs(mounts: Any, level: str, found: str, tmp_path: Path) -> None:
    lines = [
        LINE.format(place=place.replace("DIR", str(tmp_path)), options=options, kind=kind)
        for place, options, kind in mounts
    ]
    (tmp_path / "mountinfo").write_text("".join(lines))
    check = doctor.check_mount(str(tmp_path), str(tmp_path / "mountinfo"))
    assert (check.level, found in check.found) == (level, True)


def test_a_missing_directory_fails(tmp_path: Path) -> None:
    assert doctor.check_mount(str(tmp_path / "nowhere")).level == FAIL
    assert doctor.check_proc(str(tmp_path / "nowhere")).level == FAIL


SPACES = [
    (16 * GIB, 8 * GIB, OK, "8 GiB free of 16 GiB", ""),
    (0, 0, OK, "without a limit", ""),
    (64 * MIB, 64 * MIB, WARN, "docker", "docker run --shm-size=2g"),
    (512 * MIB, 512 * MIB, WARN, "512 MiB free", "remount,size=2g"),
    (16 * GIB, 100 * MIB, WARN, "100 MiB free", "see what fills it"),
    (16 * GIB, 0, FAIL, "0 B free", "see what fills it"),
]


@pytest.mark.parametrize(("size", "free", "level", "found", "remedy"), SPACES)
def test_little_space_is_told_with_what_to_do(
    size: int, free: int, level: str, found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SimpleNamespace(f_blocks=size // 4096, f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: space)
    check = doctor.check_space()
    assert (check.level, found in check.found, remedy in check.remedy) == (level, True, True)


@pytest.mark.parametrize(
    ("files", "free", "level"), [(0, 0, OK), (1000, 900, OK), (1000, 80, WARN), (1000, 8, FAIL), (1000, 0, FAIL)]
)
def test_few_files_are_told(files: int, free: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=files, f_ffree=free))
    check = doctor.check_inodes()
    assert (check.level, bool(check.remedy)) == (level, level != OK)


@pytest.mark.parametrize(("mode", "level"), [(0o1777, OK), (0o700, OK), (0o777, WARN)])
def test_a_directory_where_anyone_may_remove_anything_is_told(mode: int, level: str, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    assert doctor.check_permissions(str(tmp_path)).level == level


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert doctor.check_permissions(str(tmp_path)).level == FAIL
    assert doctor.check_files(str(tmp_path)).level == FAIL


def test_where_no_segment_can_be_made_it_says_at_which_step(tmp_path: Path) -> None:
    check = doctor.check_files("/proc")
    assert check.level == FAIL
    assert "made without a name" in check.found


# --- limits


def test_limits_are_told() -> None:
    unlimited = resource.RLIM_INFINITY
    assert [doctor.check_descriptors(limit, 4).level for limit in (64, 1024, unlimited)] == [WARN, OK, OK]
    assert "64, 4 in use; a channel takes 3, so 20 channels" in doctor.check_descriptors(64, 4).found
    assert "so 0 channels" in doctor.check_descriptors(64, 100).found
    assert [doctor.check_mappings(300, limit).level for limit in (400, 65530, math.inf)] == [WARN, OK, OK]
    assert "a channel takes 10, so 10 channels" in doctor.check_mappings(300, 400).found
    check = doctor.check_limit("RLIMIT_FSIZE", "ulimit -f", "segment", 5 * MIB)
    assert (check.level, "5 MiB" in check.found, check.remedy) == (WARN, True, "ulimit -f unlimited")
    assert doctor.check_limit("RLIMIT_FSIZE", "ulimit -f", "segment", unlimited).level == OK
    assert [doctor.check_semaphores(there).level for there in (True, False)] == [OK, WARN]
    assert [doctor.check_cores(cores).level for cores in (1, 2, 64)] == [WARN, OK, OK]
    assert doctor.check_processor("x86_64", True).level == OK
    assert doctor.check_processor("aarch64", False).level == WARN


V1 = "3:cpuset:/\n2:memory,hugetlb:/docker/abc\n1:name=systemd:/\n"
V2 = "0::/user.slice/job\n"
GROUPS: list[tuple[str, dict[str, str], str, str]] = [
    (V2, {}, OK, "without a limit"),
    (V2, {"user.slice/job/memory.max": "max", "user.slice/job/memory.current": "5"}, OK, "without a limit"),
    (V2, {"user.slice/job/memory.max": str(4 * GIB), "user.slice/job/memory.current": "0"}, OK, "4 GiB"),
    (V2, {"user.slice/memory.max": str(4 * GIB), "user.slice/memory.current": str(4 * GIB)}, WARN, "4 GiB in use"),
    (V2, {"user.slice/memory.max": str(512 * MIB), "user.slice/memory.current": "0",  # the tightest counts
          "user.slice/job/memory.max": str(8 * GIB)}, WARN, "512 MiB"),
    (V2, {"memory.max": str(64 * MIB), "memory.current": "0"}, WARN, "64 MiB"),  # a namespace whose path is not ours
    (V1, {"memory/docker/abc/memory.limit_in_bytes": str((1 << 63) - 4096)}, OK, "without a limit"),
    (V1, {"memory/memory.limit_in_bytes": str(2 * GIB), "memory/memory.usage_in_bytes": str(GIB + 1)}, WARN, "2 GiB"),
    ("", {"memory.max": "1"}, OK, "without a limit"),
]  # fmt: skip


@pytest.mark.parametrize(("membership", "files", "level", "found"), GROUPS)
def test_a_control_groups_memory_is_told(
    membership: str, files: dict[str, str], level: str, found: str, tmp_path: Path
) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    check = doctor.check_memory_limit(str(tmp_path / "cgroup"), str(tmp_path / "membership"))
    assert (check.level, found in check.found) == (level, True)


# --- what goes wrong later


def test_what_the_dead_left_is_told_with_its_size() -> None:
    assert doctor.check_leftovers(Leftovers((), (), 3)).level == OK
    dead = SegmentFile("a", "/dev/shm/ringshm.a", True, False, 3 * MIB, 1.0, "00", 1)
    check = doctor.check_leftovers(Leftovers((dead, dead), ("/dev/shm/sem.x",), 0))
    assert (check.level, check.remedy) == (WARN, "ringshm clean")
    assert "2 segments of 6 MiB and 1 semaphore" in check.found
    wrong = SegmentFile("b", "/dev/shm/ringshm.b", True, False, 1, 1.0, wrong="no segment")
    assert doctor.check_leftovers(Leftovers((wrong,), (), 0)).remedy == "rm /dev/shm/ringshm.b"


USER = 65534  # "nobody", on every system: a number that no system user of systemd has
CONFIGURATIONS: list[tuple[dict[str, str], int, str, str]] = [
    ({}, USER, OK, "does not run"),
    ({"run/systemd/system/": ""}, USER, WARN, "logs out"),  # the default is yes
    ({"run/systemd/system/": "", "etc/systemd/logind.conf": "[Login]\n#RemoveIPC=no\n"}, USER, WARN, "logs out"),
    ({"run/systemd/system/": "", "etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\n"}, USER, OK, "no"),
    ({"run/systemd/system/": "", "etc/systemd/logind.conf": "[Login]\nRemoveIPC=yes\n",
      "usr/lib/systemd/logind.conf.d/50-off.conf": "[Login]\nRemoveIPC = off\n"}, USER, OK, "no"),
    ({"run/systemd/system/": "", "usr/lib/systemd/logind.conf.d/50-a.conf": "[Login]\nRemoveIPC=no\n",
      "etc/systemd/logind.conf.d/50-a.conf": "[Login]\nRemoveIPC=yes\n"},  # in place of the one before
     USER, WARN, "logs out"),
    ({"run/systemd/system/": "", "var/lib/systemd/linger/nobody": ""}, USER, OK, "lingers"),
    ({"run/systemd/system/": ""}, 0, OK, "system users"),
    ({"run/systemd/system/": ""}, 987_654, WARN, "987654"),  # has no name
]  # fmt: skip


@pytest.mark.parametrize(("files", "user", "level", "found"), CONFIGURATIONS)
def test_removal_at_logout_is_told(files: dict[str, str], user: int, level: str, found: str, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    check = doctor.check_remove_ipc(str(tmp_path), user)
    assert (check.level, found in check.found) == (level, True)


def test_the_compiled_path_is_in_use_or_it_is_said_why_not() -> None:
    assert doctor.check_compiled("").level == "ok"
    program = "import ringshm; from ringshm.tools.cli import main; print(ringshm.accelerated); main(['doctor'])"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "RINGSHM_PURE": "1"}, capture_output=True, text=True
    )
    why, *told = done.stdout.splitlines()
    assert "RINGSHM_PURE" in why
    assert why.split(":")[0] in " ".join(" ".join(told).split())
