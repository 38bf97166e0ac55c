"""For Gymnasium: a vectorised environment whose workers write observations straight into slots of shared memory.

    envs = RingVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(8)])
    envs = ringshm.gymnasium.make_vec("CartPole-v1", 8)

stands where `AsyncVectorEnv` stood: the same methods, and the trajectories that it and `SyncVectorEnv` give for the
same seeds. A worker's process steps several environments, one after the other, and tells of all of them in one message:
with a worker for each core nobody waits for a core, and a step costs two messages for each worker, not two for each
environment. Where a step takes but some microseconds, as CartPole's, fewer workers are faster: on two cores, one.

Where steps take times that differ, nobody need wait for the slowest environment:

    envs = RingVectorEnv(env_fns, batch_size=4)
    envs.async_reset()
    observations, rewards, terminations, truncations, infos = envs.recv()  # the first 4 that are ready
    envs.send(actions, infos["env_id"])

Importing this module imports Gymnasium, which `import ringshm` does not.
"""

from __future__ import annotations

from ..errors import missing

try:
    from .making import make_vec
    from .vector_env import RingVectorEnv
except ModuleNotFoundError as error:
    raise missing("ringshm.gymnasium", "Gymnasium", "gymnasium", error) from error

__all__ = ["RingVectorEnv", "make_vec"]
