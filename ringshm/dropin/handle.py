"""QueueChannel: the channel under a queue, by which messages arrive as they do by `multiprocessing`."""

from __future__ import annotations

from ..annotations import T
from ..channel.channel import Channel
from ..messages.pickled import WritablePickleCodec
from ..process.attachment import Attachment


class QueueChannel(Channel[T]):
    """A channel whose arrays arrive writable, also those that were sent read-only."""

    def _bind(self, attachment: Attachment) -> None:
        super()._bind(attachment)
        self._codec = WritablePickleCodec(self._pool, self._name)
