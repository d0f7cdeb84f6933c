"""Naive loops: the definitions in docs/math, one number at a time in Python floats, without code of arraytp.

Of a window, only the attributes are read (kernel, stride, borders, size). `fields` enumerates what it covers.
"""

import math

import numpy as np


def output_size(window):
    """Count the positions at which the window lies within the bordered image, by trying them all."""
    height = window.top + window.height + window.bottom
    width = window.left + window.width + window.right
    rows = sum(1 for top in range(0, height, window.stride) if top + window.kernel <= height)
    columns = sum(1 for left in range(0, width, window.stride) if left + window.kernel <= width)
    return rows, columns


def fields(window):
    """Yield (p, q, i, j, row, column): element i, j of window p, q lies on that pixel of the image without border."""
    rows, columns = output_size(window)
    for p in range(rows):
        for q in range(columns):
            for i in range(window.kernel):
                for j in range(window.kernel):
                    yield p, q, i, j, p * window.stride + i - window.top, q * window.stride + j - window.left


def inside(window, row, column):
    return 0 <= row < window.height and 0 <= column < window.width


def im2col(x, window):
    k, channels = window.kernel, x.shape[-1]
    patches = np.zeros((len(x), *output_size(window), k * k * channels))
    for p, q, i, j, row, column in fields(window):
        if inside(window, row, column):
            for b in range(len(x)):
                for c in range(channels):
                    patches[b, p, q, (i * k + j) * channels + c] = x[b, row, column, c]
    return patches


def col2im(dpatches, window):
    k = window.kernel
    channels = dpatches.shape[-1] // (k * k)
    dx = np.zeros((len(dpatches), window.height, window.width, channels))
    for p, q, i, j, row, column in fields(window):
        if inside(window, row, column):
            for b in range(len(dpatches)):
                for c in range(channels):
                    dx[b, row, column, c] += dpatches[b, p, q, (i * k + j) * channels + c]
    return dx


def conv(x, weight, bias, window):
    z = np.zeros((len(x), *output_size(window), weight.shape[-1]))
    z += bias
    for p, q, i, j, row, column in fields(window):
        if inside(window, row, column):
            for b in range(len(x)):
                for o in range(weight.shape[-1]):
                    for c in range(weight.shape[2]):
                        z[b, p, q, o] += x[b, row, column, c] * weight[i, j, c, o]
    return z


def conv_weight_gradient(dz, x, window):
    dweight = np.zeros((window.kernel, window.kernel, x.shape[-1], dz.shape[-1]))
    for p, q, i, j, row, column in fields(window):
        if inside(window, row, column):
            for b in range(len(x)):
                for o in range(dz.shape[-1]):
                    for c in range(x.shape[-1]):
                        dweight[i, j, c, o] += x[b, row, column, c] * dz[b, p, q, o]
    return dweight


def conv_input_gradient(dz, weight, window):
    dx = np.zeros((len(dz), window.height, window.width, weight.shape[2]))
    for p, q, i, j, row, column in fields(window):
        if inside(window, row, column):
            for b in range(len(dz)):
                for o in range(weight.shape[-1]):
                    for c in range(weight.shape[2]):
                        dx[b, row, column, c] += dz[b, p, q, o] * weight[i, j, c, o]
    return dx


def max_pool(s, window):
    """Return the maxima and their positions in the windows; the first one in row-major order wins a tie."""
    shape = (len(s), *output_size(window), s.shape[-1])
    out, index = np.full(shape, -math.inf), np.zeros(shape, int)
    for p, q, i, j, row, column in fields(window):
        if inside(window, row, column):
            for b in range(len(s)):
                for c in range(s.shape[-1]):
                    if s[b, row, column, c] > out[b, p, q, c]:
                        out[b, p, q, c] = s[b, row, column, c]
                        index[b, p, q, c] = i * window.kernel + j
    return out, index


def max_pool_backward(dout, index, window):
    ds = np.zeros((len(dout), window.height, window.width, dout.shape[-1]))
    for p, q, i, j, row, column in fields(window):
        for b in range(len(dout)):
            for c in range(dout.shape[-1]):
                if index[b, p, q, c] == i * window.kernel + j:
                    ds[b, row, column, c] += dout[b, p, q, c]
    return ds


def max_unpool(t, index, window, mode):
    """Let windows, in row-major order, write to the positions of their maxima: replace what is there, or add to it."""
    out = np.zeros((len(t), window.height, window.width, t.shape[-1]))
    for p, q, i, j, row, column in fields(window):
        for b in range(len(t)):
            for c in range(t.shape[-1]):
                if index[b, p, q, c] == i * window.kernel + j:
                    before = out[b, row, column, c] if mode == "accumulate" else 0
                    out[b, row, column, c] = before + t[b, p, q, c]
    return out


def activation(z, name):
    return {
        "linear": lambda: z,
        "leaky-relu": lambda: z if z >= 0 else 0.1 * z,
        "relu": lambda: max(z, 0.0),
        "elu": lambda: z if z > 0 else math.expm1(z),
        "tanh": lambda: math.tanh(z),
    }[name]()


def derivative(z, name):
    """f'(z), from z itself; leaky ReLU at 0: 1, ReLU at 0: 0."""
    return {
        "linear": lambda: 1.0,
        "leaky-relu": lambda: 1.0 if z >= 0 else 0.1,
        "relu": lambda: 1.0 if z > 0 else 0.0,
        "elu": lambda: 1.0 if z > 0 else math.exp(z),
        "tanh": lambda: 1 / math.cosh(z) ** 2,
    }[name]()


def each(function, array, *arguments):
    """Apply a scalar function to every element."""
    return np.array([function(float(value), *arguments) for value in array.flat]).reshape(array.shape)


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def cross_entropy(logits, labels, reduction):
    total = -sum(math.log(softmax(row)[label]) for row, label in zip(logits.tolist(), labels.tolist(), strict=True))
    return total if reduction == "sum" else total / len(labels)


def cross_entropy_gradient(logits, labels, reduction):
    gradient = np.array([softmax(row) for row in logits.tolist()])
    for b, label in enumerate(labels.tolist()):
        gradient[b, label] -= 1
    return gradient if reduction == "sum" else gradient / len(labels)


def sgd(theta, gradient, velocity, *, lr, momentum=0.0, weight_decay=0.0):
    """Return θ and v after one step: g ← g + wd·θ, v ← μ v + g, θ ← θ − lr v."""
    g = gradient + weight_decay * theta
    v = momentum * velocity + g
    return theta - lr * v, v


def adam(theta, gradient, m, u, t, *, lr, beta1, beta2, epsilon, epsilon_form, weight_decay=0.0):
    """Return θ, m, u after step t ≥ 1."""
    g = gradient + weight_decay * theta
    m = beta1 * m + (1 - beta1) * g
    u = beta2 * u + (1 - beta2) * g * g
    if epsilon_form == "pytorch":
        theta -= lr * (m / (1 - beta1**t)) / (math.sqrt(u / (1 - beta2**t)) + epsilon)
    else:
        theta -= lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (math.sqrt(u) + epsilon)
    return theta, m, u


def dense(x, weight, bias):
    z = np.zeros((len(x), weight.shape[1]))
    for b, sample in enumerate(x.reshape(len(x), -1)):
        for o in range(weight.shape[1]):
            z[b, o] = bias[o] + sum(value * w for value, w in zip(sample, weight[:, o], strict=True))
    return z


def forward(blocks, weights, biases, x):
    """Return the list of z^n, of s^n (s^0 = x) and of the pools' indices."""
    zs, s, indices = [], [x], []
    for block, weight, bias in zip(blocks, weights, biases, strict=True):
        z = dense(s[-1], weight, bias) if block.window is None else conv(s[-1], weight, bias, block.window)
        out, index = each(activation, z, block.activation.name), None
        if block.pool is not None:
            out, index = max_pool(out, block.pool)
        zs.append(z), s.append(out), indices.append(index)
    return zs, s, indices


def updates(rule, blocks, weights, biases, feedback, x, dlogits):
    """Return (dW, db) of every block by a rule of docs/math/feedback-alignment.md.

    `feedback[n]`: FA: B^n in place of W^n on the way from block n down to block n−1; DFA: B^n from the logits to s^n,
    n = 1 … N−1. BP needs none.
    """
    zs, s, indices = forward(blocks, weights, biases, x)
    result, delta = [], dlogits
    for n in reversed(range(len(blocks))):
        block = blocks[n]
        if rule == "dfa" and n < len(blocks) - 1:
            delta = (dlogits @ feedback[n + 1]).reshape(s[n + 1].shape)
        df = delta.reshape(s[n + 1].shape)
        if block.pool is not None:
            df = max_pool_backward(df, indices[n], block.pool)
        dz = df * each(derivative, zs[n], block.activation.name)
        carrier = feedback[n] if rule == "fa" and n > 0 else weights[n]
        if block.window is None:
            flat = s[n].reshape(len(x), -1)
            dweight = sum(np.outer(sample, error) for sample, error in zip(flat, dz, strict=True))
            delta = np.array([[sum(carrier[i] * error) for i in range(len(carrier))] for error in dz])
        else:
            dweight = conv_weight_gradient(dz, s[n], block.window)
            delta = conv_input_gradient(dz, carrier, block.window)
        result.append((dweight, sum(dz.reshape(-1, dz.shape[-1]))))
    return result[::-1]
