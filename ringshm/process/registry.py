"""The attachments of this process: how they are found, and what becomes of them at a fork and at exit.

1. The registry finds an attachment by its segment's (device, inode). A second `attach` to the same segment shares it,
   unless other processes take this one for dead there, since other code has closed its descriptors.
2. Before a fork every attachment issues an invitation for the child. The child drops the copies of its parent's locks,
   joins with an entry of its own, and redeems the invitation.
3. A child of `multiprocessing` inherits all handles of its parent, also those that it was not meant to have. If its
   target and arguments lead to handles (children.py), all others are strays, which do not count until they are used. In
   any child, once it has a role, undecided handles that it merely inherited no longer count (Attachment.update_roles).
4. At exit every handle is closed, in children of `multiprocessing` and its like too, where `atexit` does not run but
   the finalizers of their `util` do.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from dataclasses import dataclass, field
from threading import active_count

from ..errors import ChannelNotFound
from ..ring.participants import TABLE_PATIENCE, Participants, forking, present
from ..segment.files import Segment
from ..segment.layout import CREATOR, NAME_DOOMED, Layout, Options
from ..segment.locks import drop_inherited_locks
from ..system import RLock, get_ident
from . import children
from .attachment import Attachment, lingering
from .invitations import Tether, tethers

attachments: weakref.WeakValueDictionary[tuple[int, int], Attachment] = weakref.WeakValueDictionary()
_lock = RLock()
#: By the identity of a thread that is forking.
_forks: dict[int, _Fork] = {}
#: The process that closes its handles when it exits, by its pid; and the libraries whose finalizers do it.
_exit_installed: tuple[int, set[str]] = (0, set())
#: The libraries that tell a child of theirs when it has forgotten its parent's finalizers.
_told_of_forks: set[str] = set()

#: Whether this process has begun anew since it was forked.
_begun = False


@dataclass
class _Fork:
    """What a thread that is forking has done for its child.

    Attributes:
        given: the handles (by `id`) that a library starts the child with; None if it does not, or gives it none.
        tethers: what counts the child, by the attachment.
    """

    given: set[int] | None = None
    tethers: dict[Attachment, Tether] = field(default_factory=dict)


# --- finding and making


def create(
    name: str | None, layout: Layout, options: Options, codec_name: str, spec: str, prefault: bool
) -> Attachment:
    """Make a segment, with this process as its first participant.

    Raises:
        What Segment.create raises.
    """
    with _lock:
        _install_exit()
    joined: list[Participants] = []

    def fill_in(segment: Segment) -> None:
        participants = Participants(segment)
        participants.join()
        segment.words[CREATOR] = participants.owner
        segment.words[layout.ring + layout.ring_mask] = layout.capacity - 1  # the first message goes to slot 0
        joined.append(participants)

    segment = Segment.create(name, layout, options, codec_name, spec, prefault, fill_in)
    attachment = Attachment(segment, joined[0])
    attachment.owns_names = True
    return _register(attachment)


def attach(
    name: str, nonce: str | None = None, patience: float = TABLE_PATIENCE, even_if_dead: bool = False
) -> Attachment:
    """Attach to the channel of that name (and that nonce, if given), or find that it is attached already.

    With `even_if_dead`, also to one whose participants have all died.

    Raises:
        What Segment.open and Attachment.ensure_joined raise.
    """
    with _lock:
        _install_exit()
        known = _living()
        found = next((one for one in known if nonce is not None and one.segment.nonce == nonce), None)
        if found is None:
            segment = Segment.open(name, nonce, even_if_dead)
            found = attachments.get(segment.file.identity)
        if found is not None:
            found.ensure_joined(patience)  # a forked child may have inherited it, and not joined
            return found
        attachment = Attachment(segment, Participants(segment))
        attachment.ensure_joined(patience)
        if not segment.named:
            raise ChannelNotFound(f"channel {name!r} has just been closed: make a new one")
        return _register(attachment)


def _living() -> list[Attachment]:
    """The attachments of this process but for those that others take for dead, whose place another may take."""
    for reference in attachments.valuerefs():
        attachment = reference()
        if attachment is not None and attachment.is_lost():
            attachments.pop(reference.key, None)
            attachments[-1, id(attachment)] = attachment
    living = [(reference.key[0], reference()) for reference in attachments.valuerefs()]
    return [attachment for device, attachment in living if attachment is not None and device >= 0]


def _all() -> list[Attachment]:
    """The attachments of this process. Other threads may attach meanwhile, so the references are copied in one step."""
    return [one for reference in attachments.valuerefs() if (one := reference()) is not None]


def _register(attachment: Attachment) -> Attachment:
    with _lock:
        _forget_arrived()
        attachments[attachment.segment.file.identity] = attachment
    return attachment


def _forget_arrived() -> None:
    """Attachments linger until the handles have arrived that they have pickled."""
    for one in list(lingering):
        if not one.invitations.awaited:
            lingering.discard(one)


# --- fork


def _before_fork() -> None:
    fork = _forks[get_ident()] = _Fork()
    forking.add(get_ident())
    here = _all()
    process, popen = children.process_being_forked()
    if process is not None and here:
        _install_exit()
        of_handles = {seat.holder_id: attachment for attachment in here for seat in attachment.seats}
        fork.given = children.handles_given(process, of_handles) or None
        if fork.given is not None:
            here = list({id(one): one for one in map(of_handles.__getitem__, fork.given)}.values())
    for attachment in here:
        if (tether := attachment.before_fork(fork.given)) is not None:
            fork.tethers[attachment] = tether
            if popen is not None and fork.given is not None:
                tether.follow(popen)
            elif popen is not None:  # it merely inherits them: it has not been there if it is not
                children.when_started(popen, tether.started)


def _after_fork_in_parent() -> None:
    for tether in [tether for tether in tethers.copy() if tether.thread == get_ident() and tether.ends_with_fork]:
        tether.let_go()
    _forks.pop(get_ident(), None)
    forking.discard(get_ident())


def _after_fork_in_child() -> None:
    global _begun
    # CPython prints an interrupt that comes here, and goes on: the child must not be half its parent
    again: BaseException | None = None
    for _ in range(3):
        try:
            _begin_anew()
            _begun = True
            break
        except BaseException as error:
            again = error
    if again is not None:
        raise again


def _after_fork_in_child_at_last() -> None:
    """An interrupt may come at the very entry of the function before, where nothing catches it."""
    global _begun
    if not _begun:
        _after_fork_in_child()
    _begun = False


def _begin_anew() -> None:
    """All that a forked child does first. A second try counts what the first has begun as dead."""
    global _lock
    _lock = RLock()
    drop_inherited_locks()
    fork = _forks.get(get_ident(), _Fork())
    for tether in tethers.difference(fork.tethers.values()):
        tether.let_go()
    inherited = _all()
    for attachment in inherited:  # first all of them: none may act as its parent's, whatever becomes of the others
        attachment.disown(fork.given)
    for attachment in inherited:
        attachment.renew(fork.tethers.get(attachment))
    _forks.clear()
    forking.clear()
    lingering.clear()
    if inherited:
        _install_exit()


def _after_fork_of_library(_: object) -> None:
    """In a child of multiprocessing or its like, which has cleared its finalizers after `_after_fork_in_child` ran."""
    global _exit_installed
    _exit_installed = (0, set())
    _install_exit()


# --- exit


def _install_exit() -> None:
    """Have this process close its handles when it exits."""
    global _exit_installed
    pid, libraries = _exit_installed
    if pid != os.getpid():
        _exit_installed = pid, libraries = os.getpid(), set()
    for util in children.utilities():
        if util.__name__ not in libraries:
            libraries.add(util.__name__)
            # the first before the library joins its children, which may be waiting for this process; the second after
            # that, since they may be about to attach
            util.Finalize(None, _close_all, exitpriority=100)
            util.Finalize(None, _leave_all, exitpriority=-100)
        if util.__name__ not in _told_of_forks:
            _told_of_forks.add(util.__name__)
            util.register_after_fork(Attachment, _after_fork_of_library)


def _close_all() -> None:
    for attachment in _all():
        for seat in attachment.seats if attachment.participants.joined or not attachment.is_stray() else ():
            with contextlib.suppress(Exception):
                if (holder := seat.holder()) is not None:
                    holder.close()


def _leave_all() -> None:
    """Invitations end with their maker: names that wait for them to be redeemed go now."""
    for attachment in list(lingering):
        if attachment.words[NAME_DOOMED]:
            attachment.segment.remove_names()
    lingering.clear()
    for attachment in _all():  # a daemon thread is inside a call: it keeps the entry to the last
        attachment.listeners.close()
        attachment.participants.remove_names_if_alone()
    if active_count() == 1:  # or else frames keep an entry of threads that went when this process was forked amid them
        for participants in present.all():
            participants.leave()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
os.register_at_fork(after_in_child=_after_fork_in_child_at_last)
