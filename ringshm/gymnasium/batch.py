"""Several environments' steps as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from ..environments.parts import Parts
from ..environments.rows import Rows
from ..environments.worker import OUTCOME


class Batch(Rows):
    """What `n` environments tell of a step, in rows as they come."""

    def __init__(self, parts: Parts, n: int, columns: dict[str, NDArray[Any]] | None = None) -> None:
        super().__init__(parts, n, columns)
        self.env_ids: list[int] = []
        self.infos: dict[str, Any] = {}
        self._added: list[tuple[int, dict[str, Any]]] = []  # row and info
        self._batcher: VectorEnv[Any, Any, Any] = VectorEnv()  # knows how infos become one
        self._batcher.num_envs = n

    def note(self, rows: slice, note: Any) -> None:
        """Add the infos and loose parts that came with it; nothing if some of these infos cannot be added."""
        infos, self.loose[rows] = note
        new = [*enumerate(infos, rows.start)]
        try:
            self._add(new)
        except Exception:
            self.infos = {}
            self._add(self._added)
            raise
        self._added += new

    def _add(self, infos: Sequence[tuple[int, dict[str, Any]]]) -> None:
        for row, info in infos:
            self.infos = self._batcher._add_info(self.infos, info, row)

    def step(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Observations, rewards, terminations, truncations, infos."""
        rewards, terminations, truncations = (self.outcomes[name].copy() for name in OUTCOME.names or ())
        return self.observations(), rewards, terminations, truncations, self.infos
