"""How many small messages per second, with how many senders and receivers; and does nobody starve?

The table and the message of faster-fifo's own benchmark, by `get` and by `get_many`. Everybody sends and receives for
some time; the rate is that of a window in it, once everybody has sent or received a first message. Then the senders
stop, and what they have sent must have been received.
Beside the rate is how many messages each sender has sent and each receiver received: the fewest, the median, the most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

from . import crowd
from .contenders import BATCH, Contender
from .measure import DICT, Case, Measurement, Metrics, Options, Timing, alternate
from .measure import steps as steps_of

_SIZES = [(1, 1), (1, 10), (10, 1), (3, 20), (20, 3), (20, 20)]
_QUICK = [(1, 1), (3, 20)]
_SHARES: dict[str, Callable[[memoryview], float]] = {"fewest": min, "median": median, "most": max}
_METRICS: Metrics = {
    "messages/s": True,
    **{f"{share} per {who}": None for who in ("sender", "receiver") for share in _SHARES},
}


def time(
    senders: int, receivers: int, batches: bool, options: Options, contender: Contender, _count: int, runs: int
) -> list[Timing]:
    """Let them work for as long as a timing takes, so many times."""
    return [_time(senders, receivers, batches, options, contender) for _ in range(runs)]


def _time(senders: int, receivers: int, batches: bool, options: Options, contender: Contender) -> Timing:
    pair, board = DICT.pair(contender), crowd.Board(senders, receivers)
    alone = senders == receivers == 1
    seconds = options.seconds * (1 if alone else 2)  # Everybody's turn on the cores comes more often in it.
    try:
        sources = [partial(board.until_stopped, DICT.longest()) for _ in range(senders)]
        rate = crowd.window(
            board,
            pair,
            sources,
            seconds,
            options.limit,
            batches,
            pin=options.pin and alone,
        )
    finally:
        pair.close()
    shares = {
        f"{share} per {who}": float(of(counts))
        for who, counts in (("sender", board.sent), ("receiver", board.received))
        for share, of in _SHARES.items()
    }
    return Timing(seconds, {"messages/s": rate, **shares})


def _takes_part(contender: Contender, senders: int, receivers: int, batches: bool) -> bool:
    if not contender.is_queue or contender.heavy or (batches and not contender.batches):
        return False
    return senders == receivers == 1 or (contender.shared and contender.name != "mp.SimpleQueue")  # For its time.


def _plan(contenders: list[Contender], options: Options) -> list[tuple[Case, int, int, bool, list[Contender]]]:
    plan = []
    for senders, receivers in _QUICK if options.quick else _SIZES:
        for batches in (False, True):
            how = f"get_many({BATCH})" if batches else "get"
            name = f"{senders} x {receivers}, put and {how}, dict, capacity {DICT.capacity}"
            case = Case("table", name, {"senders": senders, "receivers": receivers, "batches": int(batches)})
            sharing = [other for other in contenders if _takes_part(other, senders, receivers, batches)]
            if taking_part := options.chosen(case, sharing):
                plan.append((case, senders, receivers, batches, taking_part))
    return plan


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return sum(steps_of(taking_part, options) for *_, taking_part in _plan(contenders, options))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Fill the table."""
    result: list[Measurement] = []
    for case, senders, receivers, batches, taking_part in _plan(contenders, options):
        check = partial(_check, senders, receivers, batches, options.limit)
        run = partial(time, senders, receivers, batches, options)
        result += alternate(case, taking_part, options, check, run, _METRICS, count=1)
    return result


def _check(senders: int, receivers: int, batches: bool, limit: float, contender: Contender) -> None:
    crowd.check(contender, DICT, batches, limit, senders, receivers)
