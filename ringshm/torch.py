"""For PyTorch: a module's weights through a Latest, TensorDicts, and a ring's memory pinned for copies to a GPU.

    latest = ringshm.Latest(spec=ringshm.torch.spec(policy))       in the learner
    version = ringshm.torch.publish(latest, policy)                after each update
    version = ringshm.torch.load_into(latest, policy, version)     in an actor: waits for a newer version

    channel = ringshm.Channel(64, spec=ringshm.torch.spec(tensordict))     its messages are TensorDicts like that one

`put`, `get` and the fields of a spec take tensors without this module. Importing it imports PyTorch, which
`import ringshm` does not.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .channel.channel import Channel, Receiver, Sender
from .channel.latest import Latest
from .errors import SpecMismatch, TooManyBorrows
from .messages.specs import Spec
from .messages.tensordicts import TensorDictSpec, branch_of, is_tensordict
from .messages.tensors import bits_of, unprotected

__all__ = ["load_into", "pin", "publish", "spec"]

_pinned: weakref.WeakKeyDictionary[Any, weakref.finalize[Any, Any]] = weakref.WeakKeyDictionary()


def _tensors_of(source: torch.nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a module or state_dict, by name, without their gradients."""
    state = source.state_dict() if isinstance(source, torch.nn.Module) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"source={source!r:.80} must be a torch.nn.Module or a state_dict")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"state_dict entry {name!r} is a {type(tensor).__name__}, no tensor: leave it out")
    return {name: tensor.detach() for name, tensor in state.items()}


def _image(tensor: torch.Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as an array; of integers of the same size if NumPy has no such dtype."""
    try:
        return tensor.numpy()  # type: ignore[no-any-return]
    except TypeError:
        return bits_of(tensor)


def _dtype_and_shape(tensor: torch.Tensor) -> tuple[np.dtype[Any], tuple[int, ...]]:
    return _image(torch.empty(0, dtype=tensor.dtype)).dtype, tuple(tensor.shape)


def spec(source: Any) -> Spec[Any]:
    """The spec of a module's weights, or of TensorDicts like an example.

    Of a module it has a field for each entry of its `state_dict`, by its name. A dtype that NumPy lacks, such as
    bfloat16, becomes integers of its size; `publish` and `load_into` know that.

    A channel, or a Latest, with the spec of a TensorDict takes TensorDicts like it, in any order of their keys. `get`
    gives one that the caller owns, `get_batch(n)` one of batch size `[n, *batch_size]`, `borrow` one whose tensors are
    views of the slot, not to be written; also to processes that attach by name. Names of dimensions do not travel, nor
    whether a TensorDict is locked.

    Args:
        source: a module or a TensorDict (a tensorclass, or the like), on any device; or a state_dict. A TensorDict that
            names a device arrives on the CPU, and says so.

    Raises:
        TypeError: if an entry is no tensor; names the entry.
    """
    if "tensordict" in sys.modules and is_tensordict(source):
        return TensorDictSpec(branch_of(source), None if source.device is None else "cpu")
    return Spec({name: _dtype_and_shape(tensor) for name, tensor in _tensors_of(source).items()})


def publish(latest: Latest, source: torch.nn.Module | Mapping[str, Any]) -> int:
    """Publish a module's weights. Each is copied once into the slot; from another device by way of the CPU.

    Args:
        latest: made with `spec(module)`, or with a slot_size into which the state_dict fits.
        source: a module or a state_dict. Its names, dtypes and shapes are the spec's.

    Returns:
        The version, as `Latest.publish`.

    Raises:
        SpecMismatch: names the entry that differs; nothing was published.
        As `Latest.publish`.
    """
    tensors = {name: tensor.cpu() for name, tensor in _tensors_of(source).items()}
    if latest.spec is None:
        return latest.publish(tensors)
    return latest.publish({name: _image(tensor) for name, tensor in tensors.items()})


def load_into(
    latest: Latest, module: torch.nn.Module, newer_than: int | None = None, timeout: float | None = None
) -> int:
    """Copy the newest weights into a module, each once, straight from the slot to the module's device.

    Args:
        latest: the Latest that `publish` was given, in this process or another.
        module: of the same names, dtypes and shapes.
        newer_than, timeout: as `Latest.read`.

    Returns:
        The version that was loaded.

    Raises:
        SpecMismatch: if the names, shapes or dtypes are not those of the module's state_dict. The module is unchanged.
        As `Latest.read`.
    """
    try:
        with latest.borrow(newer_than, timeout) as borrow:
            _load(latest.name, borrow.value, module)
            return borrow.version
    except TooManyBorrows:  # a copy is not limited
        version, value = latest.read(newer_than, timeout)
        _load(latest.name, value, module)
        return version


def _load(name: str, value: Any, module: torch.nn.Module) -> None:
    """Check all entries, then copy all of them; the name is the Latest's."""
    if not isinstance(value, Mapping):
        raise SpecMismatch(
            f"{name!r}: the newest version is a {type(value).__name__}, no state_dict: publish one with `publish`"
        )
    targets = _tensors_of(module)
    missing, unexpected = targets.keys() - value.keys(), value.keys() - targets.keys()
    if missing or unexpected:
        raise SpecMismatch(
            f"{name!r}: the newest version is of another module; it lacks {sorted(missing)}, and has "
            f"{sorted(unexpected)}: give the module that was published"
        )
    sources = {}
    for entry, target in targets.items():
        source = value[entry]
        if not isinstance(source, torch.Tensor):
            array = np.asarray(source)
            if (array.dtype, array.shape) == _dtype_and_shape(target):
                array = array if array.flags.writeable else unprotected(array)
                source = torch.from_numpy(array).view(target.dtype)
        if not isinstance(source, torch.Tensor) or (source.dtype, source.shape) != (target.dtype, target.shape):
            raise SpecMismatch(
                f"{name!r}: {entry!r} is {source.dtype} {tuple(source.shape)}, in the module it is {target.dtype} "
                f"{tuple(target.shape)}: give the module that was published"
            )
        sources[entry] = source
    with torch.no_grad():
        for entry, target in targets.items():
            target.copy_(sources[entry])


def pin(handle: Channel | Sender | Receiver | Latest) -> None:
    """Pin the slots' memory: register it with CUDA, once in this process, until it is unmapped.

    From then on `torch.from_numpy(view).to("cuda", non_blocking=True)` of a borrowed view is an asynchronous copy out
    of pinned memory. Keep the view until the copy has ended (an event, or a synchronisation): only the view keeps the
    slot.
    A forked child cannot use the pinned memory: CUDA does not survive a fork.

    Args:
        handle: an open handle of any kind.

    Raises:
        RuntimeError: if there is no CUDA device, or CUDA refuses; says why.
    """
    memory, layout = handle._open().segment.memory, handle._layout
    if memory in _pinned:
        return
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"channel {handle.name!r} cannot be pinned: PyTorch finds no CUDA device here; go on without pin()"
        )
    cuda = torch.cuda.cudart()
    torch.cuda.current_stream()  # the context that the memory is registered with
    address = np.frombuffer(memory, np.uint8).ctypes.data + layout.slots
    error = cuda.cudaHostRegister(address, layout.total_size - layout.slots, 0)
    if int(error):
        raise RuntimeError(f"channel {handle.name!r} cannot be pinned: {cuda.cudaGetErrorString(error)}")
    _pinned[memory] = weakref.finalize(memory, _unpin, os.getpid(), address)


def _unpin(pid: int, address: int) -> None:
    if os.getpid() == pid:
        torch.cuda.cudart().cudaHostUnregister(address)
