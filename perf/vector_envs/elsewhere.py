"""``python -m perf.vector_envs.elsewhere TASK CONTENDER GAME COUNT SECONDS``, for `tasks.run`: in an interpreter."""

from __future__ import annotations

import json
import sys

from . import everyone, tasks

if __name__ == "__main__":
    task, name, game, count, seconds = sys.argv[1:]
    contender = next(contender for contender in everyone() if contender.name == name)
    print(json.dumps(getattr(tasks, task)(contender, game, int(count), float(seconds))))
