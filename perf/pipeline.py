"""How many Atari frames per second get from actors to a learner, end to end?

Each actor runs ale-py's Pong in a process of its own and sends every fourth frame, as is usual, 210x160x3 bytes; the
learner looks at all bytes of each. There is an actor for each core but the learner's; in a second case two for each
core. Over ringshm also in place: the emulator renders into a loaned slot, the learner borrows it. Beside the channels:
the same emulators in Gymnasium's `AsyncVectorEnv(shared_memory=True)`, which steps them together; and the rate of the
actors alone, who render frames and send them to nobody, which no channel can beat.
"""

from __future__ import annotations

import os
import time as clock
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.context import ForkContext
from typing import Any

import numpy as np

from ringshm import Channel

from . import crowd
from .contenders import Contender, Pair, Receiver, Sender
from .measure import Case, Measurement, Metrics, Options, Timing, alternate
from .measure import steps as steps_of
from .workers import CONTEXT, Failed

_SHAPE = (210, 160, 3)
_SKIP = 4  # Emulated frames per frame that is sent, as in Gymnasium's ALE/Pong-v5.
_CAPACITY = 16
_NBYTES = 210 * 160 * 3 + 1000  # A pickled frame, at most.
_METRICS: Metrics = {"frames/s": True}
_FRAME = {"screen": (np.uint8, _SHAPE), "reward": np.float32, "over": np.bool_, "actor": np.int64}
_CHECKSUM = {"crc": np.int64}
_Step = tuple[float, bool]  # Reward; whether the game is over.


class _Emulator:
    """Pong, played at random."""

    def __init__(self, seed: int) -> None:
        from ale_py import ALEInterface, LoggerMode, roms

        ALEInterface.setLoggerMode(LoggerMode.Error)
        self._ale = ALEInterface()
        self._ale.setInt("random_seed", seed)
        self._ale.setInt("frame_skip", _SKIP)
        self._ale.loadROM(str(roms.get_rom_path("pong")))
        self._actions = self._ale.getMinimalActionSet()
        self._rng = np.random.default_rng(seed)
        self.render = self._ale.getScreenRGB

    def step(self) -> _Step:
        """Play until the next frame that counts."""
        reward = self._ale.act(self._actions[self._rng.integers(len(self._actions))])
        over = self._ale.game_over()
        if over:
            self._ale.reset_game()
        return reward, over


@dataclass(frozen=True)
class _Frame:
    """A frame that waits to be rendered, for a sender that has a place for it."""

    render: Callable[[Any], object]
    fields: dict[str, Any]


def _play(board: crowd.Board, actor: int, how: str, checksum: bool, count: int | None) -> Iterator[Any]:
    """The frames of one actor, whose emulator starts now: see `_frames`."""
    return _frames(_Emulator(actor), board, actor, how, checksum, count)


def _frames(
    emulator: _Emulator, board: crowd.Board, actor: int, how: str, checksum: bool, count: int | None
) -> Iterator[Any]:
    """They are rendered into one array (`how`: "reused"), into one each ("new"), or still to be rendered ("later")."""
    screen: Any = np.empty(_SHAPE, np.uint8)
    stopped, played = board.stopped, 0
    while not stopped[0] and played != count:
        reward, over = emulator.step()
        fields = {"reward": reward, "over": over, "actor": actor}
        if how == "new":
            screen = np.empty(_SHAPE, np.uint8)
        if how != "later" or checksum:
            emulator.render(screen)
        if checksum:
            fields["crc"] = zlib.crc32(screen)
        yield _Frame(emulator.render, fields) if how == "later" else {"screen": screen, **fields}
        played += 1
        board.sent[actor] = played


class _Learner:
    """Reads every byte of each frame."""

    def __init__(self, checksum: bool) -> None:
        self.checksum = checksum
        self._brightest = 0

    def __call__(self, message: Any) -> None:
        screen = message["screen"]
        if self.checksum and zlib.crc32(screen) != message["crc"]:
            raise Failed("a frame's bytes are not those that its actor rendered")
        self._brightest = max(self._brightest, int(screen.max()))

    def result(self) -> int:
        return self._brightest


def _make_in_place(look: _Learner, capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    """Frames are rendered into slots, and looked at there."""
    channel = Channel(capacity, spec=_FRAME | (_CHECKSUM if look.checksum else {}))

    def put(frame: _Frame | None) -> None:
        with channel.loan() as slot:
            if frame is None:
                slot["actor"] = -1
                return
            frame.render(slot["screen"])
            for name, value in frame.fields.items():
                slot[name] = value

    def get() -> bool | None:
        with channel.borrow() as message:
            if message["actor"] < 0:
                return None
            look(message)
            return True

    return Pair(lambda: Sender(put), lambda: Receiver(get), channel.close)


def _nobody(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    return Pair(lambda: Sender(lambda frame: None), lambda: Receiver(lambda: None))


def _vector(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    raise Failed("AsyncVectorEnv is no channel")  # It is stepped by `_time_vector`.


_IN_PLACE, _VECTOR, _ALONE = "ringshm, in place", "AsyncVectorEnv", "actors alone"


def _contenders(contenders: list[Contender]) -> list[Contender]:
    own = [
        Contender(_IN_PLACE, "ringshm", "ringshm", make=partial(_make_in_place, _Learner(False))),
        Contender(_VECTOR, "gymnasium", "gymnasium", make=_vector),
        Contender(_ALONE, make=_nobody, floor=True),
    ]
    return [*(other for other in contenders if other.is_queue and not other.heavy), *own]


def _several(contenders: list[Contender], actors: int) -> list[Contender]:
    """Those that so many senders can share; with one receiver iceoryx2 and pyzmq serve any number."""
    several = {"iceoryx2", "pyzmq", _IN_PLACE, _VECTOR, _ALONE}
    return [other for other in contenders if actors == 1 or other.shared or other.name in several]


def _time_channel(actors: int, options: Options, contender: Contender, frames: int | None = None) -> float:
    """Frames per second; with `frames`, so many of each actor are sent with a checksum."""
    alone, in_place, checksum = contender.name == _ALONE, contender.name == _IN_PLACE, frames is not None
    look = _Learner(checksum)
    pair = (
        _make_in_place(look, _CAPACITY, _NBYTES, CONTEXT) if in_place else contender.make(_CAPACITY, _NBYTES, CONTEXT)
    )
    board = crowd.Board(actors, 0 if alone else 1)
    how = "later" if in_place else "new" if contender.deferred else "reused"
    sources = [partial(_play, board, actor, how, checksum, frames) for actor in range(actors)]
    try:
        return crowd.window(
            board, pair, sources, 2 * options.seconds, options.limit, look=None if in_place else look,
            pin=options.pin and actors + 1 <= (os.cpu_count() or 1),
        )  # fmt: skip
    finally:
        pair.close()


def _time_vector(actors: int, options: Options) -> float:
    import gymnasium

    class Pong(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(0, 255, _SHAPE, np.uint8)
        action_space = gymnasium.spaces.Discrete(6)

        def __init__(self, seed: int) -> None:
            self._emulator, self._screen = _Emulator(seed), np.empty(_SHAPE, np.uint8)

        def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
            self._emulator.render(self._screen)
            return self._screen, {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            reward, over = self._emulator.step()
            self._emulator.render(self._screen)
            return self._screen, reward, over, False, {}

    makers = [partial(Pong, seed) for seed in range(actors)]
    envs = gymnasium.vector.AsyncVectorEnv(makers, shared_memory=True, copy=False, context="fork")
    look, actions = _Learner(False), np.zeros(actors, np.int64)
    try:
        envs.reset()
        frames, began = 0, clock.perf_counter()
        while not frames or clock.perf_counter() < began + 2 * options.seconds:
            screens, *_ = envs.step(actions)
            look({"screen": screens})
            frames += actors
        if screens.shape != (actors, *_SHAPE) or not look.result():
            raise Failed(f"{screens.shape} of frames, the brightest pixel of which is {look.result()}")
        return frames / (clock.perf_counter() - began)
    finally:
        envs.close()


def time(actors: int, options: Options, contender: Contender, _count: int, runs: int) -> list[Timing]:
    """Let them play for as long as a timing takes, so many times."""
    rates = [
        _time_vector(actors, options) if contender.name == _VECTOR else _time_channel(actors, options, contender)
        for _ in range(runs)
    ]
    return [Timing(options.seconds, {"frames/s": rate}) for rate in rates]


def _check(actors: int, options: Options, contender: Contender) -> None:
    if contender.name == _VECTOR:
        _time_vector(actors, options)
    else:
        _time_channel(actors, options, contender, frames=50)


def _plan(contenders: list[Contender], options: Options) -> list[tuple[Case, int, list[Contender]]]:
    cores = os.cpu_count() or 1
    plan = []
    for actors in dict.fromkeys([max(1, cores - 1), *([] if options.quick else [2 * cores])]):
        name = f"{actors} actor{'s' * (actors > 1)} and a learner on {cores} cores"
        case = Case("pipeline", name, {"actors": actors})
        if taking_part := options.chosen(case, _several(_contenders(contenders), actors)):
            plan.append((case, actors, taking_part))
    return plan


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return sum(steps_of(taking_part, options) for _, _, taking_part in _plan(contenders, options))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Let the actors play, over everyone."""
    result: list[Measurement] = []
    for case, actors, taking_part in _plan(contenders, options):
        if find_spec("ale_py") is None or find_spec("gymnasium") is None:
            result += case.left_out(taking_part, _METRICS, "ale-py and gymnasium are not installed (extra [examples])")
            continue
        run, check = partial(time, actors, options), partial(_check, actors, options)
        result += alternate(case, taking_part, options, check, run, _METRICS, count=1)
    return result
