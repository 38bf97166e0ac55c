"""Nothing in a segment is trusted: whatever its bytes are, a call with a time-out ends in a result, an error of
ringshm's or the time-out; it takes no memory beyond the segment's size, and writes nothing outside of its slots.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hostile import SLOT_SIZE, VICTIMS, Round, at_random, batter, each_word, used_words
from workers import Crew, Failed, may_fork

from ringshm.layout import Layout

# --- damage to everything


def batter_in_children(jobs: Sequence[tuple[Callable[[], Iterator[Round]], Sequence[Any], int, bool]]) -> Counter[str]:
    """Run `batter` in a child for each (rounds, victims, seed, traced), two at a time; the outcomes of all."""
    outcomes: Counter[str] = Counter()
    waiting = list(jobs)
    with Crew("fork") as crew:
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < 2:
                rounds, victims, seed, traced = waiting.pop(0)
                progress = memoryview(mmap.mmap(-1, 8)).cast("Q")
                child = crew.start(lambda *job: batter(job[0](), *job[1:]), rounds, victims, seed, progress, traced)
                running.append((child, progress, seed))
            child, progress, seed = running.pop(0)
            try:
                damages, ends = child.result()
            except Failed as error:
                raise AssertionError(f"seed {seed}, round {progress[0]} (its stack is on stderr): {error}") from None
            outcomes.update(ends, damages=damages)
    print(dict(outcomes))
    return outcomes


@may_fork
@pytest.mark.parametrize("seed", [1, 3])
def test_random_damage_ends_calls_in_a_result_or_an_error(seed: int) -> None:
    outcomes = batter_in_children([(lambda: at_random(13_000), VICTIMS, seed + k, False) for k in (0, 1)])
    assert outcomes["damages"] > 50_000
    errors = {"Empty", "Full", "ChannelCorrupted", "UndecodableMessage", "ChannelClosed", "EndOfChannel"}
    assert all(outcomes[error] > 50 for error in errors), "damage that does nothing tests nothing"


@may_fork
@pytest.mark.slow(seconds=300)
def test_much_random_damage_ends_calls_in_a_result_or_an_error() -> None:
    jobs = [(lambda: at_random(25_000), VICTIMS, seed, False) for seed in range(10, 16)]
    assert batter_in_children(jobs)["damages"] > 290_000


@may_fork
def test_each_word_that_means_something_may_hold_anything() -> None:
    words = sorted(set(used_words(Layout(3, SLOT_SIZE, 4))))
    halves = words[::2], words[1::2]
    victims = VICTIMS[1:3]
    jobs = [(lambda half=half: each_word(half, len(victims)), victims, 20, False) for half in halves]
    assert batter_in_children(jobs)["damages"] == len(words) * 13 * 2


@may_fork
@pytest.mark.slow(seconds=300)
def test_each_word_may_hold_anything() -> None:
    words = range(Layout(3, SLOT_SIZE, 4).words_end)
    parts = [words[start::4] for start in range(4)]
    victims = VICTIMS[:5]
    jobs = [(lambda part=part: each_word(part, len(victims)), victims, 30, False) for part in parts]
    assert batter_in_children(jobs)["damages"] == len(words) * 13 * 5


@may_fork
def test_no_call_allocates_more_than_the_segment() -> None:
    batter_in_children([(lambda: at_random(1000), VICTIMS, seed, True) for seed in (40, 41)])
