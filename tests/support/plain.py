"""Whole networks out of the plain block functions: the reference of the fused passes, and a loss to differentiate."""

import numpy as np

from arraytp.model.network import block_backward, block_forward
from arraytp.ops.loss import cross_entropy_backward, cross_entropy_forward


def forward(network, x):
    """Return the lists of z^n, s^n (s^0 = x) and pool indices."""
    zs, s, indices = [], [x], []
    for block, weight, bias in zip(network.blocks, network.weights, network.biases, strict=True):
        z, out, index = block_forward(block, weight, bias, inputs(network, s)[-1])
        zs.append(z), s.append(out), indices.append(index)
    return zs, s, indices


def inputs(network, s):
    """Return the input of each block and the logits: what each s^n passes on."""
    widths = [None, *(block.passed_shape[-1] for block in network.blocks)]
    return [out[..., :width] for out, width in zip(s, widths, strict=False)]


def updates(network, carriers, x, dlogits):
    """Return (dW, db) of every block; carriers[n] takes the gradient from block n to block n − 1."""
    zs, s, indices = forward(network, x)
    found, ds, x = [], dlogits, inputs(network, s)
    for n in reversed(range(len(network))):
        block = network.blocks[n]
        carrier = carriers[n] if n > 0 else None
        ds = ds.reshape(x[n + 1].shape)
        dweight, dbias, ds = block_backward(block, ds, zs[n], indices[n], x[n], carrier)
        found.append((dweight, dbias))
    return found[::-1]


def loss(network, x, labels, reduction="mean"):
    """Return the loss and its region (`gradients.check`): signs of all activations and winners of all pools."""
    _, s, indices = forward(network, x)
    value, _ = cross_entropy_forward(inputs(network, s)[-1], labels, reduction)
    signs = [np.packbits(out > 0).tobytes() for out in s[1:-1]]
    return float(value), b"".join(signs + [index.tobytes() for index in indices if index is not None])


def dlogits(network, x, labels, reduction="mean"):
    _, s, _ = forward(network, x)
    return cross_entropy_backward(cross_entropy_forward(inputs(network, s)[-1], labels, reduction)[1], reduction)
