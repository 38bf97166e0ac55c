"""What several environments tell of a step, in rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .parts import Parts
from .worker import OUTCOME


class Rows:
    """A row for each of `n` environments; arrays of its own, unless it is given `columns` to write to."""

    def __init__(self, parts: Parts, n: int, columns: dict[str, NDArray[Any]] | None = None) -> None:
        self.parts = parts
        self.columns = parts.columns(n) if columns is None else columns
        self.outcomes = np.empty(n, OUTCOME)
        self.loose: list[tuple[Any, ...]] = [()] * n

    def place(self, rows: slice, answer: Mapping[str, Any]) -> None:
        """Copy an answer to its rows."""
        n = rows.stop - rows.start
        for name, column in self.columns.items():
            column[rows] = answer[name][:n]
        self.outcomes[rows] = answer["outcome"][:n]

    def observations(self) -> Any:
        """All of them, as one."""
        return self.parts.batch([*self.columns.values()], self.loose)
