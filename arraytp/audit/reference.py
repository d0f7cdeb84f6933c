"""Definitions written out on NumPy arrays, without any of the package's operations.

Slow and plain: sums over the kernel's taps, loops over a pool's windows, formulas in terms of z itself.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from arraytp.audit.check import Floats
from arraytp.config import Loss
from arraytp.model.blocks import Block, Network
from arraytp.ops.patches import Window
from arraytp.optim import OptimizerOptions
from arraytp.options import SGD, Adam

Index = np.ndarray


def conv(x: Floats, weight: Floats, bias: Floats, window: Window) -> Floats:
    """Return the convolution as a direct sum over taps: every tap sees the image from another offset."""
    z = np.zeros((len(x), window.out_height, window.out_width, weight.shape[-1])) + bias
    image = bordered(x, window, 0.0)
    for i, j, rows, columns in taps(window):
        z += image[:, rows, columns] @ weight[i, j]
    return z


def conv_weight_gradient(dz: Floats, x: Floats, window: Window) -> Floats:
    """Return the gradient of the kernel, tap by tap."""
    image = bordered(x, window, 0.0)
    gradient = np.empty((window.kernel, window.kernel, x.shape[-1], dz.shape[-1]))
    for i, j, rows, columns in taps(window):
        gradient[i, j] = np.einsum("bpqc,bpqo->co", image[:, rows, columns], dz, optimize=True)
    return gradient


def conv_input_gradient(dz: Floats, weight: Floats, window: Window) -> Floats:
    """Return the transposed convolution: every output adds to the pixels that it came from."""
    height, width = window.height + window.top + window.bottom, window.width + window.left + window.right
    image = np.zeros((len(dz), height, width, weight.shape[2]))
    for i, j, rows, columns in taps(window):
        image[:, rows, columns] += dz @ weight[i, j].T
    return image[:, window.top : window.top + window.height, window.left : window.left + window.width]


def bordered(x: Floats, window: Window, value: float) -> Floats:
    """Return the image within its border."""
    widths = ((0, 0), (window.top, window.bottom), (window.left, window.right), (0, 0))
    return np.pad(x, widths, constant_values=value)


def taps(window: Window) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield each tap (i, j) and the rows and columns of the bordered image that the outputs see through it."""
    s = window.stride
    for i, j in itertools.product(range(window.kernel), repeat=2):
        yield (
            i,
            j,
            slice(i, i + s * (window.out_height - 1) + 1, s),
            slice(j, j + s * (window.out_width - 1) + 1, s),
        )


def activation(z: Floats, name: str) -> Floats:
    """Return f(z)."""
    below = np.minimum(z, 0)
    values: dict[str, Floats] = {
        "linear": z,
        "leaky-relu": np.where(z >= 0, z, 0.1 * z),
        "relu": np.where(z > 0, z, 0.0),
        "elu": np.where(z > 0, z, np.expm1(below)),
        "tanh": np.tanh(z),
    }
    return values[name]


def slope(z: Floats, name: str) -> Floats:
    """Return f'(z), from z itself."""
    below = np.minimum(z, 0)
    slopes: dict[str, Floats] = {
        "linear": np.ones_like(z),
        "leaky-relu": np.where(z >= 0, 1.0, 0.1),
        "relu": np.where(z > 0, 1.0, 0.0),
        "elu": np.where(z > 0, 1.0, np.exp(below)),
        "tanh": 1 - np.tanh(z) ** 2,
    }
    return slopes[name]


def inverse(s: Floats, name: str) -> Floats:
    """Return f⁻¹(s)."""
    below = np.minimum(s, 0)
    with np.errstate(all="ignore"):
        values: dict[str, Floats] = {
            "linear": s,
            "leaky-relu": np.where(s >= 0, s, s / 0.1),
            "elu": np.where(s > 0, s, np.log1p(np.maximum(below, -1))),
            "tanh": np.arctanh(np.clip(s, -1, 1)),
        }
    return values[name]


def max_pool(s: Floats, window: Window) -> tuple[Floats, Index]:
    """Return the maxima and which element of its window each is, window by window; the first one wins a tie."""
    image, k = bordered(s, window, -math.inf), window.kernel
    out = np.empty((len(s), window.out_height, window.out_width, s.shape[-1]))
    index = np.empty(out.shape, int)
    for p, q, row, column in corners(window):
        fields = image[:, row : row + k, column : column + k].reshape(len(s), k * k, -1)
        index[:, p, q], out[:, p, q] = fields.argmax(axis=1), fields.max(axis=1)
    return out, index


def unpool(t: Floats, index: Index, window: Window, mode: str) -> Floats:
    """Return t where the maxima were: windows write in row-major order, and overwrite earlier values or add to them."""
    height, width = window.height + window.top + window.bottom, window.width + window.left + window.right
    image = np.zeros((len(t), height, width, t.shape[-1]))
    b, c = np.ix_(np.arange(len(t)), np.arange(t.shape[-1]))
    for p, q, row, column in corners(window):
        i, j = np.divmod(index[:, p, q].astype(int), window.kernel)
        place = b, row + i, column + j, c
        image[place] = t[:, p, q] + (image[place] if mode == "accumulate" else 0)
    return image[:, window.top : window.top + window.height, window.left : window.left + window.width]


def corners(window: Window) -> Iterator[tuple[int, int, int, int]]:
    """Yield the position of each window, in row-major order, and its corner in the bordered image."""
    for p, q in itertools.product(range(window.out_height), range(window.out_width)):
        yield p, q, window.stride * p, window.stride * q


def affine(block: Block, weight: Floats, bias: Floats, x: Floats) -> Floats:
    """Return z of a block."""
    if block.window is None:
        return x.reshape(len(x), -1) @ weight + bias
    return conv(x.reshape(len(x), *block.in_shape), weight, bias, block.window)


def transposed(block: Block, weight: Floats, a: Floats) -> Floats:
    """Return ω ∘ a, the transposed affine map, of shape (B, *in_shape)."""
    if block.window is None:
        return a @ weight.T
    return conv_input_gradient(a, weight, block.window)


def weight_gradient(block: Block, dz: Floats, x: Floats) -> Floats:
    """Return x ⋆ dz: the gradient of a block's weight."""
    if block.window is None:
        return x.reshape(len(x), -1).T @ dz
    return conv_weight_gradient(dz, x.reshape(len(x), *block.in_shape), block.window)


def block_forward(block: Block, weight: Floats, bias: Floats, x: Floats) -> tuple[Floats, Floats, Index | None]:
    """Return z, s^{n+1} and the maxima of a block."""
    z = affine(block, weight, bias, x)
    s = activation(z, block.activation.name)
    if block.pool is None:
        return z, s, None
    # In a saturated window tanh's and ELU's values are equal by rounding only: their order is that of z.
    distinct = np.maximum(z, 0) if block.activation.name == "relu" else z
    return z, max_pool(s, block.pool)[0], max_pool(distinct, block.pool)[1]


def block_backward(
    block: Block, ds: Floats, z: Floats, index: Index | None, x: Floats, through: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return dW, db and dx of a block, with ds = 0 for auxiliary units; the weight `through` carries ds back to x."""
    full = np.zeros((len(ds), *block.out_shape))
    full[..., : block.next_shape[-1]] = ds.reshape(len(ds), *block.next_shape)
    df = full if block.pool is None or index is None else unpool(full, index, block.pool, "accumulate")
    dz = df * slope(z, block.activation.name)
    return weight_gradient(block, dz, x), dz.reshape(-1, dz.shape[-1]).sum(axis=0), transposed(block, through, dz)


def forward(network: Network, x: Floats) -> tuple[list[Floats], list[Floats], list[Index | None]]:
    """Return z, s and the maxima of every block; s[0] is the input, s[n + 1] holds the auxiliary units, too."""
    zs, s, indices = [], [x], []
    for n, block in enumerate(network.blocks):
        z, out, index = block_forward(block, network.weights[n], network.biases[n], handed_on(network, s, n))
        zs.append(z)
        s.append(out)
        indices.append(index)
    return zs, s, indices


def handed_on(network: Network, s: list[Floats], n: int) -> Floats:
    """Return the input of block n: s[n] without the auxiliary units of the block before."""
    return s[n] if n == 0 else s[n][..., : network.blocks[n - 1].next_shape[-1]]


def backward(network: Network, through: list[Floats], x: Floats, dlogits: Floats) -> list[tuple[Floats, Floats]]:
    """Return dW and db of every block, the weight through[n] carrying the gradient from block n to block n − 1."""
    zs, s, indices = forward(network, x)
    updates, ds = [], dlogits
    for n in reversed(range(len(network))):
        taken = handed_on(network, s, n)
        dweight, dbias, ds = block_backward(network.blocks[n], ds, zs[n], indices[n], taken, through[n])
        updates.append((dweight, dbias))
    return updates[::-1]


def smoothed(options: Loss, labels: Index, classes: int) -> Floats:
    """Return y = (1 − e) onehot + e/M, of shape (B, M)."""
    y: Floats = (1 - options.label_smoothing) * np.eye(classes)[labels] + options.label_smoothing / classes
    return y


def loss(options: Loss, logits: Floats, labels: Index) -> float:
    """Return −Σ y log p with p = softmax(z), or ½ Σ ‖z − y‖², or its mean, sample by sample."""
    total = 0.0
    for z, y in zip(logits, smoothed(options, labels, logits.shape[1]), strict=True):
        if options.name == "mse":
            total += math.fsum((z - y) ** 2) / 2
        else:
            total += math.fsum(y * (z.max() + math.log(math.fsum(np.exp(z - z.max()))) - z))
    return total if options.reduction == "sum" else total / len(labels)


def loss_change(options: Loss, logits: Floats, base: Floats, labels: Index) -> float:
    """Return the change of `loss` from the logits `base`, accurate to the rounding of the change itself.

    log Σ exp(z) − log Σ exp(z0) = log(1 + Σ p0 (exp(z − z0) − 1)); ‖z − y‖² − ‖z0 − y‖² = ⟨z − z0, z + z0 − 2y⟩.
    """
    change, y = logits - base, smoothed(options, labels, logits.shape[1])
    if options.name == "mse":
        total = float((change * (logits + base - 2 * y)).sum()) / 2
    else:
        p = np.exp(base - base.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        total = float(np.sum(np.log1p((p * np.expm1(change)).sum(axis=1)) - (y * change).sum(axis=1)))
    return total if options.reduction == "sum" else total / len(labels)


def sgd(options: SGD, lr: float, theta: Floats, g: Floats, moments: list[Floats]) -> Floats:
    """Return θ after a step: v ← μ v + g, θ ← θ − lr v; `moments` [v] is changed."""
    v = options.momentum * (moments[0] if moments else 0) + g
    moments[:] = [v]
    return theta - lr * v


def adam(options: Adam, lr: float, epsilon: float, t: int, theta: Floats, g: Floats, moments: list[Floats]) -> Floats:
    """Return θ after step t ≥ 1; `moments` [m, u] is changed."""
    m, u = moments or [np.zeros_like(theta), np.zeros_like(theta)]
    m = options.beta1 * m + (1 - options.beta1) * g
    u = options.beta2 * u + (1 - options.beta2) * g**2
    moments[:] = [m, u]
    c1, c2 = 1 - options.beta1**t, 1 - options.beta2**t
    if options.epsilon_form == "pytorch":
        return theta - lr * (m / c1) / (np.sqrt(u / c2) + epsilon)
    return theta - lr * math.sqrt(c2) / c1 * m / (np.sqrt(u) + epsilon)


def optimiser_step(
    options: OptimizerOptions, lr: float, position: int, t: int, theta: Floats, g: Floats, moments: list[Floats]
) -> Floats:
    """Return θ after step t ≥ 1 of the optimiser of block `position`, weight decay included; `moments` is changed."""
    g = g + options.weight_decay * theta
    if isinstance(options, SGD):
        return sgd(options, lr, theta, g, moments)
    epsilon = options.epsilon[position] if isinstance(options.epsilon, tuple) else options.epsilon
    return adam(options, lr, epsilon, t, theta, g, moments)
