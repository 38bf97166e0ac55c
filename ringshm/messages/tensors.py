"""Tensors of PyTorch and arrays of JAX in messages: their memory as NumPy arrays, and tensors made from memory.

1. Objects are recognised by the names of their classes, so neither library is imported to look at one. Only a receiver
   that gets a tensor imports PyTorch, to make it.
2. A JAX array arrives as a NumPy array: the receiver, if it uses JAX at all, says on which device it wants it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_tensor(kind: type) -> bool:
    """Whether a class is PyTorch's Tensor itself. A class derived from it, such as Parameter, is not."""
    return kind.__module__ == "torch" and kind.__qualname__ == "Tensor"


def is_jax_array(kind: type) -> bool:
    """Whether a class is that of JAX's arrays."""
    # in this order: `__module__` of the class of Cython's functions, by which NumPy pickles generators, is no str
    return kind.__qualname__ == "ArrayImpl" and kind.__module__.startswith("jaxlib")


def _checked(tensor: Any) -> Any:
    """The tensor in a form that NumPy can look at; TypeError says what to send instead."""
    if tensor.requires_grad:
        raise TypeError(
            f"a tensor of {tensor.dtype} {tuple(tensor.shape)} requires grad, which does not travel: send .detach()"
        )
    if tensor.device.type != "cpu":
        raise TypeError(
            f"a tensor of {tensor.dtype} {tuple(tensor.shape)} is on {tensor.device}, not on the CPU: send .cpu()"
        )
    return tensor.resolve_conj().resolve_neg()


def bits_of(tensor: Any) -> NDArray[Any]:
    """A dense CPU tensor's memory, with its shape and strides, as integers of its dtype's size. Nothing is copied.

    Raises:
        TypeError: if it requires grad, or is on another device; says what to send instead.
    """
    torch = sys.modules["torch"]
    tensor, size = _checked(tensor), tensor.element_size()
    if size > 8:
        return tensor.numpy()  # type: ignore[no-any-return]
    return tensor.view((torch.uint8, torch.int16, torch.int32, torch.int64)[size.bit_length() - 1]).numpy()  # type: ignore[no-any-return]


def is_dense(tensor: Any) -> bool:
    """Whether a tensor is plain memory with strides, neither sparse nor quantised."""
    return tensor.layout is sys.modules["torch"].strided and not tensor.is_quantized


class _Unprotected:
    """An array's memory without its write protection."""

    def __init__(self, array: NDArray[Any]) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._keeps = array


def unprotected(array: NDArray[Any]) -> NDArray[Any]:
    """A writable view of a read-only array. PyTorch warns of read-only ones, and its tensors know no protection."""
    return np.asarray(_Unprotected(array))


def restore_tensor(buffer: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """A tensor over the buffer that the unpickler was given."""
    import torch

    raw = np.frombuffer(buffer, np.uint8)
    kind = getattr(torch, dtype)
    if not raw.size:
        return torch.empty(shape, dtype=kind)
    if not raw.flags.writeable:
        raw = unprotected(raw)
    return torch.from_numpy(raw).view(kind).reshape(shape)


def as_array(value: Any) -> NDArray[Any]:
    """`numpy.asarray`, also of tensors whose dtype NumPy has, or ml_dtypes, if imported, adds."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return np.asarray(value)
    try:
        return _checked(value).numpy()  # type: ignore[no-any-return]
    except TypeError:
        if value.requires_grad or value.device.type != "cpu":
            raise
    name = str(value.dtype).removeprefix("torch.")
    kind = getattr(sys.modules.get("ml_dtypes"), name, None)
    if kind is None:
        raise TypeError(f"NumPy has no dtype for {value.dtype}: import ml_dtypes, or send its bits: .view(torch.int16)")
    return bits_of(value).view(kind)
