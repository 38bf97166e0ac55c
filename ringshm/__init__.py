"""ringshm: a preallocated ring-buffer channel in shared memory, between the processes of one machine.

channel = ringshm.Channel(capacity=64, slot_size="64KiB")
channel.put({"obs": array, "reward": 1.0})      # in any process that has the handle
message = channel.get()                         # in any other
"""

from __future__ import annotations

import sys

if not sys.platform.startswith("linux"):
    raise ImportError(f"ringshm runs on Linux only, not on {sys.platform}: run the program in a Linux container")

from .channel.channel import Channel, Receiver, Sender
from .channel.latest import Latest, LatestBorrow
from .channel.loans import AsyncBorrow, AsyncLoan, Borrow, Loan
from .channel.selecting import wait
from .dropin.pair import SharedMemoryReceiver, SharedMemorySender, create_shared_memory_pair
from .dropin.queues import JoinableQueue, Queue, QueueClosed, SimpleQueue
from .errors import (
    BrokenChannel,
    ChannelClosed,
    ChannelCorrupted,
    ChannelDeadlock,
    ChannelExists,
    ChannelForbidden,
    ChannelNotFound,
    ChannelUnavailable,
    EndOfChannel,
    IncompatibleChannel,
    InsufficientSharedMemory,
    InterruptedCall,
    PayloadTooLarge,
    ReentrantCall,
    RingshmError,
    SpecMismatch,
    TooManyBorrows,
    TooManyParticipants,
    UndecodableMessage,
)
from .messages.codecs import Codec
from .messages.fields import UpTo
from .messages.spec_like import spec_like
from .messages.specs import Spec
from .messages.typed import Batch
from .ring.acceleration import accelerated
from .ring.stats import ChannelStats, HeldVersion, LatestStats, ParticipantStats, SlotStats

__version__ = "0.2.0"

__all__ = ["Batch", "Channel", "Codec", "Latest", "Receiver", "Sender", "Spec", "UpTo", "spec_like", "wait"]
__all__ += ["accelerated"]
__all__ += ["AsyncBorrow", "AsyncLoan", "Borrow", "LatestBorrow", "Loan"]
__all__ += ["ChannelStats", "HeldVersion", "LatestStats", "ParticipantStats", "SlotStats"]
__all__ += ["JoinableQueue", "Queue", "QueueClosed", "SimpleQueue"]
__all__ += ["SharedMemoryReceiver", "SharedMemorySender", "create_shared_memory_pair"]
__all__ += ["BrokenChannel", "ChannelClosed", "EndOfChannel", "RingshmError"]
__all__ += ["PayloadTooLarge", "SpecMismatch", "UndecodableMessage"]
__all__ += ["ChannelCorrupted", "ChannelExists", "ChannelForbidden", "ChannelNotFound", "IncompatibleChannel"]
__all__ += ["ChannelUnavailable", "InsufficientSharedMemory", "TooManyBorrows", "TooManyParticipants"]
__all__ += ["ChannelDeadlock", "InterruptedCall", "ReentrantCall"]
