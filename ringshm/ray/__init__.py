"""For Ray: the same handles on all nodes of a cluster.

    channel = ringshm.ray.Channel(capacity=64, slot_size="64KiB")
    actors = [Actor.remote(channel.sender()) for _ in range(8)]
    for message in channel: ...

Processes that share a /dev/shm pass messages through a ring, as with `ringshm.Channel`, and Ray has no part in it.
Between nodes Ray carries them, in batches. Where the files of this folder are, from the bottom:

    locality.py     which processes share a /dev/shm
    cluster.py      what Ray says of processes, actors and tasks: who is gone for good
    records.py      what is known of a channel
    calls.py        how the registry and relays are found and called
    batches.py      messages as they pass between nodes
    keeping.py      what relays hold on a ring
    follower.py     what all relays have in common
    upward.py       from an outpost home
    downward.py     from home to an outpost
    relays.py       relays: what carries messages between the rings of several nodes, and says when a ring ends
    registry.py     the registry: who holds which handle
    ending.py       the end of a cluster that a driver has started
    handles.py      senders and receivers that travel
    republish.py    relays of a Latest
    channel.py      Channel, status
    latest.py       Latest

The head of each tells how it works. Importing this module imports Ray, which `import ringshm` does not.

What is kept between nodes: the order of each sender's messages, each message to one receiver, backpressure, time-outs,
the end of the stream, `BrokenChannel` and who went, and that what a dead receiver, or its whole node, had not finished
comes again.

What is given up:

- There is no one order over all senders.
- A `put` elsewhere than at home has reached the ring there, not home. `flush` waits until all of it was received. That
  ring has up to 512 slots, or 32 MiB, more than the channel's capacity, for what is on its way.
- Messages between nodes are copied once more at each end. `borrow.sender` is the pid of a relay then.
- A node that dies takes along what its senders had put, and home had not acknowledged. `status()` names the node, and
  counts the messages that home had heard of; of those put in the last fifth of a second nobody knows. The same is
  warned of at home. Where home itself dies, all that waited in its ring is lost, and nobody can count it.
- A relay that is killed in the few bytecodes between a `put` and its note of that puts that message twice.
- When the relay at home is killed, messages that other nodes had not finished come again, with a `delivery_count` of 2
  or more, also if a receiver there finishes its own copy.
"""

from __future__ import annotations

from ..errors import missing

try:
    from .channel import Channel, status
    from .handles import RayReceiver, RaySender
    from .latest import Latest
except ModuleNotFoundError as error:
    raise missing("ringshm.ray", "Ray", "ray", error) from error

__all__ = ["Channel", "Latest", "RayReceiver", "RaySender", "status"]
