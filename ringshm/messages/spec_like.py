"""`spec_like`: a spec made from an example message or from a Gymnasium space."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ..errors import check_fails_again
from .fields import shown_value
from .specs import MAX_DEPTH, Spec, as_spec
from .tensors import as_array


def spec_like(example: Any) -> Spec:
    """The spec of messages like an example, or of a Gymnasium space's samples.

    >>> import numpy as np, ringshm
    >>> ringshm.spec_like({"obs": np.zeros((2, 3), np.float32), "done": False})
    Spec({'obs': ('float32', (2, 3)), 'done': 'bool'})

    Args:
        example: a mapping, nested ones allowed, of name to an example value (an array, a number, a list of numbers),
            to `(dtype, shape)` or a dtype, or to a Gymnasium space; or a Gymnasium space by itself. A Dict space
            nests, and so does a Tuple space, with fields "0", "1", …; any other by itself becomes a field "value".
            A Spec or a structured dtype is taken as it is.

    Returns:
        A Spec of the same names, dtypes and shapes. Python's own numbers have the dtypes that NumPy gives them.

    Raises:
        TypeError: if something in it has no fixed size: text, objects, Text, Sequence and Graph spaces.
    """
    if isinstance(example, (Spec, np.dtype)):
        return as_spec(example)
    declaration = _like(example, ())
    return Spec(declaration if isinstance(declaration, Mapping) else {"value": declaration})


def _like(example: Any, path: tuple[str, ...]) -> Any:
    """A declaration like an example."""
    where = f"field {'.'.join(path)!r}" if path else "example"
    if len(path) > MAX_DEPTH:
        raise ValueError(f"{where:.80} nests deeper than {MAX_DEPTH}")
    if isinstance(example, (Spec, np.dtype, type)):
        return example
    spaces = sys.modules.get("gymnasium.spaces")
    if spaces is not None and isinstance(example, spaces.Space):
        if isinstance(example, spaces.Dict):
            return {name: _like(space, (*path, str(name))) for name, space in example.spaces.items()}
        if isinstance(example, spaces.Tuple):
            return {str(i): _like(space, (*path, str(i))) for i, space in enumerate(example.spaces)}
        if isinstance(example, (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)):
            return example.dtype, example.shape
        raise TypeError(
            f"{where} is a {type(example).__name__} space, whose samples have no fixed size: leave it out, or declare "
            "(dtype, shape) with an UpTo dimension"
        )
    if isinstance(example, Mapping):
        return {name: _like(value, (*path, str(name))) for name, value in example.items()}
    if isinstance(example, tuple) and len(example) == 2 and _is_dtype(example[0]):
        return example
    if isinstance(example, (str, bytes)):
        raise TypeError(f"{where} is {example!r:.80}, which says no width: give a dtype, as np.dtype('U16')")
    array = example
    if not isinstance(example, (np.ndarray, np.generic)):
        try:
            array = as_array(example)
        except (ValueError, TypeError, RuntimeError) as error:
            check_fails_again(partial(as_array, example), error)
            raise TypeError(f"{where} is {example!r:.80}, which makes no array: {error}") from error
    if array.dtype.hasobject:
        raise TypeError(f"{where} is {shown_value(example)}, which has no fixed size: give an array, or (dtype, shape)")
    return array.dtype, array.shape


def _is_dtype(first: Any) -> bool:
    """Whether the first of a pair makes the pair a `(dtype, shape)`, not two example values."""
    structured = isinstance(first, list) and bool(first) and all(isinstance(field, tuple) for field in first)
    return structured or isinstance(first, (np.dtype, type, str))
