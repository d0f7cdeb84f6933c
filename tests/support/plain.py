"""Whole networks made of the plain block functions: the reference for the fast passes, and a loss to differentiate."""

import numpy as np

from arraytp.model.plain import block_backward, block_forward
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward


def forward(network, x):
    """Return the lists of z^n, outputs (that of "block −1" is x) and pool indices."""
    zs, outputs, indices = [], [x], []
    for block, weight, bias in zip(network.blocks, network.weights, network.biases, strict=True):
        z, out, index = block_forward(block, weight, bias, handed_on(network, outputs)[-1])
        zs.append(z), outputs.append(out), indices.append(index)
    return zs, outputs, indices


def handed_on(network, outputs):
    """Return s^0 … s^N: the outputs without auxiliary units."""
    widths = [None, *(block.next_shape[-1] for block in network.blocks)]
    return [out[..., :width] for out, width in zip(outputs, widths, strict=False)]


def updates(network, carriers, x, dlogits):
    """Return (dW, db) of every block; carriers[n] takes the gradient from block n to block n − 1."""
    zs, outputs, indices = forward(network, x)
    result, ds, s = [], dlogits, handed_on(network, outputs)
    for n in reversed(range(len(network))):
        block = network.blocks[n]
        carrier = carriers[n] if n > 0 else None
        ds = ds.reshape(s[n + 1].shape)
        dweight, dbias, ds = block_backward(block, ds, zs[n], indices[n], s[n], carrier)
        result.append((dweight, dbias))
    return result[::-1]


def loss(network, x, labels, reduction="mean"):
    """Return the loss and its region (`gradients.check`): signs of all activations and winners of all pools."""
    _, outputs, indices = forward(network, x)
    value, _ = cross_entropy_forward(handed_on(network, outputs)[-1], labels, reduction)
    signs = [np.packbits(out > 0).tobytes() for out in outputs[1:-1]]
    return float(value), b"".join(signs + [index.tobytes() for index in indices if index is not None])


def dlogits(network, x, labels, reduction="mean"):
    _, outputs, _ = forward(network, x)
    cache = cross_entropy_forward(handed_on(network, outputs)[-1], labels, reduction)[1]
    return cross_entropy_backward(cache, reduction)
