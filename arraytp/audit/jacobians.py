"""Jacobians by definition: of the logits in s^n, which DRL learns; how those of F and G overlap (Theorem 4.2)."""

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Floats, host
from arraytp.audit.setting import Setting
from arraytp.model.blocks import Block

# Every class takes a backward pass, and adds a row to the Jacobians.
MOST_CLASSES = 20


def jacobians(setting: Setting, most: int = MOST_CLASSES) -> dict[int, Floats]:
    """Return ∂logits/∂s^n of every sample, of shape (B, size, classes), by n = 1 … N−1; {} for over `most` classes."""
    network, (count, classes) = setting.on_host(), setting.batch.logits.shape
    if classes > most:
        return {}
    zs, s, indices = reference.forward(network, host(setting.images))
    of_block = {n: np.empty((count, s[n][0].size, classes)) for n in range(1, len(network))}
    for c in range(classes):
        ds = np.zeros((count, classes))
        ds[:, c] = 1
        for n in reversed(of_block):
            _, _, ds = reference.block_backward(network.blocks[n], ds, zs[n], indices[n], s[n], network.weights[n])
            of_block[n][:, :, c] = ds.reshape(count, -1)
    return of_block


def sums(jacobian: Floats) -> tuple[Floats, Floats]:
    """Return Σ JᵀJ, of shape (classes, classes), and Σ Jᵀ, of shape (classes, size)."""
    return np.einsum("bsc,bsd->cd", jacobian, jacobian), np.einsum("bsc->cs", jacobian)


def overlap(setting: Setting, n: int) -> tuple[Floats, Floats, Floats]:
    """Return N = Σ D_F D_G, M = Σ D_G² and P = Σ D_F² of block n, of shape (k, k, 1, O) or (1, out)."""
    at, mode = setting.batch.at(n), setting.unpool or "overwrite"
    z, s, index = reference.block_forward(at.block, host(at.weight), host(at.bias), host(at.s))
    f = reference.slope(z, at.block.activation.name)
    u, count, kept = s, np.ones_like(z), np.ones_like(z)
    if at.block.pool is not None and index is not None:
        u = reference.unpool(s, index, at.block.pool, mode)
        # How many windows have their maximum at a position, and how many of their values are kept by unpooling.
        count = reference.unpool(np.ones_like(s), index, at.block.pool, "accumulate")
        kept = count if mode == "accumulate" else np.minimum(count, 1)
    g = reference.slope(u, at.block.activation.name)
    n_sum, m_sum, p_sum = (_per_tap(at.block, values) for values in (f * g * kept, g * g * kept, f * f * count))
    return n_sum, m_sum, p_sum


def _per_tap(block: Block, values: Floats) -> Floats:
    """Return sums over samples and over those positions whose tap lies inside the image."""
    window, outputs = block.window, values.shape[-1]
    if window is None:
        return np.asarray(values.sum(axis=0))[None]
    inside = reference.bordered(np.ones((1, window.height, window.width, 1)), window, 0.0)[0, :, :, 0]
    sums = np.empty((window.kernel, window.kernel, 1, outputs))
    for i, j, rows, columns in reference.taps(window):
        sums[i, j, 0] = np.einsum("bpqo,pq->o", values, inside[rows, columns])
    return sums


def expected_gradient(omega: Floats, theta: Floats, n: Floats, m: Floats, count: int) -> Floats:
    """Return the limit of L-DRL's mean gradient divided by σ², for a batch of `count` samples: 2/B (ωM − θN)."""
    gradient: Floats = 2 / count * (omega * m - theta * n)
    return gradient
