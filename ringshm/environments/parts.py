"""An observation taken apart: what has a fixed size goes into fields of a typed message, the rest is pickled beside.

    fixed    Box, Discrete, MultiBinary, MultiDiscrete: the fields `obs0`, `obs1`, ... of a slot
    loose    Text, Sequence, Graph, OneOf, and spaces that Gymnasium does not know: objects of any kind

Dict and Tuple spaces are taken apart into their parts. What is put together again, for a batch of environments, is what
`gymnasium.vector.utils.concatenate` makes of their observations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray

Path = tuple[Any, ...]  # the keys and indices that lead to a part
_FIXED = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)


def _leaves(space: spaces.Space[Any], path: Path = ()) -> Iterator[tuple[Path, spaces.Space[Any]]]:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts: Any = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, part in parts:
            yield from _leaves(part, (*path, key))
    else:
        yield path, space


def _at(path: Path, observation: Any) -> Any:
    for key in path:
        observation = observation[key]
    return observation


def _nest(space: spaces.Space[Any], leaves: Iterator[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _nest(part, leaves) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple([_nest(part, leaves) for part in space.spaces])
    return next(leaves)


class Parts:
    """The parts of the observations of a space."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self._space, self._leaves = space, list(_leaves(space))
        fixed = [(path, part) for path, part in self._leaves if isinstance(part, _FIXED)]
        self.fields = {f"obs{k}": (part.dtype, part.shape or ()) for k, (_, part) in enumerate(fixed)}
        self._paths = [path for path, _ in fixed]
        self._loose = [(path, part) for path, part in self._leaves if not isinstance(part, _FIXED)]
        self.all_fixed = not self._loose

    def write(self, observation: Any, columns: Sequence[NDArray[Any]], row: int) -> tuple[Any, ...]:
        """Copy the fixed parts of an observation into a row of the fields' columns; the loose ones are returned.

        Raises:
            ValueError, TypeError: if a part has another shape than its space, or a dtype of another kind, as
                `SyncVectorEnv` finds.
            KeyError, IndexError: if a part is missing.
        """
        for path, column in zip(self._paths, columns, strict=True):
            place, part = column[row, ...], np.asarray(_at(path, observation))
            if part.shape != place.shape:
                where = "".join(f"[{key!r}]" for key in path)
                raise ValueError(f"observation{where} has shape {part.shape}, its space has {place.shape}")
            np.copyto(place, part, "same_kind")
        return tuple([_at(path, observation) for path, _ in self._loose])

    def columns(self, n: int) -> dict[str, NDArray[Any]]:
        """New arrays for the fixed parts of `n` observations, by the names of their fields."""
        return {name: np.empty((n, *shape), dtype) for name, (dtype, shape) in self.fields.items()}

    def batch(self, columns: Sequence[NDArray[Any]], loose: Sequence[Sequence[Any]]) -> Any:
        """The observations of several environments as one.

        Args:
            columns: the fixed parts, each an array of shape `(n, *shape)`: these arrays are in what is returned.
            loose: the loose parts of each environment, as `write` returns them; not used if there are none.
        """
        fixed, of_each = iter(columns), iter(zip(*loose, strict=True))
        return _nest(
            self._space,
            iter([
                next(fixed)
                if isinstance(part, _FIXED)
                else concatenate(part, next(of_each), create_empty_array(part, len(loose)))  # type: ignore[arg-type]
                for _, part in self._leaves
            ]),
        )  # fmt: skip
