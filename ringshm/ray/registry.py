"""The registry: one actor for each Ray namespace, found by name, which knows who holds which handle of which channel.

A *handle* of the registry is what one `sender()` or `receiver()` call has handed out. It has a number, and *holders*:
the processes that have unpickled it, or use it. It

    counts      until it has arrived somewhere, and then while one of its holders works; a holder that is idle, a
                worker of Ray's between two tasks, does not count, but may go on
    has ended   once it has arrived, and all its holders have closed it, or are gone for good (cluster.py: Observer)

From that follows what the relays ask for: whether senders may still come, and whether receivers may. A channel is over
once its maker has closed it, or has gone, and no handle counts any more. Then its relays end, and its rings go.

1. Each change is written to the key-value store of Ray's control store before the call that makes it returns. So a
   registry that dies is started again by Ray, reads what there was, and Ray repeats the calls that it had not answered.
   Each call may therefore come twice: each says what shall be so, not what to add.
2. The relays wait for changes by `watch`, with the version that they know. Nobody is called back, so that a relay which
   is started again needs no list of who knows it.
3. No message passes here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Coroutine
from dataclasses import replace
from typing import Any

import ray
from ray import cloudpickle
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import ChannelClosed, ChannelExists
from ..system import sleep
from . import ending
from .calls import ACTORS, call, registry_name, relay, relay_name
from .cluster import Observer, Process
from .locality import Place
from .records import HOME, RECEIVER, SENDER, UP, Handed, Holder, LatestRecord, Outpost, Record, Ring
from .relays import Relay
from .republish import LatestRelay

_KV_NAMESPACE = b"ringshm"
#: Seconds between two looks at who lives.
_LOOK_SECONDS = 0.5
#: How often a process tries to make the registry.
_TRIES = 3
#: What becomes of nodes and their rings.
_DIED, _REMOVED = "died or left", "had its ring removed from /dev/shm"
#: Looks without a channel, after which the registry ends; the next call makes another.
_IDLE_LOOKS = 120


class Registry:
    """The actor. All methods are called by name, through `call`."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._prefix = namespace.encode() + b"/"
        self._records: dict[str, Record] = {}
        self._over: dict[str, Record] = {}  #: whose relays are still to be ended
        for key in internal_kv._internal_kv_list(self._prefix, namespace=_KV_NAMESPACE):
            data = internal_kv._internal_kv_get(key, namespace=_KV_NAMESPACE)
            if data is not None:
                record = cloudpickle.loads(data)
                (self._over if record.over else self._records)[record.id] = record
        self._changed: dict[str, asyncio.Event] = {}
        self._opening: dict[tuple[str, Place], asyncio.Lock] = {}
        self._tasks: set[asyncio.Future[None]] = set()
        self._dead_nodes: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- what makers and holders call

    async def make(self, record: Record) -> None:
        """A channel was made; returns once its relay at home keeps its ring."""
        self._begin()
        if record.id not in self._records:
            if record.named is not None:
                for other in self._records.values():
                    if other.named == record.named and not other.over:
                        raise ChannelExists(
                            17, f"a channel of this Ray namespace has the name {record.named!r}: choose another"
                        )
            self._records[record.id] = record
            self._note(record)
        await self._ask(record, record.home.place, record.home_node, "ready")

    async def hand_out(self, channel: str, number: int, role: str, made_at: str) -> str:
        """A handle is handed out, by the maker; returns why not, or ""."""
        self._begin()
        record = self._records.get(channel)
        if record is None or record.over:
            return "the channel is over"
        if number not in record.handles:
            record.handles[number] = Handed(role, made_at)
            self._note(record)
        return ""

    async def claim(self, channel: str, number: int, token: str, process: Process) -> Ring | str:
        """That process holds the handle from now on, and works; the ring that it attaches to, or why it may not."""
        self._begin()
        record = self._records.get(channel)
        if record is None:
            return "the channel is over: its maker has closed it, or has gone, and so have all its handles"
        handle, is_latest = record.handles[number], isinstance(record, LatestRecord)
        if handle.ended and token not in handle.holders and not is_latest:
            return (
                f"this {handle.role} was unpickled before, and all who held it have gone or closed it "
                f"({handle.ended}): hand out another one for each use"
            )
        before = handle.holders.get(token)
        if before is None or before.idle:
            handle.holders[token] = Holder(process)
            handle.arrived, handle.ended = True, ""
            if handle.role == SENDER and (outpost := record.outposts.get(process.place)) is not None:
                outpost.drained = outpost.up is None
            self._note(record)
        if process.place == record.home.place:
            return record.home
        ring = await self._ring_at(record, process, handle.role)
        if is_latest and isinstance(ring, Ring) and (outpost := record.outposts.get(process.place)) is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # it will, once it is started again
                await self._ask(record, process.place, outpost.node, "catch_up")
        return ring

    async def given(self, channel: str, number: int) -> str:
        """A Latest is being pickled; returns why that makes no sense, or ""."""
        self._begin()
        record = self._records.get(channel)
        if record is None:
            return "it is over: its maker has closed it, or has gone, and so have all its readers"
        record.handles[number].arrived, record.handles[number].ended = False, ""
        self._note(record)
        return ""

    async def reads(self, channel: str, number: int, token: str, only: bool = True) -> None:
        """That holder of a Latest has read, and not published."""
        self._begin()
        record = self._records.get(channel)
        if record is not None and (holder := record.handles[number].holders.get(token)) is not None:
            holder.reads = only
            self._note(record)

    async def publishes(self, channel: str, number: int, token: str) -> None:
        """That holder of a Latest, which has read, publishes, too."""
        await self.reads(channel, number, token, only=False)

    async def release(self, channel: str, number: int, token: str, how: str) -> None:
        """That holder has closed the handle, or dropped it."""
        self._begin()
        record = self._records.get(channel)
        if record is not None and (holder := record.handles[number].holders.pop(token, None)) is not None:
            record.left(record.handles[number], holder, how)
            self._note(record)

    async def discard(self, channel: str, number: int) -> None:
        """The maker has closed a handle that it never gave to anybody."""
        self._begin()
        record = self._records.get(channel)
        if record is not None and not record.handles[number].arrived:
            record.handles[number].ended = "it was closed before it was given to anybody"
            self._note(record)

    async def idle(self, channel: str, number: int, token: str) -> None:
        """That holder is a worker between two tasks."""
        self._begin()
        record = self._records.get(channel)
        if record is not None and (holder := record.handles[number].holders.get(token)) is not None:
            holder.idle = True
            self._note(record)

    async def shutdown(self, channel: str, immediate: bool) -> None:
        """Somebody has ended the stream for everybody."""
        self._begin()
        if (record := self._records.get(channel)) is not None and record.shut != "immediate":
            record.shut = "immediate" if immediate else "drain"
            self._note(record)

    async def maker_closed(self, channel: str) -> None:
        """All handles are handed out."""
        self._begin()
        if (record := self._records.get(channel)) is not None and not record.maker_gone:
            record.maker_gone = f"{record.maker}, closed it"
            self._note(record)

    async def end_all(self) -> None:
        """The cluster ends: so do all channels; returns once their relays have left."""
        self._begin()
        for record in list(self._records.values()):
            record.cluster_ends = True
            self._note(record)
        await asyncio.gather(*self._tasks)

    async def status(self) -> list[Record]:
        """All channels, as they are."""
        self._begin()
        return [replace(record) for record in self._records.values()]

    async def departed(self, channel: str, role: str) -> str:
        """Who of that role went last, and how; "" if nobody is known."""
        record = self._records.get(channel)
        return record.departed.get(role, "") if record is not None else ""

    async def comes_to(self, channel: str, ring: str, role: str) -> bool:
        """Whether anybody may come yet to a ring, at home, up or down, in that role, relays included."""
        self._begin()
        if (record := self._records.get(channel)) is None:
            return False
        if ring == HOME or isinstance(record, LatestRecord):
            return record.may_come(role) or (role == SENDER and not record.drained)
        if ring == UP:
            return record.may_come(SENDER) if role == SENDER else not record.broken
        return role == RECEIVER or not record.ended

    # --- what relays call

    async def watch(self, channel: str, version: int, seconds: float) -> Record | None:
        """The channel, once it is not of that version any more, or the time is up; None if it is over."""
        self._begin()
        record = self._records.get(channel)
        if record is not None and record.version == version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.setdefault(channel, asyncio.Event()).wait(), seconds)
        return self._records.get(channel)

    async def note(self, channel: str, ended: bool | None = None, broken: str | None = None) -> None:
        """What the ring at home has come to."""
        self._begin()
        if (record := self._records.get(channel)) is None:
            return
        before = record.ended, record.broken
        record.ended = record.ended if ended is None else ended
        record.broken = record.broken if broken is None else broken
        if (record.ended, record.broken) != before:
            self._note(record)

    async def note_drained(self, channel: str, place: Place, drained: bool) -> None:
        """Whether all that the senders of a place put has reached home."""
        self._begin()
        record = self._records.get(channel)
        if record is None or (outpost := record.outposts.get(place)) is None or outpost.drained == drained:
            return
        if drained and record.may_come(SENDER):
            return  # others have come since
        outpost.drained = drained
        self._note(record)

    async def note_lost(self, channel: str, outpost: int, messages: int) -> None:
        """So many messages are lost with the outpost of that number."""
        self._begin()
        if (record := self._records.get(channel)) is not None:
            record.lost = [one.with_count(messages) if one.number == outpost else one for one in record.lost]
            self._note(record)

    async def ring_gone(self, channel: str, ring: Ring) -> None:
        """A relay that was started again does not find its ring any more."""
        self._begin()
        record = self._records.get(channel)
        if record is None:
            return
        if ring == record.home and not record.home_lost:
            record.lose_home(_REMOVED)
        for outpost in record.outposts.values():
            record.lose_ring(outpost, ring, _REMOVED)
        self._note(record)

    # --- relays

    async def revive(self, channel: str, place: Place) -> str:
        """A relay does not answer: make it anew, should it have ended for good; or why that cannot be."""
        self._begin()
        record = self._records.get(channel)
        if record is None:
            return "the channel is over"
        node = dict(record.relays).get(place, "")
        try:
            if node and not self._lost(record, place):
                await self._ask(record, place, node, "ready")
        except ray.exceptions.ActorUnavailableError:
            pass  # Ray starts it again
        except ray.exceptions.RayError as error:
            self._bury({}, Observer().dead_nodes())  # sooner than the next look
            if node == dict(record.relays).get(place) and not self._lost(record, place):
                return f"its relay on node {node[:8]} could not be started: {error}"
        return self._lost(record, place)

    def _lost(self, record: Record, place: Place) -> str:
        """Why there is no relay any more at a place; "" if there is."""
        if place == record.home.place:
            return record.home_lost
        return "" if place in record.outposts else "its node died or left"

    async def _ring_at(self, record: Record, process: Process, role: str) -> Ring | str:
        """The ring for a role at the place of a process that is not home, made if need be."""
        place = process.place
        async with self._opening.setdefault((record.id, place), asyncio.Lock()):
            outpost = record.outposts.get(place)
            if outpost is None:
                outpost = record.outposts[place] = Outpost(process.node, record.next_number())
                self._note(record)
            ring = outpost.up if role == SENDER else outpost.down
            if ring is None:
                try:
                    ring = await self._ask(record, place, outpost.node, "open_ring", role)
                except ray.exceptions.RayError as error:
                    return f"no relay could be started on node {outpost.node[:8]}: {error}"
                if record.id not in self._records or record.outposts.get(place) is not outpost:
                    return "the channel is over" if record.over else "its node died or left"
                if role == SENDER:
                    outpost.up, outpost.drained = ring, False
                else:
                    outpost.down = ring
                self._note(record)
        return ring

    def _ask(self, record: Record, place: Place, node: str, method: str, *args: Any) -> Awaitable[Any]:
        found = self._relay(record, place, node)  # a name for it, since a method of older Rays does not keep its actor
        answer: Awaitable[Any] = getattr(found, method).remote(*args)
        return answer

    def _relay(self, record: Record, place: Place, node: str) -> Any:
        """The relay of a channel at that place, made if there is none."""
        return (
            ray.remote(concurrency_groups={"write": 1, "deliver": 1})(
                LatestRelay if isinstance(record, LatestRecord) else Relay
            )
            .options(
                name=relay_name(record.id, place),
                namespace=ACTORS,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=16,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self._namespace, record, place)
        )

    # --- the state

    def _note(self, record: Record) -> None:
        """Something has changed: write it down, then tell those who watch."""
        record.version += 1
        internal_kv._internal_kv_put(self._key(record), cloudpickle.dumps(record), namespace=_KV_NAMESPACE)
        if record.over and record.id in self._records:
            self._over[record.id] = self._records.pop(record.id)
            self._begin_to_end(record)
        if (event := self._changed.pop(record.id, None)) is not None:
            event.set()

    def _key(self, record: Record) -> bytes:
        return self._prefix + record.id.encode()

    def _begin_to_end(self, record: Record) -> None:
        self._go_on(self._end(record))

    def _go_on(self, steps: Coroutine[Any, Any, None]) -> None:
        """Do something beside the calls."""
        self._tasks.add(task := asyncio.ensure_future(steps))
        task.add_done_callback(self._tasks.discard)

    async def _end(self, record: Record) -> None:
        """Have the relays of a channel leave its rings, then end them. A registry that is made anew goes on with it."""
        await asyncio.gather(*[self._end_relay(record, place) for place, _ in record.relays])
        internal_kv._internal_kv_del(self._key(record), namespace=_KV_NAMESPACE)
        del self._over[record.id]

    async def _end_relay(self, record: Record, place: Place) -> None:
        try:
            found = relay(record.id, place)
        except ValueError:  # there is none any more
            return
        with contextlib.suppress(ray.exceptions.RayError):
            await found.stop.remote(record)
        with contextlib.suppress(Exception):  # its node is not there any more
            ray.kill(found)

    # --- who lives

    def _begin(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for record in self._over.values():
                self._begin_to_end(record)
            threading.Thread(target=self._look, name="ringshm registry", daemon=True).start()

    def _look(self) -> None:
        """Look again and again who has gone. Runs in a thread, since Ray's answers are waited for."""
        observer = Observer()
        idle_looks = 0
        while idle_looks < _IDLE_LOOKS:
            sleep(_LOOK_SECONDS)
            idle_looks = 0 if self._records or self._over else idle_looks + 1
            with contextlib.suppress(Exception):  # the control store is away: the next look asks again
                dead_nodes = observer.dead_nodes()
                known = {
                    process.worker: process
                    for record in list(self._records.values())
                    for process in [record.maker]
                    + [
                        holder.process
                        for handle in list(record.handles.values())
                        for holder in list(handle.holders.values())
                    ]
                }
                gone = {worker: how for worker, one in known.items() if (how := observer.gone(one, dead_nodes))}
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._bury, gone, dead_nodes)
        ray.kill(ray.get_runtime_context().current_actor)

    def _bury(self, gone: dict[str, str], dead_nodes: set[str]) -> None:
        """Those processes and nodes are gone for good."""
        self._dead_nodes = dead_nodes
        for record in list(self._records.values()):
            changed = False
            for handle in record.handles.values():
                for token, holder in list(handle.holders.items()):
                    if holder.process.worker in gone:
                        del handle.holders[token]
                        record.left(handle, holder, gone[holder.process.worker])
                        changed = True
            if not record.maker_gone and record.maker.worker in gone:
                record.maker_gone = gone[record.maker.worker]
                changed = True
            if record.home_node in dead_nodes and not record.home_lost:
                record.home_node = self._heir(record, record.home.place, dead_nodes) or record.home_node
                if record.home_node in dead_nodes:
                    record.lose_home(_DIED)
                changed = True
            if record.maker.worker in gone:
                for handle in record.handles.values():  # nobody is left who could give it on
                    if not handle.arrived and not handle.ended:
                        handle.ended = record.departed[handle.role] = f"its maker has gone: {gone[record.maker.worker]}"
                        changed = True
            for place, outpost in list(record.outposts.items()):
                if outpost.node in dead_nodes:
                    outpost.node = self._heir(record, place, dead_nodes) or outpost.node
                    if outpost.node in dead_nodes:
                        record.lose_outpost(place, _DIED)
                    changed = True
            if changed:
                self._note(record)

    def _heir(self, record: Record, place: Place, dead_nodes: set[str]) -> str:
        """Another node that shares the place of a dead one, and has the relay from now on; "" if there is none."""
        node = record.heir_of(place, dead_nodes)
        if node:
            self._go_on(self._move(record, place, node))
        return node

    async def _move(self, record: Record, place: Place, node: str) -> None:
        """Have the relay of a place made anew on another node there."""
        with contextlib.suppress(Exception):  # Ray has found out by itself that it cannot be started again
            ray.kill(relay(record.id, place))
        while record.id in self._records and node not in self._dead_nodes:
            try:
                await self._ask(record, place, node, "ready")
                return
            except ray.exceptions.RayError:  # the old one still has the name
                await asyncio.sleep(_LOOK_SECONDS)


def enter(namespace: str, record: Record) -> None:
    """Have a channel known to the registry of a namespace, which is made if there is none.

    Raises:
        As `calls.call`.
    """
    for attempt in range(_TRIES):
        _ensure(namespace)
        try:
            call(namespace, "make", record)
            ending.made(record.home)
            return
        except ChannelClosed:  # the one that was there has just ended, since it had no channel
            if attempt == _TRIES - 1:
                raise


def _ensure(namespace: str) -> None:
    """Make the registry of a namespace, if there is none."""
    ray.remote(Registry).options(
        name=registry_name(namespace),
        namespace=ACTORS,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=10_000,
    ).remote(namespace)
