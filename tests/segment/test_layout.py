"""Layout: arithmetic of the segment, its words, and sizes as users write them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringshm.arguments import parse_size, whole_number
from ringshm.messages.buffers import ALIGNMENT
from ringshm.segment import layout
from ringshm.segment.layout import CACHE_LINE, PAGE_SIZE, WORD_SIZE, Layout, Options

slot_sizes = st.integers(1, 3 * PAGE_SIZE) | st.just(1 << 30)
layouts = st.builds(Layout, st.integers(1, 3000), slot_sizes, st.integers(1, layout.MAX_ENTRIES - 2))


@given(layouts)
def test_regions_follow_each_other_without_overlap(shape: Layout) -> None:
    n, capacity = shape.max_participants, shape.capacity
    words = [
        (0, layout.HEADER_NBYTES // WORD_SIZE),
        *((shape.entry(index), layout.ENTRY_WORDS) for index in range(0, n + 1, max(1, n // 7))),
        (shape.entry(shape.spare_entry), layout.ENTRY_WORDS), (shape.invitation(0), layout.INVITATION_WORDS),
        (shape.invitation(n - 1), layout.INVITATION_WORDS), (shape.ring, shape.ring_mask + 1),
        (shape.record(0), layout.RECORD_WORDS), (shape.record(capacity - 1), layout.RECORD_WORDS),
        (shape.slots // WORD_SIZE, 1),
    ]  # fmt: skip
    spans = sorted(set(words))
    for (start, length), (following, _) in itertools.pairwise(spans):
        assert start + length <= following
    assert shape.slots == shape.words_end * WORD_SIZE
    assert shape.slot(capacity - 1) + shape.slot_stride == shape.total_size


@given(layouts)
def test_small_slots_share_pages_and_large_ones_have_pages_of_their_own(shape: Layout) -> None:
    unit = CACHE_LINE if shape.slot_size < PAGE_SIZE else PAGE_SIZE
    assert shape.slot_size <= shape.slot_stride < shape.slot_size + unit
    assert all(shape.slot(slot) % unit == 0 for slot in range(min(shape.capacity, 100)))
    assert shape.slots % PAGE_SIZE == 0


def test_whatever_lies_in_a_slot_is_aligned_as_in_a_message() -> None:
    assert CACHE_LINE % ALIGNMENT == 0


@given(layouts)
def test_ready_ring_is_the_least_power_of_two_that_holds_the_capacity(shape: Layout) -> None:
    size = shape.ring_mask + 1
    assert size & size - 1 == 0
    assert size // 2 < shape.capacity <= size


@given(st.integers(0, layout.MAX_ENTRIES - 1), st.integers(1, layout.MAX_INCARNATION), st.integers(0, 255))
def test_slot_word_tells_state_deliveries_and_owner_apart(entry: int, incarnation: int, deliveries: int) -> None:
    word = layout.READING | deliveries * layout.DELIVERY | layout.owner_value(entry, incarnation)
    assert word < 1 << 56
    assert word & layout.STATE_MASK == layout.READING
    assert (word & layout.DELIVERY_MASK) // layout.DELIVERY == deliveries
    assert word & layout.OWNER_MASK == layout.owner_value(entry, incarnation)
    assert layout.owner_value(entry, incarnation) != layout.owner_value(entry, incarnation - 1)


def test_taking_a_ready_slot_is_one_addition() -> None:
    owner = layout.owner_value(3, 7)
    assert layout.READY + layout.TAKE + owner == layout.READING | owner


def test_words_of_the_header_are_distinct() -> None:
    header = """
        MAGIC VERSION CAPACITY SLOT_SIZE MAX_PARTICIPANTS OPTIONS TOTAL_SIZE CREATOR NONCE CODEC_NAME GEN TAIL
        SENT_NBYTES SHUTDOWN HEAD TAKEN_NBYTES DROPPED REDELIVERED MESSAGE_HINT SPACE_HINT ATTENTION EVER_SENDER
        EVER_RECEIVER LAST_CHECK RECOVERIES HIGH_WATER NEXT_INVITATION SENDER_GONE RECEIVER_GONE NAME_GONE NAME_DOOMED
        REAPED LISTENED SPEC_NBYTES HIGH_INVITATION WITHDRAWN ROOM_HINT PIECE_HINT NEWEST TASKS_DONE TASKS_LOST COUNTING
        COUNTING_WORD COUNTING_SEQUENCE COUNTING_TOTAL DEATHS UNREAD UNSENT
    """
    names = header.split()
    offsets = [getattr(layout, name) for name in names]
    assert len(set(offsets)) == len(names)
    assert max(offsets) * WORD_SIZE < layout.HEADER_NBYTES


@pytest.mark.parametrize(
    ("prefix", "words"), [("P_", layout.ENTRY_WORDS), ("I_", layout.INVITATION_WORDS), ("R_", layout.RECORD_WORDS)]
)
def test_words_of_entries_invitations_and_records_are_distinct(prefix: str, words: int) -> None:
    offsets = [value for name, value in vars(layout).items() if name.startswith(prefix)]
    assert len(set(offsets)) == len(offsets) > 3
    assert max(offsets) < words


def test_the_byte_map_names_every_word() -> None:
    assert layout.__doc__ is not None
    named = re.findall(r"\b[A-Z]{1,2}_\w+(?:\*)?", layout.__doc__)
    whole = {name for name in named if not name.endswith("*")}
    families = tuple(name[:-1] for name in named if name.endswith("_*"))
    for name in vars(layout):
        if re.match("[PIRD]_[A-Z]", name):
            assert name in whole or name.startswith(families), name


def test_senders_and_receivers_do_not_write_to_one_cache_line() -> None:
    lines = [word * WORD_SIZE // 64 for word in (layout.GEN, layout.TAIL, layout.HEAD, layout.MESSAGE_HINT)]
    assert len(set(lines)) == len(lines)


choices = map(st.sampled_from, (layout.CODECS, layout.OVERSIZE, layout.WAIT_STRATEGIES, layout.WHEN_FULL))
kinds = st.sampled_from(layout.KINDS)


@given(st.builds(Options, *choices, st.booleans(), st.integers(1, layout.MAX_DELIVERIES), kinds))
def test_options_survive_their_word(options: Options) -> None:
    assert options.pack() < 1 << 64
    assert Options.unpack(options.pack()) == options


@given(st.integers(0, (1 << 64) - 1))
def test_a_word_that_holds_no_options_is_refused(word: int) -> None:
    try:
        options = Options.unpack(word)
    except ValueError:
        return
    assert options.pack() == word


SIZES: list[tuple[Any, int]] = [
    (1, 1), ("1", 1), ("64KiB", 65536), (" 64 kib ", 65536), ("1.5GB", 1_500_000_000), ("1.5GiB", 3 << 29),
    (".5k", 500), ("2.", 2), ("10b", 10), ("3TiB", 3 << 40), ("0.1MB", 100_000),
]  # fmt: skip


@pytest.mark.parametrize(("size", "nbytes"), SIZES, ids=repr)
def test_sizes_are_read_exactly(size: Any, nbytes: int) -> None:
    assert parse_size(size, "slot_size") == nbytes


BAD_SIZES: list[tuple[Any, type[Exception], str]] = [
    (0, ValueError, "at least 1"), (-5, ValueError, "at least 1"), ("0", ValueError, "at least 1"),
    ("0.0MB", ValueError, "at least 1"), ("", ValueError, "no size"), ("-5", ValueError, "no size"),
    ("5 6", ValueError, "no size"), ("KiB", ValueError, "no size"), ("1e3", ValueError, "no size"),
    ("1.5", ValueError, "whole number"), ("0.0001KiB", ValueError, "whole number"),
    ("5 parsecs", ValueError, "unknown unit 'parsecs'"), ("5KiBi", ValueError, "unknown unit"),
    (4096.0, TypeError, "float"), (None, TypeError, "NoneType"), (True, TypeError, "bool"),
    (b"64KiB", TypeError, "bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "error", "says"), BAD_SIZES, ids=repr)
def test_what_is_no_size_is_refused_by_its_argument(size: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        parse_size(size, "slot_size")
    assert str(caught.value).startswith("slot_size=")


@given(st.integers(-3, 12))
def test_whole_numbers_are_bounded_on_both_sides(number: int) -> None:
    if 1 <= number <= 9:
        assert whole_number(number, "capacity", 9) == number
    else:
        with pytest.raises(ValueError, match=f"capacity={number} must be at"):
            whole_number(number, "capacity", 9)


@given(st.integers(0, 1 << 70), st.integers(1, 1 << 40))
def test_round_up_gives_the_least_multiple(n: int, multiple: int) -> None:
    rounded = layout.round_up(n, multiple)
    assert rounded % multiple == 0
    assert n <= rounded < n + multiple
