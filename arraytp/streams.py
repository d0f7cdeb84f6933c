"""Random streams named by their purpose: two draws never share numbers, and the order of calls does not matter."""

import numpy as np

_PURPOSES = {"init": 0, "feedback": 1, "noise": 2, "shuffle": 3, "augment": 4, "validation": 5}


def stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the host's random stream for a purpose and key (see `sequence`), the same on every machine and backend."""
    return np.random.Generator(np.random.PCG64DXSM(sequence(seed, purpose, *key)))


def sequence(seed: int, purpose: str, *key: int) -> np.random.SeedSequence:
    """Return the seed sequence of the streams for a purpose and key, on the host and on devices.

    `seed` is the run's one root seed; the key is what distinguishes streams of one purpose: block, epoch, step,
    iteration, chunk of samples. None of these is negative.
    """
    return np.random.SeedSequence(entropy=seed, spawn_key=(_PURPOSES[purpose], *key))
