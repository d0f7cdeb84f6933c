"""Weights moved away from where the initialisation put them, and back to the nearest semi-orthogonal matrix."""

from collections.abc import Iterator, Sequence

import numpy as np

from arraytp.audit.check import Floats, host
from arraytp.audit.setting import Setting
from arraytp.model.blocks import Network
from arraytp.ops.conv import as_matrix

# How far W is moved, relative to its norm, before it is taken back to its nearest semi-orthogonal matrix.
DRIFT = 0.05
# Moved as far as this, W is inverted by LU factors, not by the Cholesky factor of WWᵀ.
FAR = 0.3


def drifted(setting: Setting, share: float = DRIFT, first: int = 1) -> Network:
    """Return the network with every W from block `first` on moved by a random matrix of `share` times its norm."""
    weights = list(setting.network.weights)
    for n in range(first, len(weights)):
        noise, w = setting.generator(51, n).standard_normal(weights[n].shape), host(weights[n])
        weights[n] = setting.put(w + share * noise * (np.linalg.norm(w) / np.linalg.norm(noise)))
    return Network(setting.network.blocks, weights, setting.network.biases)


def ways(setting: Setting, network: Network, shares: Sequence[float]) -> Iterator[Network]:
    """Yield, for each share, the network with every W but the first moved that share of the way to its polar factor."""
    matrices = {n: host(as_matrix(network.weights[n])) for n in range(1, len(network))}
    polar = {n: polar_factor(w) for n, w in matrices.items()}
    for share in shares:
        weights = list(network.weights)
        for n, w in matrices.items():
            weights[n] = setting.put(((1 - share) * w + share * polar[n]).reshape(weights[n].shape))
        yield Network(network.blocks, weights, network.biases)


def polar_factor(w: Floats) -> Floats:
    """Return the semi-orthogonal matrix nearest to W, by Newton's iteration.

    From X = W, or Wᵀ if W has fewer rows than columns: X ← (X + X(XᵀX)⁻¹)/2, where X(XᵀX)⁻¹ = X⁻ᵀ for a square X.
    """
    x = w if len(w) >= w.shape[1] else w.T
    for _ in range(50):
        following = (x + x @ np.linalg.inv(x.T @ x)) / 2
        # The number of correct digits doubles with every iteration.
        if np.abs(following - x).max() < 1e-9:
            break
        x = following
    return following if len(w) >= w.shape[1] else following.T
