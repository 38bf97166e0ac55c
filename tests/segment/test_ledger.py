"""A ledger's numbers outlive the process that wrote them, and go with their segment's names, whoever removes these."""

from __future__ import annotations

import signal

import pytest
from support import workers

from ringshm import Channel
from ringshm.segment.ledger import Ledger
from ringshm.tools.leftovers import clean, look

pytestmark = workers.may_fork


def _corpse(name: str) -> str:
    """Leave a channel of that name, with a ledger, whose process has died; its nonce."""
    with Channel(1, 100) as told:

        def child() -> None:
            channel = Channel(1, 64, name=name)
            nonce = channel._open().segment.nonce
            ledger = Ledger(nonce)
            ledger.reserve(1000)
            ledger.words[0], ledger.words[999] = 7, 1 << 63
            told.put(nonce)
            workers.die()

        pid = workers.fork_off(child)
        nonce: str = told.get()
        assert workers.exit_code(pid) == -signal.SIGKILL
    return nonce


def test_the_next_process_reads_what_a_killed_one_has_written(name: str) -> None:
    before = workers.ringshm_files()
    ledger = Ledger(_corpse(name))
    assert (len(ledger.words) >= 1000, ledger.words[0], ledger.words[999]) == (True, 7, 1 << 63)
    clean()
    assert workers.ringshm_files() == before


def test_one_that_grows_keeps_its_numbers_and_its_older_views_see_the_same(name: str) -> None:
    with Channel(1, 64, name=name) as channel:
        ledger = Ledger(channel._open().segment.nonce)
        early, ledger.words[1] = ledger.words, 5
        ledger.reserve(5000)
        early[2] = 6
        assert ledger.words[1:3].tolist() == [5, 6]


@pytest.mark.parametrize("how", ["clean", "its name is reclaimed", "its maker closes it"])
def test_it_goes_with_its_segment(how: str, name: str) -> None:
    before = workers.ringshm_files()
    if how == "its maker closes it":
        with Channel(1, 64, name=name) as channel:
            Ledger(channel._open().segment.nonce)
            assert len(workers.ringshm_files() - before) == 11
    else:
        _corpse(name)
        assert look().orphans == ()
        if how == "clean":
            clean()
        else:
            Channel(1, 64, name=name).close()
    assert workers.ringshm_files() == before


def test_one_without_a_segment_is_an_orphan(name: str) -> None:
    with Channel(1, 64, name=name) as channel:
        nonce = channel._open().segment.nonce
        Ledger(nonce)
        assert look().orphans == ()
    Ledger(nonce)  # as of a relay that was just about to make it
    (path,) = look().orphans
    assert nonce in path
    assert clean() == ((), (path,))
    assert look().orphans == ()
