"""Jacobians of the logits by the hidden s^n, by definition: what DRL's Q^n learns the transpose of."""

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Floats, host
from arraytp.audit.setting import Setting

# Of every class there is a backward pass, and a row of a Jacobian.
MOST_CLASSES = 20


def jacobians(setting: Setting) -> dict[int, Floats]:
    """Return ∂logits/∂s^n of every sample, of shape (B, size, classes), for n = 1 … N−1; none for many classes."""
    network, (count, classes) = setting.on_host(), setting.batch.logits.shape
    if classes > MOST_CLASSES:
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
