"""ringshm: a preallocated ring-buffer channel in shared memory, between the processes of one machine.

channel = ringshm.Channel(capacity=64, slot_size="64KiB")
channel.put({"obs": array, "reward": 1.0})      # in any process that has the handle
message = channel.get()                         # in any other
"""

from __future__ import annotations

import sys

if not sys.platform.startswith("linux"):
    raise ImportError(f"ringshm runs on Linux only so far, not on {sys.platform}")
if not getattr(sys, "_is_gil_enabled", lambda: True)():
    raise ImportError("ringshm has not been shown to work without the GIL: run it with PYTHON_GIL=1")

from .aio import AsyncBorrow, AsyncLoan
from .channel import Channel, Receiver, Sender
from .codecs import Codec
from .errors import (
    BrokenChannel,
    ChannelClosed,
    ChannelCorrupted,
    ChannelDeadlock,
    ChannelExists,
    ChannelForbidden,
    ChannelNotFound,
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
from .latest import Latest, LatestBorrow
from .loans import Borrow, Loan
from .pair import SharedMemoryReceiver, SharedMemorySender, create_shared_memory_pair
from .queues import JoinableQueue, Queue, QueueClosed, SimpleQueue
from .selecting import wait
from .spec_like import spec_like
from .specs import Spec, UpTo
from .stats import ChannelStats, HeldVersion, LatestStats, ParticipantStats, SlotStats
from .typed import Batch

__version__ = "0.1.0"

__all__ = [
    "AsyncBorrow",
    "AsyncLoan",
    "Batch",
    "Borrow",
    "BrokenChannel",
    "Channel",
    "ChannelClosed",
    "ChannelCorrupted",
    "ChannelDeadlock",
    "ChannelExists",
    "ChannelForbidden",
    "ChannelNotFound",
    "ChannelStats",
    "Codec",
    "EndOfChannel",
    "HeldVersion",
    "IncompatibleChannel",
    "InsufficientSharedMemory",
    "InterruptedCall",
    "JoinableQueue",
    "Latest",
    "LatestBorrow",
    "LatestStats",
    "Loan",
    "ParticipantStats",
    "PayloadTooLarge",
    "Queue",
    "QueueClosed",
    "Receiver",
    "ReentrantCall",
    "RingshmError",
    "Sender",
    "SharedMemoryReceiver",
    "SharedMemorySender",
    "SimpleQueue",
    "SlotStats",
    "Spec",
    "SpecMismatch",
    "TooManyBorrows",
    "TooManyParticipants",
    "UndecodableMessage",
    "UpTo",
    "create_shared_memory_pair",
    "spec_like",
    "wait",
]
