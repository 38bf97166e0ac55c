"""The core of the main job, for a build in a bare environment: actors send typed trajectories, a learner sends weights.

    python try.py compiled|pure

Fails where that build has not, or has, the compiled path, where it switches the GIL on, or where anything is lost or
not what was sent.
"""

import multiprocessing
import sys
import sysconfig

import numpy as np

import ringshm

ACTORS, EPISODES, BATCH = 2, 200, 8
TRAJECTORY = {"actor": "i8", "episode": "i8", "version": "i8", "observations": ("f4", (ringshm.UpTo(50), 4))}
WEIGHTS = {"weights": ("f4", (64,))}


def act(actor, trajectories, weights):
    """Play episodes of some steps, whose observations are the newest weight."""
    for episode in range(EPISODES):
        with weights.borrow() as newest:
            version, weight = newest.version, float(newest["weights"][0])
        steps = 1 + episode % 50
        trajectories.put(
            {"actor": actor, "episode": episode, "version": version, "observations": np.full((steps, 4), weight, "f4")}
        )


def main(expected):
    """Start the actors, take all their trajectories in batches, and publish weights for each."""
    assert bool(ringshm.accelerated) == (expected == "pure"), ringshm.accelerated
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    assert not (free_threaded and sys._is_gil_enabled()), "the import has switched the GIL on"
    context = multiprocessing.get_context("spawn")
    weights = ringshm.Latest(spec=WEIGHTS, borrows=ACTORS)
    trajectories = ringshm.Channel(BATCH, spec=TRAJECTORY)
    published = {weights.publish({"weights": np.zeros(64, "f4")}): 0.0}
    actors = [context.Process(target=act, args=(k, trajectories.sender(), weights)) for k in range(ACTORS)]
    for actor in actors:
        actor.start()
    seen = []
    while len(seen) < ACTORS * EPISODES:
        batch = trajectories.get_batch(BATCH, min=1, timeout=60)
        for k, version in enumerate(batch["version"].tolist()):
            steps = batch.lengths["observations"][k]
            assert steps == 1 + batch["episode"][k] % 50
            assert (batch["observations"][k, :steps] == published[version]).all()
            seen.append((int(batch["actor"][k]), int(batch["episode"][k])))
        value = float(len(seen))
        published[weights.publish({"weights": np.full(64, value, "f4")})] = value
    assert sorted(seen) == [(actor, episode) for actor in range(ACTORS) for episode in range(EPISODES)]
    try:
        trajectories.get(timeout=60)
    except ringshm.EndOfChannel:
        pass
    else:
        raise AssertionError("the stream does not end")
    for actor in actors:
        actor.join()
        assert actor.exitcode == 0
    python = ".".join(map(str, sys.version_info[:3])) + "t" * free_threaded
    print(f"{ringshm.__file__}: {len(seen)} trajectories, {len(published)} versions; {expected}, CPython {python}")


if __name__ == "__main__":
    main(sys.argv[1])
